"""A run's folder: what is listed is whole, whatever is killed, damaged or started twice in between."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from data.folder import SUMS, RunFolder, sha256

CONFIG = {"size": "tiny", "beta": 0.1, "rounds": 2}


def text(content: str):
    """A maker for RunFolder.write: one file."""
    return lambda path: path.write_text(content)


def folder_of(content: dict[str, str]):
    """A maker for RunFolder.write: a folder of files."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, words in content.items():
            (path / name).write_text(words)

    return make


def opened(path: Path, config: dict = CONFIG) -> RunFolder:
    folder = RunFolder(path)
    folder.open(config, may_change=("rounds",))
    return folder


def close(folder: RunFolder) -> None:
    folder.lock.close()  # as the end of the process would


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with a model, rows, and a log."""
    folder = opened(tmp_path / "run")
    folder.write("warm-up/sft", folder_of({"config.json": "{}", "pytorch_model.bin": "weights"}))
    folder.write("warm-up/evaluation.jsonl", text('{"a": 1}\n'))
    folder.log({"stage": "warm-up", "step": 1})
    close(folder)
    return tmp_path / "run"


def test_what_is_written_is_found_again_by_name(run):
    """A stage asks for its result by name; half a name must not pass for a whole one where the caller adds a slash or dot."""
    folder = opened(run)
    assert folder.find("warm-up/sft/") == run / "warm-up/sft/config.json"
    assert folder.find("warm-up/evaluation.jsonl").read_text() == '{"a": 1}\n'
    assert folder.find("warm-up/sft.step-") is None and folder.find("st/") is None


def test_the_list_is_one_that_public_tools_check(run):
    """sha256sum --check is older than this project, and what people reach for when they doubt a disk."""
    assert [line.split("  ")[1] for line in (run / SUMS).read_text().splitlines()] == [
        "warm-up/sft/config.json", "warm-up/sft/pytorch_model.bin", "warm-up/evaluation.jsonl"
    ]  # fmt: skip
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=run, check=True)


def test_what_was_not_listed_does_not_count(run):
    """Killed before the list was written: the file lies there whole, or half, and is made again."""
    (run / "st").mkdir()
    (run / "st/pseudo-labels.jsonl").write_text("half a li")
    (run / "st/pseudo-labels.jsonl.partial").write_text("half a li")
    folder = opened(run)
    assert folder.find("st/pseudo-labels.jsonl") is None
    folder.write("st/pseudo-labels.jsonl", text("whole\n"))
    assert folder.find("st/pseudo-labels.jsonl").read_text() == "whole\n" and not list(run.rglob("*.partial"))


def test_a_maker_that_fails_leaves_everything_as_it_was(run):
    """Disk full, Ctrl-C: what was finished stays listed, and the failed file is not."""
    before = (run / SUMS).read_bytes()
    folder = opened(run)

    def fail(path: Path) -> None:
        path.write_text("half a fi")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.write("warm-up/sft.step-5.pt", fail, replaces="warm-up/sft.step-")
    close(folder)
    assert (run / SUMS).read_bytes() == before and opened(run).find("warm-up/sft.step-") is None


def test_the_newest_progress_takes_the_place_of_the_older_ones(run):
    """Three gigabytes every ten minutes would fill any disk; and two states would leave open which one counts."""
    folder = opened(run)
    for step in (9, 10, 11):
        folder.write(f"st/sft.step-{step}.pt", text(f"state {step}"), replaces="st/sft.step-")
        assert folder.find("st/sft.step-").read_text() == f"state {step}"
        assert [path.name for path in (run / "st").iterdir()] == [f"sft.step-{step}.pt"]
    (run / "st/sft.step-3.pt").write_text("of a run that was killed between list and removal")
    folder.write("st/sft", folder_of({"config.json": "{}"}), replaces="st/sft.step-")
    assert sorted(path.name for path in (run / "st").iterdir()) == ["sft"] and folder.find("st/sft.step-") is None
    assert folder.find("warm-up/sft/")  # another stage's model of a like name is left alone


def test_a_line_cut_short_by_a_kill_is_dropped_from_the_log(run):
    """The next line would be glued to it, and the figures are drawn from this file."""
    with open(run / "log.jsonl", "a") as file:
        file.write('{"stage": "warm-up", "st')
    folder = opened(run)
    folder.log({"stage": "next"})
    assert (run / "log.jsonl").read_text() == '{"stage": "warm-up", "step": 1}\n{"stage": "next"}\n'


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(path: Path, config: dict = CONFIG) -> str:
    folder = RunFolder(path)
    with pytest.raises(ValueError) as refused:
        folder.open(config, may_change=("rounds",))
    close(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


LISTED = ["warm-up/sft/config.json", "warm-up/sft/pytorch_model.bin", "warm-up/evaluation.jsonl"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "append"])
@pytest.mark.parametrize("name", LISTED)
def test_a_damaged_file_is_named_with_what_to_do(run, name, damage):
    """A run goes on for days on what it finds here: training on rotten samples would show in no log."""
    content = bytearray((run / name).read_bytes())
    content[0] ^= damage == "flip"
    (run / name).write_bytes(content[: -1 if damage == "truncate" else None] + b"\n" * (damage == "append"))
    if damage == "delete":
        (run / name).unlink()
    assert name in (words := refusal(run)) and SUMS in words
    # The advice is good: without that line and those below it, what they name is made again.
    lines = (run / SUMS).read_text().splitlines(keepends=True)
    (run / SUMS).write_text("".join(lines[: LISTED.index(name)]))
    assert opened(run).find(name) is None


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_to_the_list_or_the_numbers_is_refused_or_harmless(run, seed):
    """One flipped bit, a cut, a missing file: the next start must refuse, or find nothing that was not there before."""
    rng = random.Random(seed)
    victim = run / rng.choice([SUMS, "config.json"])
    content = bytearray(victim.read_bytes())
    damage, at = rng.choice(["flip", "truncate", "delete"]), rng.randrange(len(content))
    if damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[:at])
    else:
        content[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    folder = RunFolder(run)
    try:
        folder.open(CONFIG, may_change=("rounds",))
    except ValueError as refused:
        assert str(run) in str(refused) and "\n" not in str(refused)
        return
    assert victim.name == SUMS or b'"rounds": 2' in victim.read_bytes()  # the only number that may change; now as wanted
    assert all(folder.find(name) in (None, run / name) for name in LISTED)


def test_the_list_cannot_vanish_unseen(run):
    """Without it everything would look unfinished, and days of work would be written over."""
    (run / SUMS).unlink()
    assert SUMS in refusal(run) and (run / "warm-up/evaluation.jsonl").exists()


def test_other_numbers_are_refused_and_all_of_them_listed(run):
    """Stages of two settings in one folder are a result of neither. What only costs memory or adds rounds may change."""
    words = refusal(run, CONFIG | {"beta": 0.3, "size": "small"})
    assert "--beta 0.1" in words and "--size tiny" in words and "--rounds" not in words
    assert opened(run, CONFIG | {"rounds": 3}).find(LISTED[0])


def test_a_flag_that_an_older_version_did_not_know_was_off(run):
    """A newer version must go on with an older one's folder, unless the new flag is given."""
    close(opened(run, {**CONFIG, "new_flag": False, "new_limit": 0, "new_name": ""}))
    assert "--new-flag off" in refusal(run, {**CONFIG, "new_flag": True})


def test_a_second_process_is_refused_until_the_first_one_ends(run):
    """Two runs would write one file by turns. The lock must go with the process, be it killed, or a night is lost to it."""
    hold = f"from data.folder import RunFolder; from pathlib import Path; f = RunFolder(Path({str(run)!r}))\n"
    hold += f"f.open({CONFIG!r}); print('open', flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "open\n"
    assert "another process" in refusal(run)
    first.kill()
    first.wait()
    first.stdin.close(), first.stdout.close()
    assert opened(run).find(LISTED[0])


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    """A full or foreign disk is not a bug of the reader's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:
        opened(tmp_path / "file/run")
    assert "\n" not in str(refused.value)


def test_the_checksum_is_the_files(tmp_path):
    """Against the value in the standard's own example."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_leftovers_of_a_kill_are_cleared_away(run):
    """Killed between the list and the removal, a step of 12 bytes per parameter would lie there for ever."""
    folder = opened(run)
    folder.write("sft.step-2.pt", lambda path: path.write_text("newest"))
    for name in ("sft.step-1.pt", "samples.parts/0000.jsonl", "deep/er/model.partial/weights"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    folder.write("kept.parts/0000.jsonl", lambda path: path.write_text("whole"))
    close(folder)
    opened(run)
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"sft.step-2.pt", "kept.parts/0000.jsonl"} <= left
    assert not any(word in name for name in left for word in ("step-1", "samples.parts", "partial"))


def test_a_lock_that_is_none_is_one_sentence(tmp_path):
    """Something else may have that name; SQLite's own word for it is a traceback."""
    (tmp_path / "lock").write_text("not a database " * 100)
    with pytest.raises(OSError, match="another --out"):
        RunFolder(tmp_path).open({})
