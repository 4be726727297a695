"""Where models run here, and in what type."""

import torch


def default_device() -> torch.device:
    """This process's GPU where there is one and `ACCELERATE_USE_CPU` (`accelerate launch --cpu`) does not forbid it, else the CPU."""
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 where `device` multiplies matrices of it in hardware, else fp32.

    Of the CPUs those with AMX or AVX512-BF16 do. Elsewhere torch computes bf16 as well, at a sixth of fp32's speed.
    """
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
