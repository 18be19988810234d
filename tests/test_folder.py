"""A run's folder: no half-written file under a final name, no other run continued, no unrelated file touched."""

import json
import os
import shutil

import pytest

from data.folder import MAY_CHANGE, open_folder, remove_leftovers, write_atomically, write_text
from tests.conftest import ROOT

BASE = ROOT / "data" / "tiny"
NUMBERS = {"beta": 0.5, "rounds": 2, "device": "cpu", "out": "runs/x"}


def begin(folder, config, problems, base) -> None:
    """Start a run in a folder, and end it at once."""
    with open_folder(folder, config, problems, base):
        pass


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    """A full disk or Ctrl-C may lose the new text, but never the old."""
    write_text("old", tmp_path / "file")

    def fail(unfinished):
        unfinished.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", fail)
    monkeypatch.setattr(os, "replace", lambda *_: fail(tmp_path / "x"))
    with pytest.raises(type(error)):
        write_text("new", tmp_path / "file")
    (tmp_path / "x").unlink()
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_a_killed_process_left_goes_at_the_next_start_and_nothing_else(tmp_path):
    """SIGKILL during a save leaves a folder behind. The next start removes it, but no file or folder that
    this project did not make, whatever its name."""
    stage = tmp_path / "warm-up"
    ours = stage / "sft.unfinished-abc123"
    (ours / "sft").mkdir(parents=True)
    (ours / "sft" / "config.json").write_text("half")
    (stage / "sft.unfinished-notes").mkdir()
    for name in (
        "sft.unfinished-notes/mine.txt",
        "sft.unfinished",
        "sft.unfinished-plan",
        "sft.partial",
        "other",
    ):
        (stage / name).write_text("mine")
    (tmp_path / "mine.unfinished-x").mkdir()
    before = names(tmp_path)
    remove_leftovers(tmp_path)
    gone = {
        "warm-up/sft.unfinished-abc123",
        "warm-up/sft.unfinished-abc123/sft",
        "warm-up/sft.unfinished-abc123/sft/config.json",
    }
    assert set(names(tmp_path)) == set(before) - gone


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path):
    """Two runs would write into the same log and repeat each other's stages. A lock of the operating system
    ends with its process, so a killed run does not block its folder."""
    pytest.importorskip("fcntl")
    with open_folder(tmp_path, NUMBERS, "L", BASE):
        before = (tmp_path / "config.json").read_bytes()
        with pytest.raises(ValueError, match="another run is using .*--out"):
            begin(tmp_path, NUMBERS | {"rounds": 3}, "L", BASE)
        assert (tmp_path / "config.json").read_bytes() == before
    begin(tmp_path, NUMBERS, "L", BASE)


def test_other_numbers_problems_or_weights_are_refused_by_name(tmp_path):
    """A folder that mixed stages of two settings would be a result of neither."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    folder = tmp_path / "run"
    begin(folder, NUMBERS, "L", base)
    begin(folder, NUMBERS | {"beta": 7}, "L", base)  # the first start made nothing: no run to keep
    begin(folder, NUMBERS, "L", base)
    (folder / "warm-up").mkdir()
    with pytest.raises(ValueError, match="--beta 0.5.*--out"):
        begin(folder, NUMBERS | {"beta": 0.1}, "L", base)
    with pytest.raises(ValueError, match="other problems"):
        begin(folder, NUMBERS, "other L", base)
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"dropout_rate": 0.1}))
    with pytest.raises(ValueError, match="other base weights"):
        begin(folder, NUMBERS, "L", base)
    assert json.loads((folder / "config.json").read_text())["beta"] == 0.5


def test_the_same_weights_may_lie_elsewhere(tmp_path):
    """Weights are identified by content: a copy of the checkpoint in another folder is the same base."""
    shutil.copytree(BASE, tmp_path / "copy")
    begin(tmp_path / "run", NUMBERS, "L", BASE)
    begin(tmp_path / "run", NUMBERS, "L", tmp_path / "copy")


def test_more_rounds_and_other_limits_continue_a_run(tmp_path):
    """A user who is advised to lower a batch size must not have to start over."""
    begin(tmp_path, NUMBERS, "L", BASE)
    for name in MAY_CHANGE:
        begin(tmp_path, NUMBERS | {name: "" if name == "warm_up" else 7}, "L", BASE)


def test_files_that_stand_where_the_runs_would_are_not_taken_for_results(tmp_path):
    """A folder called warm-up that no run made is not a finished warm-up. Other files are allowed: a new
    disk has a lost+found."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path / ".", NUMBERS, "L", BASE)
    for name in ("warm-up", "log.jsonl"):
        folder = tmp_path / f"with {name}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"{name} was not made by a run.*--out"):
            begin(folder, NUMBERS, "L", BASE)
        assert names(folder) == [name]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null"])
def test_a_damaged_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged.*--out"):
        begin(tmp_path, NUMBERS, "L", BASE)


def test_the_log_forgets_what_was_not_finished(tmp_path):
    """A stage that is repeated is logged again: its lines must not appear twice. A line left incomplete by a
    killed process must not make the next start fail."""
    begin(tmp_path, NUMBERS, "L", BASE)
    (tmp_path / "warm-up").mkdir()
    (tmp_path / "warm-up" / "sft").mkdir()
    done = '{"stage": "warm-up/sft", "step": 1}\n'
    (tmp_path / "log.jsonl").write_text(
        done + '{"stage": "st/round-1/sft", "step": 1}\n{"stage": "st/rou'
    )
    begin(tmp_path, NUMBERS, "L", BASE)
    assert (tmp_path / "log.jsonl").read_text() == done


def test_a_first_start_that_fails_does_not_spoil_the_folder(tmp_path):
    """Weights that turn out to be damaged are mended and tried again: other base weights, but no result of the old
    ones. A folder that was made for a run that is then refused goes again."""
    begin(tmp_path / "run", NUMBERS, "L", BASE)
    begin(tmp_path / "run", NUMBERS, "other L", BASE)
    with pytest.raises(FileNotFoundError):
        begin(tmp_path / "refused", NUMBERS, "L", tmp_path / "no weights")
    assert not (tmp_path / "refused").exists()


def test_leftovers_beside_the_log_go_too(tmp_path):
    """The log, the results and config.json are written under temporary names as well."""
    for name in ("config.json", "log.jsonl", "results.md"):
        (tmp_path / f"{name}.unfinished-x1").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []
