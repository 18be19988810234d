"""A run's folder: what `sha256sums.txt` lists is finished and whole; anything else is half of something and does not count.

A file is written beside its place, moved into it, and then listed, so a run can be killed between any two instructions.
The list is in the order of making, and `sha256sum --check` reads it too. Not in it: `config.json`, which every start
compares with the command, `log.jsonl`, and what is made from the rest.
"""

import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path

from data.problems import write_text

SUMS = "sha256sums.txt"

class RunFolder:
    """The files of one run, to be found by name."""
    def __init__(self, path: Path):
        self.path = path

    def open(self, config: dict, may_change: Collection[str] = ()) -> None:
        """Start a run here, or continue one; no other process can until this one ends.

        Raises ValueError: another process is at work here, a file is damaged or gone, or the run has other numbers.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        sums, stored, elsewhere = self._sums(), self.path / "config.json", "put it back, or choose another --out"
        for name, checksum in sums.items():
            if not (self.path / name).is_file() or sha256(self.path / name) != checksum:
                raise ValueError(f"{self.path / name} is damaged or gone: put it back, or delete its line and all below it "
                                 f"from {SUMS}, and what those name is made again")  # fmt: skip
        if not (self.path / SUMS).exists() and any(path.is_dir() for path in self.path.iterdir()):
            raise ValueError(f"{self.path / SUMS} is gone: {elsewhere}")
        if sums and not stored.exists():
            raise ValueError(f"{stored} is gone: {elsewhere}")
        try:
            before = dict(json.loads(stored.read_bytes())) if stored.exists() else config
        except (ValueError, TypeError):
            raise ValueError(f"{stored} is damaged: {elsewhere}") from None
        names = [n for n in {**config, **before} if n not in may_change and (before.get(n) or 0) != (config.get(n) or 0)]  # 0: new
        if names:
            told = lambda n: "other problems" if "checksum" in n else f"--{n.replace('_', '-')} {before.get(n) or 'off'}"
            raise ValueError(f"{self.path} holds a run with {', '.join(map(told, names))}: repeat that, or choose another --out")
        write_text(json.dumps(config, indent=2) + "\n", stored)
        self._list(sums)
        for path in (*self.path.rglob("*.parts"), *self.path.rglob("*.step-*"), *self.path.rglob("*.partial")):  # of a kill
            if not self.find(path.relative_to(self.path).as_posix()):
                remove(path)
        log = self.path / "log.jsonl"
        if log.exists() and not (content := log.read_bytes()).endswith(b"\n"):  # killed in the middle of a line
            os.truncate(log, content.rfind(b"\n") + 1)

    def find(self, name: str) -> Path | None:
        """The path of the first finished file whose name begins so, None if there is none."""
        return next((self.path / found for found in self._sums() if found.startswith(name)), None)

    def write(self, name: str, make: Callable[[Path], None], replaces: str = "") -> None:
        """Let make(path) write a file or a folder, and list it. What begins with `replaces`, if given, goes."""
        path, partial = self.path / name, self.path / f"{name}.partial"
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (path, partial):  # of a run that was killed here
            remove(leftover)
        make(partial)
        new = {file.relative_to(partial): sha256(file) for file in sorted(partial.rglob("*")) or [partial]}
        os.replace(partial, path)
        old = tuple(filter(None, [name, replaces]))
        kept = {file: checksum for file, checksum in self._sums().items() if not file.startswith(old)}
        self._list(kept | {(Path(name) / file).as_posix(): checksum for file, checksum in new.items()})
        for leftover in self.path.glob(f"{replaces}*") if replaces else ():
            if leftover != path:
                remove(leftover)

    def log(self, record: dict) -> None:
        """Add a line to log.jsonl."""
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _lock(self) -> None:
        """SQLite's exclusive lock of a file works on every system, which lets go of it however the process ends."""
        try:
            self.lock = sqlite3.connect(self.path / "lock", timeout=0)
            self.lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise ValueError(f"another process is at work in {self.path}: wait for it, or choose another --out") from None
            raise OSError(f"{self.path} cannot be written to ({error}): choose another --out") from None

    def _sums(self) -> dict[str, str]:
        path, sums = self.path / SUMS, {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not (found := re.fullmatch(r"([0-9a-f]{64})  (\w[\w./-]*)", line, re.ASCII)):
                raise ValueError(f"{path}, line {number} is damaged: delete it and all below it, and what those name is made again")
            sums[found[2]] = found[1]
        return sums

    def _list(self, sums: dict[str, str]) -> None:
        write_text("".join(f"{checksum}  {name}\n" for name, checksum in sums.items()), self.path / SUMS)

def sha256(path: Path) -> str:
    """The checksum of a file that by then is on the disk, or a power cut might keep the list and lose the file."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
