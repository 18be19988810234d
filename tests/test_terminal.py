"""What a person sees while run.py works: on a terminal only complete lines remain on the screen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

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


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_of_a_run_holds_complete_lines_only(columns, tmp_path):
    """Progress bars and logged lines share a terminal: a line written into an open bar loses its
    beginning, and a bar that stays leaves rubbish between the lines."""
    command = [sys.executable, "run.py", *SHORT, "--out"]
    on_screen = screen_of([*command, str(tmp_path / "screen")], columns)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    in_file = subprocess.run(
        [*command, str(tmp_path / "file.")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    for name, lines in (("screen", on_screen), ("file.", in_file)):
        [timed] = [line for line in lines if "ask the last model" in line]
        lines.remove(timed)  # it says how many seconds the run took
        lines[:] = [re.sub(", [0-9]+ s left$", "", line) for line in lines]
        lines[:] = [line.replace(str(tmp_path / name), "OUT") for line in lines]
    assert on_screen == in_file
