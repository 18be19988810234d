"""What a person sees while run.py works: on a terminal only complete lines remain on the screen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHORT = "--rounds 1 --limit 24 --sft-epochs 12 --dpo-steps 3 --max-new-tokens 60".split()


def screen_of(command: list[str], columns: int) -> list[str]:
    """Run a command in a pseudo-terminal; return the lines that remain on its screen."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(command[0], command)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux: the command has ended
            break
        if not part:
            break
        written += part
    _, status = os.waitpid(process, 0)
    assert status == 0, written[-2000:]
    return draw(written.decode())


def draw(text: str) -> list[str]:
    """What a terminal shows of a text: a carriage return goes back, and what follows overwrites.

    >>> draw("50 %\\rdone\\nnext\\n")
    ['done', 'next', '']
    """
    lines = [""]
    column = 0
    for sign in text:
        if sign == "\n":
            lines.append("")
            column = 0
        elif sign == "\r":
            column = 0
        else:
            assert sign.isprintable(), f"{sign!r}: draw does not know this control character"
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + sign + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def without_times(lines: list[str], out: Path) -> list[str]:
    """A run's lines without seconds and its folder's name."""
    [timed] = [line for line in lines if " s. Tables and figures" in line]
    lines.remove(timed)  # it says how many seconds the run took
    lines = [re.sub(", [0-9]+ s left$", "", line) for line in lines]
    return [line.replace(str(out), "OUT") for line in lines]


@pytest.fixture(scope="module")
def in_file(tmp_path_factory) -> list[str]:
    """What the run writes to a file."""
    out = tmp_path_factory.mktemp("in-file") / "run"
    command = [sys.executable, "run.py", *SHORT, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return without_times(result.stdout.split("\n"), out)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_of_a_run_holds_complete_lines_only(columns, in_file, tmp_path):
    """Progress bars and logged lines share a terminal: a line written into an open bar loses its
    beginning, and a bar that stays leaves rubbish between the lines."""
    command = [sys.executable, "run.py", *SHORT, "--out", str(tmp_path / "run")]
    on_screen = without_times(screen_of(command, columns), tmp_path / "run")
    assert on_screen == in_file
