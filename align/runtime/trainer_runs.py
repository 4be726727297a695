"""What the stages on a transformers Trainer share: training, from the start or from a checkpoint, on a disk that may fail."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plumbline.align.runtime.launch import claim_run, disk_faults, open_run
from plumbline.align.runtime.resuming import STAMP, StampCheckpoints, asked_checkpoint, check_same_run, numbered, stamp
from plumbline.align.runtime.tracking import MetricsCallback


class TrainerRun:
    """The folder of a run, the checkpoint it goes on from, and the callbacks that keep both in order.

    Args:
        stage: for messages.
        settings: of the stage: `model` and `resume` are read; args: of the Trainer.
        data: name -> rows that are trained on, for telling another run's checkpoint.

    Everything is checked before the folder is touched, and before a model loads.
    """

    def __init__(self, stage: str, settings: Any, args: Any, *, folder: str, data: Mapping[str, Any]) -> None:
        self.stage = stage
        self.folder = Path(folder)
        what = stamp([settings, args], data=data, models={"model": settings.model})
        self.checkpoint = asked_checkpoint(stage, self.folder, settings.resume, args.resume_from_checkpoint)
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, what)
        self._lock = claim_run(self.folder)
        open_run(self.folder, settings, args)
        self._older = set(numbered(self.folder, "checkpoint"))
        self._stamp = StampCheckpoints(what)

    def callbacks(self) -> Sequence[Any]:
        """Metrics, and the stamp of each checkpoint."""
        at = None if self.checkpoint is None else int(re.sub(r"\D", "", self.checkpoint.name) or 0)
        return [MetricsCallback(self.folder, resumed_at=at), self._stamp]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around all that trains and saves. On a full disk, one line, and no half of a checkpoint."""
        try:
            with disk_faults(self.folder, "what was saved before is whole: make room and go on with --resume true"):
                yield
        except ValueError:
            for made in set(numbered(self.folder, "checkpoint")) - self._older:
                if not (made / STAMP).is_file():
                    shutil.rmtree(made, ignore_errors=True)
            raise
        finally:
            if self._lock is not None:
                self._lock.close()

    def train(self, trainer: Any) -> None:
        """From the start, or from the checkpoint, to the bit."""
        if self.checkpoint is None:
            trainer.train()
            return
        print(f"{self.stage}: going on from {self.checkpoint}")
        trainer.train(resume_from_checkpoint=str(self.checkpoint))
