"""What every stage does before its first model loads: settings, seeds, precision, the run folder."""

import dataclasses
import difflib
import errno
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors import SafetensorError

from plumbline.paths import resolve_config
from plumbline.rows import read_text

_VERSIONS_KEPT = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "plumbline-rlhf")


def trainer_defaults() -> dict[str, Any]:
    """Where our stages want something else than a transformers Trainer does; a settings file overrides each.

    No uploads, no checkpoints in the middle of a run of minutes, and no failure on a machine without a GPU.
    """
    from plumbline.policy_models.devices import default_device

    return {
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "lr_scheduler_type": "cosine",
        "dataloader_pin_memory": False,
        "use_cpu": default_device().type == "cpu",
        "bf16": pick_dtype("auto") == torch.bfloat16,
        "activation_checkpointing": False,
    }


def launched(main: Callable[[], Any], stage: str) -> None:
    """Runs a stage that was launched by its path: what a user did wrong is one line on standard error and exit status 2."""
    try:
        main()
    except ValueError as error:
        print(f"{stage}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_settings(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    stage: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Reads `--config file.yaml` and flags into one instance of each dataclass; flags override the file.

    `stage` is the folder of configs/ whose files `--config` may also name without path and suffix: `--config debug`.

    `defaults` replace the dataclasses' own where neither file nor flags say anything.

    Raises ValueError, naming file, line, value and the nearest known name, for a missing file, a file that is not a
    mapping, or an unknown setting; the dataclasses themselves refuse clashing values in `__post_init__`.
    """
    from trl import TrlParser

    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    known: dict[str, Any] = {}
    for cls in classes:
        types = typing.get_type_hints(cls)  # not Field.type: the parser rewrites that on its first run
        known |= {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init}
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 >= len(argv):
            raise ValueError("--config needs a path to a YAML file")
        file = resolve_config(argv[at + 1], stage) if stage else Path(argv[at + 1])
        _check_config_file(file, known)
        argv[at + 1] = str(file)
    flags = [arg for arg in argv if arg.startswith("--") and arg not in ("--config", "--help")]
    for flag in flags:
        name = flag[2:].split("=")[0].replace("-", "_").removeprefix("no_")
        if name not in known:
            raise ValueError(f"command line: unknown setting {flag!r}{_nearest(name, known)}")
    parser = TrlParser(list(classes))  # type: ignore[arg-type]
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args_and_config(args=argv)


def _check_config_file(path: Path, known: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such settings file")
    text = read_text(path)
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}:1: settings must be a mapping of names to values, found {type(settings).__name__}")
    for name, value in settings.items():
        if name == "env":
            continue
        found = re.search(rf"^{re.escape(str(name))}\s*:", text, re.MULTILINE)
        place = f"{path}:{text[: found.start()].count(chr(10)) + 1 if found else 1}"
        if name not in known:
            raise ValueError(f"{place}: unknown setting {name!r} (value {value!r}){_nearest(str(name), known)}")
        if wanted := _wrong_type(known[name], value):
            raise ValueError(f"{place}: {name}={value!r}: must be {wanted}")


def _wrong_type(annotation: Any, value: Any) -> str | None:
    """What the setting takes, if that is a plain type and the value is not of it."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds = set(typing.get_args(annotation)) or {annotation}
    if typing.get_origin(annotation) is list or any(typing.get_origin(kind) is list for kind in kinds):
        return None  # several values: the parser looks at each
    if not kinds <= {*plain, type(None)}:
        return None
    if float in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-4, without a dot, as a text
            return None if math.isfinite(float(value)) else "a finite number"
        except ValueError:
            pass
    fits = any(type(value) is kind for kind in kinds)
    return None if fits else " or ".join(plain[kind] for kind in plain if kind in kinds)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; see --help for the settings of this stage"


def pick_dtype(name: str) -> torch.dtype:
    """`auto` is bf16 where the device of this process multiplies it in hardware, else fp32."""
    if name == "auto":
        from plumbline.policy_models.devices import (  # brings transformers: a report does without
            default_device,
            fast_dtype,
        )

        return fast_dtype(default_device())
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"dtype={name!r}: must be 'auto', 'bfloat16', 'float16' or 'float32'")
    return dtypes[name]


def open_run(folder: str | Path, *settings: Any) -> Path:
    """Makes the run folder and writes what reproduces it: resolved settings, versions, machine.

    ValueError for a folder that cannot be made or written to.
    """
    run = Path(folder)
    with disk_faults(run):
        run.mkdir(parents=True, exist_ok=True)
        _describe(run, *settings)
    return run


def _describe(run: Path, *settings: Any) -> None:
    resolved: dict[str, Any] = {}
    for one in settings:
        resolved |= one.to_dict() if hasattr(one, "to_dict") else dataclasses.asdict(one)
    plain = json.loads(json.dumps(resolved, default=str))
    (run / "settings.yaml").write_text(yaml.safe_dump(plain, sort_keys=True), encoding="utf-8")
    versions: dict[str, str | int | None] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _VERSIONS_KEPT:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions |= {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()}
    (run / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


def claim_run(folder: str | Path) -> IO[str] | None:
    """Keeps a second run out of the folder for as long as the returned file stays open; the system closes it with the process.

    One process a machine claims it, that of local rank 0; None for others, and where files cannot be locked.

    Raises:
        ValueError: another run writes to the folder now, or it cannot be made.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    run = Path(folder)
    with disk_faults(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(f"{run}: {owner} is writing to this folder; name another output_dir, or wait") from None
    except OSError:  # a file system without locks
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}\n")
    lock.flush()
    return lock


_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
}
_DISK_WORDS = (
    "No space left",
    "quota exceeded",
    "Read-only file system",
    "File too large",
    "PytorchStreamWriter failed",
)


@contextmanager
def disk_faults(run: Path, advice: str = "give another output_dir") -> Iterator[None]:
    """Makes one ValueError of what a full, read-only or forbidden disk raises in there, in the words of any library."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error, run)
        if reason is None:
            raise
        free = _free_space(run)
        raise ValueError(f"{run}: cannot be written to ({reason}{free}); {advice}") from None


def _disk_reason(error: BaseException | None, run: Path) -> str | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            inside = error.filename is None or str(run) in str(error.filename) or str(error.filename) in str(run)
            return str(error.strerror) if inside else None
        if isinstance(error, OSError | RuntimeError | SafetensorError) and any(w in str(error) for w in _DISK_WORDS):
            return str(error).splitlines()[0][:120]
        error = error.__cause__ or error.__context__
    return None


def _free_space(run: Path) -> str:
    there = next((folder for folder in (run, *run.parents) if folder.exists()), None)
    try:
        return f", {shutil.disk_usage(there).free / 2**20:.0f} MiB free" if there else ""
    except OSError:
        return ""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `folder` once all is written; on an error nothing is left of it."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            scratch.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
