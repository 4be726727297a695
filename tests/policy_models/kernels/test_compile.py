"""The kernels compile ahead of time for the GPUs they are meant for, in the tiles that ship, without spilling registers.

In a process of its own: a process interprets kernels or compiles them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from plumbline.policy_models.kernels import grouped, logprob, router

POINTERS = {"index_ptr": "*i64", "slot_ptr": "*i32", "ends_ptr": "*i32", "expert_ptr": "*i32", "row_ptr": "*i32", "id_ptr": "*i64"}
FLOATS = ("weight_ptr", "dweight_ptr", "max_ptr", "sum_ptr", "weighted_ptr", "own_ptr", "top_ptr", "log_sum_ptr", "entropy_ptr",
          "dlogp_ptr", "dentropy_ptr", "bias_ptr", "dweight_ptr")
rows = {"BLOCK_M": grouped.TILE_ROWS, "BLOCK_E": 128}
KERNELS = {
    "tiles": (grouped.tiles_kernel, rows),
    "up_swiglu": (grouped.up_swiglu_kernel, grouped.TILE | {"SAVE_Z": True}),
    "linear": (grouped.grouped_linear_kernel, grouped.TILE),
    "linear transposed": (grouped.grouped_linear_kernel, grouped.TILE | {"w_stride_m": 1}),
    "combine": (grouped.combine_kernel, {"WEIGHTED": True, "BLOCK_D": 1024}),
    "swiglu_backward": (grouped.swiglu_backward_kernel, grouped.BACKWARD_TILE),
    "outer, left gathered": (grouped.grouped_outer_kernel, grouped.OUTER_TILE | {"GATHER_LEFT": True, "GATHER_RIGHT": False}),
    "outer, right gathered": (grouped.grouped_outer_kernel, grouped.OUTER_TILE | {"GATHER_LEFT": False, "GATHER_RIGHT": True}),
    "logprob": (logprob.logprob_kernel, logprob.TILE | {"SPLITS": logprob.SPLITS}),
    "logits_grad": (logprob.logits_grad_kernel, logprob.TILE),
    "top_k": (router.top_k_kernel, {"SIGMOID": True, "BIAS": True, "RENORMALISE": True, "BLOCK_E": 128}),
    "top_k backward": (router.top_k_backward_kernel, {"SIGMOID": False, "RENORMALISE": True, "BLOCK_E": 128}),
}

def kind(name, label):
    if name in FLOATS or (label.startswith("top_k") and name in ("z_ptr", "dz_ptr")):
        return "*fp32"
    if name in ("inverse_temperature", "scale"):
        return "fp32"
    return POINTERS.get(name, "*bf16" if name.endswith("_ptr") else "i32")

capability = int(sys.argv[1])
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
found = {}
for label, (kernel, constants) in KERNELS.items():
    constants = dict(constants)
    if label == "linear":
        constants["w_stride_k"] = 1
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind(name, label) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name] not in ("constexpr", "fp32") and name not in ("TOP_K", "K", "E", "T")}
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                          target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": 1} if label.startswith("top_k") else grouped.LAUNCH)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"]); file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    ptx = made.asm["ptx"]
    found[label] = {
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "shared": made.metadata.shared, "tensor cores": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
    }
print(json.dumps(found))
"""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have


@pytest.mark.slow  # a compiler run of 12 kernels: half a minute
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        cwd=Path(__file__).parents[3],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 12
    print(found)
    for label, usage in found.items():
        assert usage["stack"] == 0, (label, usage)
        assert usage["shared"] <= SHARED_LIMIT[capability], (label, usage)
        assert usage["tensor cores"] > 0 or label in ("tiles", "combine", "top_k", "top_k backward")
