"""Readers start with the READMEs: every name in them exists, quick commands run, and lists are complete."""

import contextlib
import io
import re
import runpy
import shlex
import sys

import pytest

import run
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOORS = {
    name: (ROOT / name / "README.md").read_text(encoding="utf-8")
    for name in (".", "data", "tests", "tests/bench")
}
for path in (ROOT / "tests").glob("teaching.md"):  # not in the copies of exercises
    DOORS["tests"] += path.read_text(encoding="utf-8")
MODULES = [path.name for path in sorted(ROOT.glob("*.py"))]
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}


def quick_commands() -> list[str]:
    blocks = re.findall(r"^```sh quick\n(.*?)^```", README, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_the_top_level_is_the_users_list():
    """The project is minimal: eight files, data, tests, and no other place for code."""
    names = "calculator decode dpo model run selftrain sft tokenizer"
    assert MODULES == [f"{name}.py" for name in names.split()]


def test_every_file_shows_its_idea():
    """All eight files are among the quick commands, so the next test runs each."""
    words = {word for line in quick_commands() for word in line.split()}
    assert set(MODULES) <= words


@pytest.mark.parametrize("command", quick_commands())
def test_quick_commands_work_as_printed(command, monkeypatch):
    """Newcomers copy them. (They run in this process: a new one would only import torch again.)"""
    _, *words = shlex.split(command)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, words[-1], raising=False)  # or a module would run twice
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code
    said.seek(0)
    assert len(said.read().splitlines()) >= 1


def test_every_departure_is_listed():
    """Readers who compare with the paper read the list, not the code: it must not go stale."""
    section = README.partition("## Departures")[2].partition("\n## ")[0]
    for name, source in SOURCES.items():
        found = source.count("DIFFERS:")
        listed = set(re.findall(rf"`{name[:-3]}\.(\w+)`", section))
        assert len(listed) == found, f"{name} has {found} departures, the README lists {listed}"
        for function in listed:
            assert re.search(rf"^(def|class) {function}\b|^{function} =", source, re.M), function


def test_what_the_tables_name_exists():
    """Functions and tests get renamed; a table with the old names would mislead its reader."""
    named = re.findall(r"`(\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", README)
    assert {"selftrain.py", "sft.py", "dpo.py", "decode.py", "calculator.py"} <= {
        f for f, _ in named
    }
    for file, functions in named:
        for name in re.findall(r"[\w.]+", functions):
            last = name.rpartition(".")[2]
            assert re.search(rf"^\s*(def|class) {last}\b", SOURCES[file], re.M), f"{file}: {name}"
    paths = [*(ROOT / "tests").glob("test_*.py")]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    for text in DOORS.values():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, name
        for name in re.findall(r"tests\.bench\.(\w+)", text):
            assert (ROOT / "tests" / "bench" / f"{name}.py").exists(), name


def test_what_the_doors_link_to_exists():
    """Links break when files move."""
    for folder, text in DOORS.items():
        for path in re.findall(r"\]\(([\w/.-]+)\)", text):
            assert (ROOT / folder / path).exists(), (folder, path)


def test_every_flag_in_the_readmes_exists():
    """After a flag is renamed, readers would keep copying the old name from here."""
    known = {"--help", "--index-url", "--nproc-per-node", "--slow"}
    for action in run.make_parser()._actions:
        known |= set(action.option_strings)
    commands = [ROOT / "decode.py", ROOT / "tests" / "exercise.py"]
    for path in [*commands, *(ROOT / "tests" / "bench").glob("*.py")]:
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for folder, text in DOORS.items():
        text = re.sub("^#SBATCH.*", "", text, flags=re.M)  # SLURM's
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known, folder
