"""Checkpoints of a run: written whole or not at all, the last few kept, read without running code from the file."""

import json
import random
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plumbline.align.runtime.resuming import STAMP, newest_whole, numbered


def save_checkpoint(
    run: Path, step: int, state: dict[str, Any], *, rank: int = 0, stamp: dict[str, Any] | None = None
) -> Path:
    """Writes `run/checkpoints/step-N/rank-R.pt`, under another name first: a crash leaves earlier ones intact.

    `stamp` says which run it belongs to (`plumbline.align.runtime.resuming.stamp`); rank 0 writes it beside its part.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"rank-{rank}.pt"
    partial = target.with_suffix(".partial")
    try:
        if stamp is not None and rank == 0:
            (folder / STAMP).write_text(json.dumps(stamp, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        torch.save(state, partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return folder


def prune_checkpoints(run: Path, *, keep_last: int) -> None:
    """Drops all but the newest `keep_last` steps. To be called by one rank once every rank has written its file."""
    for old in numbered(run / "checkpoints", "step")[keep_last or None :]:
        shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(run: Path, *, num_ranks: int = 1) -> Path | None:
    """The newest step folder that every rank completed and whose files are whole; None when there is no checkpoint.

    Says which newer ones it passes by. Raises ValueError when none is whole, or when the checkpoints are of a run with
    another number of processes.
    """
    wanted = {f"rank-{rank}.pt" for rank in range(num_ranks)}

    def fault(folder: Path) -> str | None:
        ranks = {file.name for file in folder.glob("rank-*.pt")}
        if ranks != wanted:
            return f"written by {len(ranks)} processes, this run has {num_ranks}"
        cut = next((name for name in sorted(wanted) if not zipfile.is_zipfile(folder / name)), None)
        return f"{cut} is cut off" if cut else None

    folders = numbered(run / "checkpoints", "step")
    if folders and all({file.name for file in folder.glob("rank-*.pt")} != wanted for folder in folders):
        raise ValueError(
            f"{folders[0]}: {fault(folders[0])}; resume with the same number, or start anew in another output_dir"
        )
    return newest_whole("ppo", run / "checkpoints", "step", fault)


def load_checkpoint(folder: Path, *, rank: int = 0) -> tuple[int, dict[str, Any]]:
    """(step, state) of one rank. Only tensors and plain values are read: a pickle that would run code is refused."""
    step = re.fullmatch(r"step-(\d+)", folder.name)
    if step is None:
        raise ValueError(f"{folder}: no checkpoint; its name must be step-N")
    return int(step[1]), torch.load(folder / f"rank-{rank}.pt", map_location="cpu", weights_only=True)


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
