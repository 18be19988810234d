"""A run's folder: a result under its final name is complete, and the settings are fixed.

Every result is written under a temporary name and renamed once complete, so a run can be killed at
any moment; the stage that was interrupted is repeated.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.checkpoints import BIN, weight_files
from data.processes import from_process_0, rank_and_count
from data.terminal import say, say_record

MAY_CHANGE = {  # when a run is continued: how much is run, and where it is computed
    "rounds",
    "method",
    "device",
    "bf16",
    "micro_batch_tokens",
    "decode_batch_size",
    "log_every",
    "out",
    "warm_up",
    "weights",  # the folder may move; its content may not change
    "labeled",
    "unlabeled",
    "test",
}
AFTER_WARM_UP = {  # flags that the warm-up does not depend on
    *("dpo_samples", "sft_samples", "st_samples", "temperature", "top_k", "calculator"),
    *("max_similarity", "n_pairs", "percentile"),
    *("dpo_steps", "dpo_learning_rate", "later_ratio", "dpo_batch_size", "beta"),
}
OURS = ("warm-up", "st", "dpo-st", "log.jsonl", "results.json", "results.md")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let write(temporary) make a file or a folder; rename it to `path` once it is complete.

    The temporary name is unique, so two processes cannot write into each other's files. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{path.name}.unfinished-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        write(temporary)
        os.replace(temporary, path)


def write_text(text: str, path: Path) -> None:
    """Write a small text file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    write_atomically(path, write)


@contextmanager
def open_folder(folder: Path, config: dict, problems: object, base: Path) -> Iterator[None]:
    """Begin or continue a run; inside the `with` block no other run can use its folder.

    Raises ValueError if the folder belongs to a run with other settings, problems or base weights,
    to a run that is still running, or if it holds unrelated files under the names of results.
    """

    def begin() -> None:
        check_settings(folder, config, problems, base)
        remove_leftovers(folder)
        drop_unfinished(folder)
        if config.get("warm_up") and not (folder / "warm-up").exists():
            copy_warm_up(Path(config["warm_up"]), folder)

    if rank_and_count()[0] > 0:
        from_process_0(begin)  # waits for process 0
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder):
            from_process_0(begin)
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if it is empty: the run was refused before it made anything


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Refuse a second run in the folder. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"another run is using {folder}: wait until it ends, or choose another --out"
        ) from None
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def check_settings(folder: Path, config: dict, problems: object, base: Path) -> None:
    """Write config.json, or compare it with that of the run that is to be continued."""
    path = folder / "config.json"
    config = config | {
        "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        "base_weights": checksum(base),
    }
    started = any((folder / name).exists() for name in OURS)
    before = read_run_config(path) if path.exists() else {}
    if path.exists() and started:
        say(f"Continuing the run in {folder}: finished stages are kept")
        for name in config:
            if name not in MAY_CHANGE and before.get(name) != config[name]:
                there = f"--{name.replace('_', '-')} {before.get(name)}"
                if name in ("problems", "base_weights"):
                    there = f"other {name.replace('_', ' ')}"
                elif isinstance(config[name], bool):  # the flag may be called --no-...
                    there = f"another setting of {name.replace('_', '-')}"
                raise ValueError(
                    f"{folder} holds a run with {there}: use the same, or choose another --out"
                )
    else:  # a config.json alone: the first start failed before it made anything
        if config.get("warm_up"):
            check_warm_up(Path(config["warm_up"]), config)
        for name in OURS:
            if (folder / name).exists():
                raise ValueError(f"{folder / name} was not made by a run: choose another --out")
    write_text(json.dumps(config, indent=2) + "\n", path)


def check_warm_up(other: Path, config: dict) -> None:
    """Raise ValueError unless the other run's warm-up is what this run's would be."""
    if not (other / "warm-up" / "evaluation.jsonl").exists():
        raise ValueError(f"--warm-up {other}: there is no run with a finished warm-up")
    theirs = read_run_config(other / "config.json")
    for name in config:
        known = name in MAY_CHANGE or name in AFTER_WARM_UP
        if not known and theirs.get(name) != config[name]:
            raise ValueError(
                f"--warm-up {other}: that run differs in {name.replace('_', '-')} "
                f"({theirs.get(name)!s:.20}, not {config[name]!s:.20}): leave --warm-up out"
            )


def copy_warm_up(other: Path, folder: Path) -> None:
    """Copy a finished warm-up with its log; whatever interrupts it, nothing is half copied."""
    lines = (other / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    warm_up = [line for line in lines if line.startswith('{"stage": "warm-up/')]
    write_text("".join(warm_up), folder / "log.jsonl")
    write_atomically(folder / "warm-up", lambda path: shutil.copytree(other / "warm-up", path))
    say(f"The warm-up is that of {other}")


def read_run_config(path: Path) -> dict:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict) or "base_weights" not in before:
        raise ValueError(
            f"{path} is damaged, or does not describe a run: choose another --out; to keep the "
            "finished stages, start the same command there, stop it, and copy its config.json here"
        )
    return before


def checksum(base: Path) -> str:
    """A checksum of the files that make up a checkpoint, independent of their folder's name."""
    digest = hashlib.sha256()
    for path in [base / "config.json", base / "spiece.model", *weight_files(base)]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of `write_atomically` that a killed run left behind."""
    for part in (*OURS, "config.json"):
        inside = (folder / part).rglob("*.unfinished-*")
        for leftover in [*folder.glob(f"{part}.unfinished-*"), *inside]:
            name = leftover.name.partition(".unfinished-")[0]
            if leftover.is_dir() and {inner.name for inner in leftover.iterdir()} <= {name}:
                shutil.rmtree(leftover)


def is_finished(path: Path) -> bool:
    """Whether a stage's result is there. Raises ValueError for a model that has lost its files."""
    if path.is_dir():
        for file in [path / "config.json", path / "spiece.model", path / BIN]:
            if not file.exists():
                raise ValueError(f"{file} is missing: delete {path} and run the same command again")
    return path.exists()


# --------------------------------------------------------------------------------------------- log


def log_record(path: Path, record: dict) -> None:
    """In process 0, print a record as one line and append it to log.jsonl."""
    say_record(record)
    if rank_and_count()[0] == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def drop_unfinished(folder: Path) -> None:
    """Remove the lines of unfinished stages from log.jsonl; they will be logged again."""
    path = folder / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            stage = json.loads(line)["stage"]
        except (ValueError, KeyError, TypeError, RecursionError):  # incomplete or foreign
            continue
        if (folder / str(stage)).exists():
            kept.append(line)
    write_text("".join(kept), path)
