"""Every router and attention as a user meets it: upcycled from its debug config, then trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import plumbline.align.sft
import plumbline.apps.commands.upcycle
from plumbline.policy_models import load_policy
from plumbline.policy_models.router import SigmoidRouter, routers

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = sorted(path.stem.removeprefix("debug_") for path in (CONFIGS / "upcycle").glob("debug_*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore:router 'capacity'")


def upcycled(name, folder):
    settings = yaml.safe_load((CONFIGS / "upcycle" / f"debug_{name}.yaml").read_text())
    plumbline.apps.commands.upcycle.run(
        plumbline.apps.commands.upcycle.UpcycleSettings(**(settings | {"output_dir": str(folder)}))
    )
    return str(folder)


def test_all_are_here():
    assert VARIANTS == sorted(
        ["sigmoid", "capacity", "progressive", "grouped", "fine_grained", "shared", "gate", "sparse", "local_global"]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains(name, cache, tmp_path):
    model = load_policy(upcycled(name, tmp_path / "policy"), dtype=torch.float32).train()
    ids = torch.randint(3, 259, (4, 48), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_sft_moves_the_bias_of_a_sigmoid_router(cache, tmp_path):
    folder = upcycled("sigmoid", tmp_path / "policy")
    plumbline.align.sft.main(
        ["--config", str(CONFIGS / "sft" / "debug.yaml"), "--model", folder, "--output_dir", str(tmp_path / "run")]
        + ["--max_steps", "2"]
    )
    trained = load_policy(str(tmp_path / "run" / "model"))
    for router in routers(trained):
        assert isinstance(router, SigmoidRouter)
        steps = router.e_score_correction_bias / 1e-3
        assert steps.abs().max() > 0 and torch.equal(steps.round(), steps.round(decimals=3))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
