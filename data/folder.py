"""A run's folder: what has its final name is finished, and a run goes on with its own numbers only.

Every result is written beside its place and renamed when it is whole, so a run can be killed at any
moment; the stage it was in is made again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from data.checkpoints import weight_files

MAY_CHANGE = {  # when a run goes on: for more of it, and where its computing is done
    "rounds",
    "method",
    "device",
    "bf16",
    "micro_batch_tokens",
    "decode_batch_size",
    "log_every",
    "out",
    "weights",  # by name; by content they may not
    "labeled",
    "unlabeled",
    "test",
}
OURS = ("warm-up", "st", "dpo-st", "log.jsonl", "results.json", "results.md")


def write_text(text: str, path: Path) -> None:
    """Write a small text file whole, in place of what is there."""

    def write(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8", newline="\n")

    write_beside(path, write)


def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Let write(unfinished) make a file or a folder beside `path`, and rename it when it is whole.

    So whatever has its final name is finished, whenever the process is killed. What is written has
    a name of its own, so two runs cannot write into each other's files. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{path.name}.unfinished-"
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        unfinished = Path(folder) / path.name
        try:
            write(unfinished)
            if not path.is_dir():  # else another run has made the same folder meanwhile
                os.replace(unfinished, path)
        except FileNotFoundError:
            if not path.exists():  # else another run was faster, and has cleared this away
                raise


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed in `write_beside` has left beside a finished path."""
    for leftover in path.parent.glob(f"{path.name}.unfinished-*"):
        if leftover.is_dir() and {part.name for part in leftover.iterdir()} <= {path.name}:
            shutil.rmtree(leftover)


def open_folder(folder: Path, config: dict, problems: object, base: Path) -> None:
    """Begin a run in its folder, or continue one, and write config.json.

    Raises ValueError if the folder holds a run with other numbers, problems or base weights, or
    files that stand where this run's would.
    """
    path = folder / "config.json"
    config = config | {
        "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        "base_weights": checksum(base),
    }
    if path.exists():
        before = read_run_config(path)
        for name in config:
            if name not in MAY_CHANGE and before.get(name) != config[name]:
                there = f"--{name.replace('_', '-')} {before.get(name)}"
                if name in ("problems", "base_weights"):
                    there = f"other {name.replace('_', ' ')}"
                elif isinstance(config[name], bool):  # its flag may be called --no-...
                    there = f"another setting of {name.replace('_', '-')}"
                raise ValueError(
                    f"{folder} holds a run with {there}: repeat that, or choose another --out"
                )
    else:
        for name in OURS:
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is of no run: choose another --out")
    write_text(json.dumps(config, indent=2) + "\n", path)
    drop_unfinished(folder)


def read_run_config(path: Path) -> dict:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict) or "base_weights" not in before:
        raise ValueError(f"{path} is damaged, or of no run: choose another --out")
    return before


def checksum(base: Path) -> str:
    """A checksum of the files that are read of a checkpoint, whatever their folder is called."""
    digest = hashlib.sha256()
    for path in [base / "config.json", base / "spiece.model", *weight_files(base)]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def drop_unfinished(folder: Path) -> None:
    """Take the lines of unfinished stages out of log.jsonl: they will be logged again."""
    path = folder / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            stage = json.loads(line)["stage"]
        except (ValueError, KeyError, TypeError):  # killed in the middle of a line, or not ours
            continue
        if (folder / str(stage)).exists():
            kept.append(line)
    write_text("".join(kept), path)
