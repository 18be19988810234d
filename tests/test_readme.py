"""The README is the project's one door: what it names exists, what it calls quick runs, what it lists is complete."""

import contextlib
import io
import re
import runpy
import shlex
import sys

import pytest

import run
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [path.name for path in sorted(ROOT.glob("*.py"))]


def quick_commands() -> list[str]:
    blocks = re.findall(r"^```sh quick\n(.*?)^```", README, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_every_file_shows_its_idea():
    """All eight are among the quick commands, so the next test covers each."""
    assert {word for line in quick_commands() for word in line.split() if word in MODULES} == set(MODULES)


@pytest.mark.parametrize("command", quick_commands())
def test_quick_commands_work_as_printed(command, monkeypatch):
    """A newcomer copies them. (In this process: a new one would only import torch again.)"""
    _, *words = shlex.split(command)
    said = io.StringIO()
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, words[-1], raising=False)  # a module that another test imported would run twice
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        try:
            run_module = words[0] == "-m"
            runpy.run_module(words[1], run_name="__main__") if run_module else runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code
    assert len(said.getvalue().splitlines()) >= 1 and "\033" not in said.getvalue()


def test_every_departure_is_listed():
    """Whoever compares with the paper reads the list, not the code: it must not go stale."""
    section = README.partition("## Departures")[2].partition("\n## ")[0]
    for name in MODULES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        found = sum("DIFFERS:" in line for line in lines)
        listed = set(re.findall(rf"`{name[:-3]}\.(\w+)`", section))
        assert len(listed) >= found, f"{name} has {found} departures, the README lists {listed}"
        for function in listed:
            assert re.search(rf"^(def|class) {function}\b|^{function} =", "\n".join(lines), re.M), function


def test_what_the_tables_name_exists():
    """Functions and tests are renamed; a table that still has the old names sends its reader nowhere."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]}
    rows = re.findall(r"^\|[^|]*\| `(\w+\.py)` \| (.*?) \|", README, re.M)
    assert {file for file, _ in rows} == set(MODULES)
    for file, functions in rows:
        for name in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^\s*(def|class) {name}\b", sources[file], re.M), f"{file} has no {name}"
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"tests\.bench\.(\w+)", README):
        assert (ROOT / "tests" / "bench" / f"{name}.py").exists(), name
    for path in re.findall(r"\]\(((?:tests|data)/[\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_flag_in_the_readme_exists():
    """A flag that was renamed is copied from here for years."""
    known = {"--" + option.name.replace("_", "-") for option in run.OPTIONS}
    for path in [ROOT / "run.py", ROOT / "decode.py", *(ROOT / "tests").rglob("*.py")]:
        known |= set(re.findall(r"--[\w-]+", path.read_text(encoding="utf-8")))
    torchrun = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help"}
    assert (unknown := set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) - known - torchrun) == set(), unknown


def test_the_size_budget_holds():
    """Minimal is the first word: eight files that can be read in an afternoon."""
    assert len(MODULES) == 8
    assert sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in MODULES) <= 1700
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "data").glob("*.py")) < 500
