"""What people's machines, files and command lines do to a run: it works, or says in one sentence what is wrong."""

import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT
from test_processes import start
from test_run import command, hashes, main_in_this_process

import run
from data.problems import Problem, read_jsonl, write_jsonl

BRIEF = "--limit 2 --rounds 1 --sft-epochs 1 --dpo-steps 1 --max-new-tokens 20".split()
SUM = Problem("How many are 2 + 4?", 6.0, "2 + 4 = <<2+4=6>>6\n#### 6")
NAMES = Problem(
    "Ana is taller than Ben. Who is taller?", "Ana", "Ana is taller than Ben.\n#### Ana"
)


def shell(text: str) -> subprocess.CompletedProcess:
    """A line of bash, in which {python} stands for this Python."""
    line = text.format(python=sys.executable)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)


def write_problems(path, problems) -> str:
    write_jsonl(map(asdict, problems), path)
    return str(path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of a brief run on a machine with nothing odd about it."""
    out = tmp_path_factory.mktemp("usual") / "run"
    result = command(*BRIEF, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


# ------------------------------------------------------------------------------ standard streams


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_standard_stream(closed, usual, tmp_path):
    """Schedulers and services start programs with streams closed; the next file that is opened then has their number."""
    result = shell(f"{{python}} run.py {' '.join(BRIEF)} --out '{tmp_path}/run' {closed}")
    assert result.returncode == 0, result.stderr
    ours, theirs = hashes(tmp_path / "run"), hashes(usual)
    assert {name for name in ours if ours[name] != theirs[name]} == {"config.json"}  # its --out


def test_answers_need_no_standard_input_and_no_reader():
    """`decode.py` in a pipeline: input closed, output read for one line only, or not at all."""
    result = shell("{python} decode.py 'Tom has 3 pens. He buys 4 more. How many now?' <&- 2>&-")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    result = shell("{python} decode.py 'Tom has 3 pens.' 'Ida has 2.' 'Ben has 1.' | true")
    assert result.returncode == 0 and result.stderr == ""


def test_a_reader_who_leaves_is_told_how_to_go_on(tmp_path):
    """`run.py | head -1` looks harmless; the run ends at its next line, and keeps what was finished."""
    result = shell(f"{{python}} run.py {' '.join(BRIEF)} --out '{tmp_path}/run' | head -1")
    assert result.stderr.startswith("run.py: stopped, for nobody reads")
    assert command(*BRIEF, "--out", tmp_path / "run").returncode == 0


# -------------------------------------------------------------------------------------- own files


def test_problems_come_from_pipes_too(tmp_path):
    """`--labeled <(head -100 all.jsonl)` is how people cut a file."""
    problems = write_problems(tmp_path / "l.jsonl", [SUM])
    tests = write_problems(tmp_path / "t.jsonl", [Problem("How many are 1 + 2?", 3.0)])
    result = shell(
        f"{{python}} run.py {' '.join(BRIEF)} --labeled <(cat '{problems}') "
        f"--test sums=<(cat '{tests}') --out '{tmp_path}/run'"
    )
    assert result.returncode == 0, result.stderr
    assert len(read_jsonl(tmp_path / "run" / "warm-up" / "evaluation.jsonl")) == 1


@pytest.mark.parametrize("answer", ["Łukasz", "Ana ☃", "A × B"])
@pytest.mark.parametrize("place", ["labeled", "unlabeled", "test"])
def test_answers_that_the_vocabulary_cannot_spell_are_refused(answer, place, tmp_path):
    """No model could write them, so such a problem would be wrong for ever without a word."""
    problems = {"labeled": NAMES, "unlabeled": NAMES, "test": Problem("Who is tall?", "Ana")}
    rationale = f"Ana is taller.\n#### {answer}" if place == "labeled" else None
    problems[place] = Problem(f"The {place} one: who?", answer, rationale)
    files = {name: write_problems(tmp_path / name, [item]) for name, item in problems.items()}
    code, said = main_in_this_process(
        *BRIEF, "--labeled", files["labeled"], "--unlabeled", files["unlabeled"],
        "--test", f"t={files['test']}", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 2 and "the vocabulary lacks signs of the answer" in said
    assert not (tmp_path / "run").exists()


def test_a_runs_folder_given_as_a_model_is_named(usual):
    """The folder that a run prints first is the run's; models lie within."""
    result = shell(f"{{python}} decode.py --checkpoint '{usual}' 'Tom has 3 pens.'")
    assert result.returncode != 0 and "is a run: give a model in it" in result.stderr


# ------------------------------------------------------------------------------ several processes


def test_more_processes_than_work(usual, tmp_path):
    """Two problems, four processes: those without a share join every exchange all the same."""
    process = start(4, "run.py", *BRIEF, "--out", tmp_path / "four")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    four, one = (
        read_jsonl(place / "warm-up/evaluation.jsonl") for place in (tmp_path / "four", usual)
    )
    assert [row["question"] for row in four] == [row["question"] for row in one]


# ---------------------------------------------------------------------------- the command line


def test_any_command_line_ends_in_success_or_in_one_sentence(tmp_path, monkeypatch, slow):
    """Random flags with random values, sensible and not; 60 of them, with --slow 2,000. A traceback would be raised here."""
    monkeypatch.setenv("DPO_ST_GITHUB", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("DPO_ST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sums = write_problems(tmp_path / "sums", [SUM])
    new = write_problems(tmp_path / "new", [Problem("How many are 1 + 2?", 3.0)])
    names = write_problems(tmp_path / "names", [NAMES])
    (tmp_path / "broken").write_text("{\n")
    files = [sums, new, names, "broken", "missing", ".", "", f"a={new}", f"a=b={new}", "a=", "=a"]
    numbers = [
        "0",
        "1",
        "2",
        "3",
        "0.5",
        "1e-3",
        "-1",
        "nan",
        "inf",
        "1e999",
        "x",
        "",
        " 2",
        "9" * 40,
    ]
    names_of_files = {"labeled", "unlabeled", "test", "weights", "out"}
    rng = random.Random(0)
    actions = [action for action in run.make_parser()._actions if action.dest != "help"]
    ends = {0: 0, 2: 0}
    for number in range(2000 if slow else 60):
        arguments = []
        for action in rng.choices(actions, k=rng.choice((1, 1, 2, 3, 6))):
            arguments.append(action.option_strings[0])
            if action.nargs != 0:
                pool = files if action.dest in names_of_files else numbers
                pool = pool + list(action.choices or ())
                if action.dest == "weights":
                    pool = pool + [str(ROOT / "data" / "tiny")]
                arguments.append(rng.choice(pool))
        if rng.random() < 0.9:
            arguments += ["--out", f"run-{number}"]
        if rng.random() < 0.3:
            arguments += ["--labeled", sums, "--test", f"sums={new}"]
        arguments += "--limit 2 --rounds 1 --sft-epochs 1 --dpo-steps 1 --max-new-tokens 3".split()
        code, said = main_in_this_process(*arguments)
        assert code in (0, 2), (arguments, code, said)
        if code == 2:
            sentence = said.splitlines()[-1]
            assert sentence.startswith("run.py: ") and len(sentence) > 20, (arguments, said)
        assert "Traceback" not in said, (arguments, said)
        ends[code] += 1
    print(f"{ends[0]} ended well, {ends[2]} in a sentence")
    assert min(ends.values()) > 0
    torch.set_num_threads(1)
