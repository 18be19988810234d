"""Grading a class: `python -m tests.exercise 7 --grade FOLDER`, with files that students hand in, good and bad."""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import grading
from tests.conftest import ROOT
from tests.exercise import EXERCISES, empty, prepare
from tests.grading import exercises_of, grade_folder, grade_one, handed_in

HANDED_IN = {  # dpo.py of each student
    "ada": "",
    "cleo": "while True: pass",
    "dan": "import os; os._exit(0)",
    "eve": "while True: print('x' * 10**6)",
    "finn": "bytearray(10**12)",
    "gus": "def dpo_loss(:",
    "hal": "from pathlib import Path; Path('../../outside').write_text(''); Path.home().joinpath('home').touch()",
}


def hand_in(folder: Path, name: str, line: str) -> Path:
    student = folder / name
    student.mkdir(parents=True)
    source = (ROOT / "dpo.py").read_text(encoding="utf-8")
    place = source.index("\nimport copy")
    (student / "dpo.py").write_text(f"{source[:place]}\n{line}{source[place:]}", encoding="utf-8")
    return student


@pytest.mark.skipif(sys.platform == "win32", reason="limits need POSIX")
def test_code_that_hangs_or_ends_or_floods_costs_only_itself(tmp_path, monkeypatch, capsys):
    """A teacher grades thirty copies at once, unread. One that never ends, ends the process, prints without end or takes
    all memory must leave the others' grades alone, and each is told why in one line."""
    monkeypatch.setattr(grading, "SECONDS", 12)
    for name, line in HANDED_IN.items():
        hand_in(tmp_path, name, line)
    (tmp_path / "=1+1").mkdir()
    began = time.monotonic()
    grade_folder(tmp_path, [7])
    assert time.monotonic() - began < 240
    with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(HANDED_IN) + 1
    whole = rows["ada"]["of"]
    assert int(whole) >= 4
    for name in ("ada", "hal"):
        assert (rows[name]["passed"], rows[name]["of"], rows[name]["first failure"]) == (
            whole,
            whole,
            "",
        )
    reasons = {"cleo": "not finished after 12 s", "dan": "ended before", "finn": "MemoryError", "gus": "SyntaxError", "eve": "", "'=1+1": "dpo.py is not there"}  # fmt: skip
    for name, reason in reasons.items():
        assert rows[name]["passed"] == "0" and reason in rows[name]["first failure"], rows[name]
        assert rows[name]["first failure"] and "\n" not in rows[name]["first failure"]
    assert not (tmp_path / "outside").exists() and not (Path.home() / "home").exists()
    assert f"2 of {len(rows)} solved" in capsys.readouterr().out


def test_the_teachers_tests_count_not_the_students(tmp_path):
    """Whoever changes a test until it passes has solved nothing. The rest of the project is the teacher's, too."""
    prepare([7], tmp_path / "ben")
    for path in (tmp_path / "ben" / "tests").glob("*.py"):
        path.write_text("def test_nothing():\n    pass\n")
    (tmp_path / "ben" / "conftest.py").write_text("raise SystemExit(0)")
    grade = grade_one(tmp_path / "ben", 7)
    assert grade.passed == 0 and grade.of >= 4
    assert "exercise 7: dpo_loss is yours to write" in grade.first_failure


def test_one_exercise_of_a_copy_is_graded_while_another_is_still_empty(tmp_path):
    """In one copy with exercises 9 and 10 the pairs need the deduplication. Whoever has written the pairs alone gets their points."""
    prepare([9, 10], tmp_path / "ivy")
    path = tmp_path / "ivy" / "selftrain.py"
    source = (ROOT / "selftrain.py").read_text(encoding="utf-8")
    for target in EXERCISES[8].empty:
        source = empty(source, target, 9)
    path.write_text(
        source, encoding="utf-8"
    )  # make_pairs is there, jaccard and deduplicate are not
    assert exercises_of(tmp_path / "ivy") == [9, 10]
    assert grade_one(tmp_path / "ivy", 9).passed == 0
    grade = grade_one(tmp_path / "ivy", 10)
    assert grade.passed == grade.of >= 5, grade


def test_files_are_found_alone_in_a_copy_and_one_folder_down(tmp_path):
    """Students hand in dpo.py, or their copy, or a zip that unpacks to a folder; links could point at the teacher's own files."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "dpo.py").write_text("")
    (tmp_path / "zipped" / "my-dpo" / "data").mkdir(parents=True)
    (tmp_path / "zipped" / "my-dpo" / "dpo.py").write_text("")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "dpo.py").symlink_to(ROOT / "dpo.py")
    found = {path.name: list(handed_in(path)) for path in tmp_path.iterdir()}
    assert found == {"alone": ["dpo.py"], "zipped": ["dpo.py"], "link": []}


def test_what_cannot_be_graded_is_said_in_one_sentence(tmp_path):
    """A wrong number or folder is the likeliest mistake of all; open exercises have no tests of their own."""

    def run(*words) -> str:
        command = [sys.executable, "-m", "tests.exercise", *map(str, words)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    assert "no exercise 99" in run(99, "--grade", tmp_path)
    assert "exercise 13 is open" in run(13, "--grade", tmp_path)
    assert "is no folder" in run(7, "--grade", tmp_path / "nowhere")
    assert "name its number first" in run(tmp_path / "my-dpo")
    (tmp_path / "zoe").mkdir()
    shutil.copy(ROOT / "dpo.py", tmp_path / "zoe")
    assert "give its number before --grade" in run("--grade", tmp_path)
