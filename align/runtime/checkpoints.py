"""Checkpoints of a run: written whole or not at all, the last few kept, read without running code from the file."""

import random
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, rank: int = 0) -> Path:
    """Writes `run/checkpoints/step-N/rank-R.pt`, under another name first: a crash leaves earlier ones intact."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"rank-{rank}.pt"
    partial = target.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(target)
    return folder


def prune_checkpoints(run: Path, *, keep_last: int) -> None:
    """Drops all but the newest `keep_last` steps. To be called by one rank once every rank has written its file."""
    for old in sorted((run / "checkpoints").glob("step-*"))[: -keep_last or None]:
        shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(run: Path, *, num_ranks: int = 1) -> Path | None:
    """The newest step folder that every rank completed; None when there is no checkpoint at all.

    Raises ValueError when the checkpoints are of a run with another number of processes.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for folder in folders:
        ranks = {file.name for file in folder.glob("rank-*.pt")}
        if ranks == {f"rank-{rank}.pt" for rank in range(num_ranks)}:
            return folder
    if folders:
        found = len(list(folders[0].glob("rank-*.pt")))
        raise ValueError(
            f"{folders[0]}: written by {found} processes, this run has {num_ranks}; "
            "resume with the same number, or start anew in another output_dir"
        )
    return None


def load_checkpoint(folder: Path, *, rank: int = 0) -> tuple[int, dict[str, Any]]:
    """(step, state) of one rank. Only tensors and plain values are read: a pickle that would run code is refused."""
    step = int(re.fullmatch(r"step-(\d+)", folder.name).group(1))  # type: ignore[union-attr]
    return step, torch.load(folder / f"rank-{rank}.pt", map_location="cpu", weights_only=True)


def catch_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM only makes a note; the returned function says whether one came. Once is patient: the second
    SIGTERM ends the process as ever. Outside the main thread nothing is caught."""
    came: list[bool] = []

    def note(number: int, _frame: Any) -> None:
        came.append(True)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, note)
    return lambda: bool(came)


def rng_state() -> dict[str, Any]:
    """State of every generator a stage may touch: Python, NumPy, torch, CUDA."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
