"""The exercises: an empty function fails its grader with a helpful message, and plausible wrong answers also fail."""

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import exercise as exercise_module
from tests.conftest import ROOT
from tests.exercise import EXERCISES, copy, empty, prepare

# exercise, file, right, wrong: mistakes that a student could make, and that must not pass.
WRONG = {
    "off-by-one bucket": (1, "model.py", "(distance > 0) * n_buckets", "(distance >= 0) * n_buckets"),
    "forgotten EOS": (6, "tokenizer.py", "return ids + [EOS_ID]", "return ids"),
    "mean instead of sum": (8, "dpo.py", "labels).sum(-1)", "labels).mean(-1)"),
    "shifted labels": (6, "sft.py", "decode(shift_right(labels)", "decode(shift_right(shift_right(labels))"),
    "policy used as reference": (8, "dpo.py", "sequence_logps(reference, pairs)", "sequence_logps(policy, pairs)"),
    "deduplication that drops the gold": (9, "selftrain.py", "winning = deduplicate(gold + correct", "winning = deduplicate(correct + gold"),
    "dropout left on": (8, "dpo.py", "dropout=False", "dropout=True"),
    "cache written one column late": (3, "decode.py", "self.now = self.lengths.clamp", "self.now = (self.lengths + 1).clamp"),
    "calculator firing in the wrong row": (5, "decode.py", "self.queue: deque[int] = deque()", "self.queue = vars(tokenizer).setdefault('queue', deque())"),
    "pairs from unlabeled gold": (12, "data/problems.py", "gold = replace(problem, rationale=None)", "gold = problem"),
}  # fmt: skip


def grade(folder, exercise) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *shlex.split(exercise.tests),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def some(cases: list, slow: bool) -> list:
    """All of them with --slow; otherwise a few, to keep the suite short."""
    return cases if slow else cases[::8]


def test_every_emptied_function_fails_its_grader_and_says_whose_it_is(tmp_path, slow):
    """A grader that passes on an empty function grades nothing; a bare stack trace would not tell a student where to write."""

    def attempt(number: int) -> str:
        result = grade(tmp_path / str(number), EXERCISES[number - 1])
        return (
            ""
            if result.returncode == 1 and f"exercise {number}: " in result.stdout
            else f"{number}: {result.stdout[-2000:]}"
        )

    numbers = [number for number, exercise in enumerate(EXERCISES, 1) if exercise.empty]
    assert len(numbers) == 12 and len(EXERCISES) == 20
    # Before the threads start: in Python 3.11, two that parse source at once may raise SystemError (cpython #106905).
    chosen = some(numbers, slow)
    for number in chosen:
        prepare([number], tmp_path / str(number))
    with ThreadPoolExecutor(2) as pool:
        assert not any(failed := [*pool.map(attempt, chosen)]), failed


def test_every_wrong_answer_still_has_its_place():
    """If a line were rewritten, its wrong answer would not be tried until the next run with --slow."""
    counts = {
        name: (ROOT / file).read_text(encoding="utf-8").count(right)
        for name, (_, file, right, _) in WRONG.items()
    }
    assert set(counts.values()) == {1}, counts


def test_plausible_wrong_answers_do_not_pass(tmp_path, slow):
    """All ten must fail: this measures the tests. Each is a mistake that trains, runs, and gives slightly worse numbers."""

    def attempt(name: str) -> str:
        number, file, right, wrong = WRONG[name]
        folder = tmp_path / name.replace(" ", "-")
        copy(folder)
        source = (folder / file).read_text()
        assert source.count(right) == 1, (name, source.count(right))
        (folder / file).write_text(source.replace(right, wrong))
        result = grade(folder, EXERCISES[number - 1])
        return (
            ""
            if result.returncode == 1 and "failed" in result.stdout
            else f"{name}: {result.stdout[-2000:]}"
        )

    assert len(WRONG) == 10
    with ThreadPoolExecutor(2) as pool:
        assert not any(failed := [*pool.map(attempt, some(list(WRONG), slow))]), failed


def test_small_faults_do_not_pass(slow):
    """What a grader lets pass of faults made by rule, it would let pass of a student: at least 95 % must be caught. Two
    exercises by default; all twelve, with over 200 faults, with --slow."""
    command = [sys.executable, "-m", "tests.mutants", *([] if slow else ["2", "11"])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    caught, of = map(int, re.search(r"^(\d+) of (\d+) caught$", result.stdout, re.M).groups())
    assert result.returncode == 0 and caught >= 0.95 * of, result.stdout + result.stderr
    assert of >= (200 if slow else 7)


def test_graders_pass_on_the_project_itself(tmp_path, slow):
    """Every grader can be satisfied: all of them pass on an untouched copy."""
    if not slow:
        pytest.skip("the suite itself runs the same tests; with --slow they also run in a copy")
    copy(tmp_path / "copy")
    for exercise in EXERCISES:
        result = grade(tmp_path / "copy", exercise)
        assert result.returncode == 0, (exercise.title, result.stdout[-2000:])


def test_the_copy_holds_the_task_and_the_hint_only_if_asked(tmp_path):
    """The task must not scroll away with a terminal; a hint that stands below the task is read before thinking. One copy
    can hold the exercises of a whole course, none of them solved."""
    prepare([7, 10], tmp_path / "hw")
    task = (tmp_path / "hw" / "EXERCISE.md").read_text()
    for number in (7, 10):
        exercise = EXERCISES[number - 1]
        assert f"# Exercise {number}: {exercise.title}" in task
        for part in (exercise.read, exercise.tests, exercise.after, exercise.file):
            assert part in task
        assert exercise.hint not in task
        for target in exercise.empty:
            stub = f"exercise {number}: {target} is yours to write"
            assert stub in (tmp_path / "hw" / exercise.file).read_text()
    prepare([7], tmp_path / "hinted", with_hint=True)
    assert EXERCISES[6].hint in (tmp_path / "hinted" / "EXERCISE.md").read_text()


def test_a_copy_does_not_hold_its_own_solution(tmp_path):
    """Formulas in an emptied function's docstring, the comments of its examples, and the list of wrong answers with
    the right lines beside them would be copied, not understood."""
    prepare(list(range(1, 13)), tmp_path / "all")
    dpo = (tmp_path / "all" / "dpo.py").read_text()
    assert ">>> losses, chosen_rewards, rejected_rewards = dpo_loss(" in dpo  # the example stays
    assert "sigmoid" not in dpo and "(log pi(y|x) - log pi_ref(y|x))" not in dpo
    copied = {path.name for path in (tmp_path / "all").rglob("*.py")}
    assert "test_exercise.py" not in copied and "test_dpo.py" in copied


def test_only_the_body_goes():
    """The signature and docstring define the task. Nothing around the function may change."""
    source = (ROOT / "selftrain.py").read_text()
    for target in ("jaccard", "make_pairs", "self_train:if", "Experiment.sample"):
        emptied = empty(source, target, 1)
        compile(emptied, "selftrain.py", "exec")
        kept = [line for line in emptied.splitlines() if "NotImplementedError" not in line]
        lines = iter(source.splitlines())
        assert all(line in lines for line in kept) and len(kept) < len(
            source.splitlines()
        )  # in the same order, nothing new


def test_the_students_own_tree_is_never_touched(tmp_path):
    """The copy goes only to a new folder outside the project. It never overwrites a half-done exercise."""

    def run(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tests.exercise", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dpo.py").write_text("hours of work")
    for folder in (tmp_path / "mine", ROOT / "exercise"):
        result = run(7, folder)
        assert (
            result.returncode == 1
            and "name another folder" in result.stderr
            and "Traceback" not in result.stderr
        )
    assert (tmp_path / "mine" / "dpo.py").read_text() == "hours of work" and not (
        ROOT / "exercise"
    ).exists()
    result = run(7, "/dev/null/exercise")
    assert (
        result.returncode == 1
        and "name another folder" in result.stderr
        and "Traceback" not in result.stderr
    )
    result = run(7, tmp_path / "new folder")
    assert (
        result.returncode == 0
        and "tests/test_dpo.py" in result.stdout
        and (tmp_path / "new folder" / "dpo.py").exists()
    )
    assert len(run().stdout.splitlines()) == 20


def test_a_copy_holds_the_project_and_nothing_else(tmp_path, monkeypatch):
    """Environments of gigabytes, other people's runs and dangling links lie beside the code; copies of read-only
    files must be writable."""
    project = tmp_path / "project"
    copy(project)
    (project / "env311").mkdir()
    (project / "env311" / "huge.py").write_text("")
    (project / "my-run.jsonl").write_text("")
    (project / "gone").symlink_to(tmp_path / "nowhere")
    (project / "model.py").chmod(0o444)
    monkeypatch.setattr(exercise_module, "ROOT", project)
    copy(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"model.py", "README.md", "data", "tests", "pytest.ini", "LICENSE"} <= names
    assert not names & {"env311", "my-run.jsonl", "gone"}
    assert (tmp_path / "copy" / "model.py").stat().st_mode & 0o200
    assert (tmp_path / "copy" / "data" / "tiny" / "spiece.model").exists()
