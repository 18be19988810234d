"""On any machine, with any files and command line, a run works or says in one sentence what is wrong."""

import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import decode
import run
from data.problems import Problem, check_leakage, read_jsonl, write_jsonl
from data.results import make_table, read_evaluations
from selftrain import is_correct
from tests.bench.report import measure
from tests.conftest import ROOT, hear_ctrl_c
from tests.test_processes import start
from tests.test_run import command, hashes, main_in_this_process
from tokenizer import Tokenizer

BRIEF = "--limit 2 --rounds 1 --sft-epochs 1 --dpo-steps 1 --max-new-tokens 20".split()
SUM = Problem("How many are 2 + 4?", 6.0, "2 + 4 = <<2+4=6>>6\n#### 6")
NEW = Problem("How many are 1 + 2?", 3.0)
NAMES = Problem(
    "Ana is taller than Ben. Who is taller?", "Ana", "Ana is taller than Ben.\n#### Ana"
)


def shell(text: str) -> subprocess.CompletedProcess:
    """Run a line of bash in which {python} is this Python."""
    line = text.format(python=sys.executable)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)


def write_problems(path, problems) -> str:
    write_jsonl(map(asdict, problems), path)
    return str(path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of a short run under normal conditions."""
    out = tmp_path_factory.mktemp("usual") / "run"
    result = command(*BRIEF, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def test_an_answer_waits_for_no_compiler():
    """A single question to decode.py waits only for the imports: torch's compiler would double their time."""
    question = "import sys, decode; decode.main(); assert 'torch._dynamo' not in sys.modules"
    result = shell(f'{{python}} -c "{question}" "How many are 2 + 4?"')
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------ standard streams


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_standard_stream(closed, usual, tmp_path):
    """Schedulers and services start programs with closed streams; the next files opened then get their
    numbers."""
    result = shell(f"{{python}} run.py {' '.join(BRIEF)} --out '{tmp_path}/run' {closed}")
    assert result.returncode == 0, result.stderr
    ours, theirs = hashes(tmp_path / "run"), hashes(usual)
    assert {name for name in ours if ours[name] != theirs[name]} == {"config.json"}  # has --out


def test_answers_need_no_standard_input_and_no_reader():
    """`decode.py` in a pipeline: with standard input closed, or with output that is not read."""
    result = shell("{python} decode.py 'Tom has 3 pens. He buys 4 more. How many now?' <&- 2>&-")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    result = shell("{python} decode.py 'Tom has 3 pens.' 'Ida has 2.' 'Ben has 1.' | true")
    assert result.returncode == 0 and result.stderr == ""


def test_a_reader_who_leaves_is_told_how_to_go_on(tmp_path):
    """`run.py | head -1` looks harmless; the run stops at its next line and keeps its finished stages."""
    result = shell(f"{{python}} run.py {' '.join(BRIEF)} --out '{tmp_path}/run' | head -1")
    assert result.stderr.startswith("run.py: the output pipe was closed")
    assert command(*BRIEF, "--out", tmp_path / "run").returncode == 0


# -------------------------------------------------------------------------------------- own files


def test_problems_come_from_pipes_too(tmp_path):
    """`--labeled <(head -100 all.jsonl)` is how people use part of a file."""
    problems = write_problems(tmp_path / "l.jsonl", [SUM])
    tests = write_problems(tmp_path / "t.jsonl", [NEW])
    result = shell(
        f"{{python}} run.py {' '.join(BRIEF)} --labeled <(cat '{problems}') "
        f"--test sums=<(cat '{tests}') --out '{tmp_path}/run'"
    )
    assert result.returncode == 0, result.stderr
    assert len(read_jsonl(tmp_path / "run" / "warm-up" / "evaluation.jsonl")) == 1


@pytest.mark.parametrize("answer", ["Łukasz", "Ana ☃", "A × B"])
@pytest.mark.parametrize("place", ["labeled", "unlabeled", "test"])
def test_answers_that_the_vocabulary_cannot_spell_are_refused(answer, place, tmp_path):
    """No model could write them, so such a problem would silently be wrong forever."""
    problems = {"labeled": NAMES, "unlabeled": NAMES, "test": Problem("Who is tall?", "Ana")}
    rationale = f"Ana is taller.\n#### {answer}" if place == "labeled" else None
    problems[place] = Problem(f"The {place} one: who?", answer, rationale)
    files = {name: write_problems(tmp_path / name, [item]) for name, item in problems.items()}
    code, said = main_in_this_process(
        *BRIEF, "--labeled", files["labeled"], "--unlabeled", files["unlabeled"],
        "--test", f"t={files['test']}", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 2 and ("lacks characters of the answer" in said or f"#### {answer}" in said)
    assert not (tmp_path / "run").exists()


def test_a_runs_folder_given_as_a_model_is_named(usual):
    """The first folder that a run prints is its own; the models are inside it."""
    result = shell(f"{{python}} decode.py --checkpoint '{usual}' 'Tom has 3 pens.'")
    assert result.returncode != 0 and "is a run: name a model in it" in result.stderr


@pytest.mark.parametrize(
    "rationale", ["2 + 4 = 6\n#####6", "2 + 4 = 6\n####\t6", "2 + 4 = 6 ####6"]
)
def test_a_rationale_that_would_be_learned_and_counted_wrong_is_refused(rationale, tmp_path):
    """The file reader is more lenient than the rule that grades a model's rationales."""
    words = [
        *BRIEF, "--labeled", write_problems(tmp_path / "l", [replace(SUM, rationale=rationale)]),
        "--test", f"t={write_problems(tmp_path / 't', [NEW])}", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    code, said = main_in_this_process(*words)
    assert code == 0 or (code == 2 and "must end in '#### 6" in said)
    if code == 0:  # then it was reformatted
        labeled, _, _ = run.load_data(run.parse_args(words))
        assert is_correct(labeled[0].rationale, 6.0)


@pytest.mark.parametrize(
    "name", ["stage", "dev without calculator", "a|b", "two\nlines", "caf\udce9"]
)
def test_names_that_a_table_or_a_log_cannot_hold_are_refused(name, tmp_path):
    """`stage` in the log is the path of the result; the other names broke the final table, or the run at
    its end."""
    code, said = main_in_this_process("--test", f"{name}={tmp_path}/t", "--labeled", "l")
    assert code == 2 and "with a name other than" in said


def test_leakage_is_found_whatever_unicode_form_a_question_has():
    """The model reads both forms as the same ids."""
    typed, composed = Problem("Zoe\u0308 has ３ pens?", 3.0), Problem("Zoë has 3 pens?", 3.0)
    with pytest.raises(ValueError, match="in the training data"):
        check_leakage([typed], {"t": [composed]}, Tokenizer(ROOT / "data" / "tiny"))


def test_a_question_that_the_model_cannot_read_whole_is_named():
    """The model would answer a different question."""
    result = shell("{python} decode.py '3 ☃ and 4?' " + "'" + "Ana has 3 nuts. " * 60 + "?'")
    assert (
        result.returncode == 0
        and result.stderr.count("This question is too long or contains unknown") == 2
    )


# ------------------------------------------------------------------------- a run's folder, changed


@pytest.mark.parametrize("file", ["samples-for-labels.jsonl", "evaluation.jsonl"])
@pytest.mark.parametrize("change", ["emptied", "reversed", "shortened"])
def test_rows_that_were_changed_are_not_joined_with_other_problems(usual, file, change, tmp_path):
    """Rows are matched by position, so in a different order questions would get the answers of others."""
    shutil.copytree(usual, tmp_path / "run")
    path = tmp_path / "run" / "dpo-st" / "round-1" / file
    rows = read_jsonl(path)
    write_jsonl({"emptied": [], "reversed": rows[::-1], "shortened": rows[1:]}[change], path)
    code, said = main_in_this_process(*BRIEF, "--out", tmp_path / "run")
    assert code == 2 and f"{path} is damaged: delete it" in said
    path.unlink()
    assert main_in_this_process(*BRIEF, "--out", tmp_path / "run")[0] == 0


def test_a_log_with_lines_of_others_is_no_obstacle(usual, tmp_path):
    """A killed run may leave half a line, and an editor may leave anything."""
    shutil.copytree(usual, tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b'[1]\n{"a": 1}\n{"stage": 5}\n\xff\n{"sta')
    assert main_in_this_process(*BRIEF, "--out", tmp_path / "run")[0] == 0
    ours, theirs = read_jsonl(tmp_path / "run" / "log.jsonl"), read_jsonl(usual / "log.jsonl")
    assert sorted(map(str, ours)) == sorted(map(str, theirs))


# ------------------------------------------------------------------------------ several processes


def test_more_processes_than_work(usual, tmp_path):
    """Two problems, four processes: those without work must still join every exchange."""
    process = start(4, "run.py", *BRIEF, "--out", tmp_path / "four")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    four, one = (
        read_jsonl(place / "warm-up/evaluation.jsonl") for place in (tmp_path / "four", usual)
    )
    assert [row["question"] for row in four] == [row["question"] for row in one]


# ---------------------------------------------------------------------------- the command line


def test_any_command_line_ends_in_success_or_in_one_sentence(tmp_path, monkeypatch, slow):
    """60 command lines (2,000 with --slow) of random flags and values, sensible or not. Any exception would fail
    this test."""
    monkeypatch.setenv("DPO_ST_GITHUB", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("DPO_ST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sums = write_problems(tmp_path / "sums", [SUM])
    new = write_problems(tmp_path / "new", [NEW])
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


# ------------------------------------------------------------------------------ how a process ends


def test_ctrl_c_while_torch_is_imported_is_one_word():
    """The first second of every command is spent there; a traceback of twenty lines looks like a fault."""
    program = (
        "import builtins, os, signal, sys; real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        "    if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = slow\n"
        "import runpy; sys.argv = [sys.argv[1]]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for file in ("run.py", "decode.py"):
        result = subprocess.run(
            [sys.executable, "-c", program, file], cwd=ROOT, capture_output=True, text=True,
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        assert result.returncode != 0 and result.stderr == "stopped\n", result.stderr


def test_a_notebook_can_run_it(monkeypatch, capsys):
    """Jupyter's stdout is no ordinary stream: it has no `reconfigure`."""

    class OutStream:
        def __getattr__(self, name):
            if name == "reconfigure":
                raise AttributeError(name)
            return getattr(real, name)

    real = sys.stdout
    monkeypatch.setattr(sys, "stdout", OutStream())
    monkeypatch.setattr(sys, "argv", ["decode.py", "Tom has 3 pens. He buys 4 more. How many now?"])
    runpy.run_path(str(ROOT / "decode.py"), run_name="__main__")  # no SystemExit either


def test_optimised_python_runs_it():
    """With -OO there are no docstrings."""
    for words in (["run.py", "--help"], ["decode.py", "--help"], ["-m", "data.sources", "--help"]):
        result = subprocess.run(
            [sys.executable, "-OO", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


def test_an_environment_left_by_a_cluster_is_not_torchruns(tmp_path):
    """Shells on clusters keep WORLD_SIZE, sometimes empty: a run without torchrun is alone. srun without torchrun
    would do everything once per task, in one folder."""
    alone = command(*BRIEF, "--out", tmp_path / "run", WORLD_SIZE="", RANK="3")
    assert alone.returncode == 0, alone.stderr
    tasks = command(*BRIEF, "--out", tmp_path / "srun", SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3")
    assert tasks.returncode == 2 and "srun -n 1 torchrun" in tasks.stderr
    assert len(tasks.stderr.splitlines()) == 1 and not (tmp_path / "srun").exists()


# --------------------------------------------------------------------------- what is typed, and lost


def test_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    """`--out=~/runs/a` is not expanded by the shell and made a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "--out=~/a --weights=~/b --labeled=~/c --unlabeled=~/d --test x=~/e".split()
    config = run.parse_args(words)
    paths = [config.out, config.weights, config.labeled, config.unlabeled, config.test[0][1]]
    assert paths == [str(tmp_path / name) for name in "abcde"]


def test_a_model_that_has_lost_its_weights_is_named_with_what_keeps_the_rest(usual, tmp_path):
    """ "Fetch it again" would send the user away from finished stages."""
    out = tmp_path / "run"
    shutil.copytree(usual, out)
    (out / "warm-up" / "sft" / "pytorch_model.bin").unlink()
    result = command(*BRIEF, "--out", out)
    assert result.returncode == 2 and "run the same command again" in result.stderr
    shutil.rmtree(out / "warm-up" / "sft")
    assert command(*BRIEF, "--out", out).returncode == 0
    found, before = hashes(out), hashes(usual)
    for name in before.keys() - {"config.json", "log.jsonl"}:  # the log has the stage at its end
        assert found[name] == before[name], name


def test_a_learning_rate_that_cannot_be_meant_stops_the_run(tmp_path):
    """`--sft-learning-rate 5` gave a loss of 1434, then hours of rubbish."""
    result = command("--limit", 60, "--sft-learning-rate", 5, "--out", tmp_path / "run")
    assert result.returncode == 2 and "lower the learning rate" in result.stderr, result.stderr


def test_the_most_frequent_answer_is_beside_the_accuracies(tmp_path):
    """Of yes and no, half are right by chance: an accuracy means little without it."""
    rows = []
    for i, answer in enumerate(["yes"] * 6 + ["no"] * 4):
        row = {"test": "mine", "calculator": True, "question": str(i), "answer": answer}
        rows.append(row | {"rationales": [""], "correct": [True]})
    (tmp_path / "warm-up").mkdir()
    write_jsonl(rows, tmp_path / "warm-up" / "evaluation.jsonl")
    table = make_table(read_evaluations(tmp_path), run.parse_args([]))
    assert "| always the most frequent answer |  | 60.0 |" in table


def test_an_answer_that_was_cut_says_so(monkeypatch, capsys):
    """Otherwise the model seems to have forgotten its answer."""
    monkeypatch.setattr(decode, "MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(decode, "generate", partial(decode.generate, max_new_tokens=3))
    monkeypatch.setattr(sys, "argv", ["decode.py", "Tom has 3 pens. He buys 4 more. How many now?"])
    decode.main()
    assert "(cut at 3 tokens)" in capsys.readouterr().out


def test_fewer_rounds_forget_nothing(usual, tmp_path):
    """`--rounds 0` in a folder that has a round: its results stay in the table and in the report."""
    out = tmp_path / "run"
    shutil.copytree(usual, out)
    words = [*BRIEF]
    words[words.index("--rounds") + 1] = "0"
    result = command(*words, "--out", out)
    assert result.returncode == 0 and "| 1 |" in result.stdout
    assert any(stage.endswith("round-1") for stage in measure(out))


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("samples-for-labels.jsonl", "rationales", "abc"),
        ("samples-for-labels.jsonl", "rationales", None),
        ("samples-for-labels.jsonl", "correct", [1, 2, 3]),
        ("evaluation.jsonl", "correct", []),
        ("evaluation.jsonl", "test", None),
    ],
)
def test_fields_of_another_type_in_a_runs_files_are_named(usual, tmp_path, file, field, value):
    """A text in place of a list would be taken for its letters; others would end in a traceback."""
    out = tmp_path / "run"
    shutil.copytree(usual, out)
    for path in out.rglob(file):
        rows = [row | {field: value} for row in read_jsonl(path)]
        write_jsonl(rows, path)
    code, said = main_in_this_process(*BRIEF, "--out", out)
    assert code == 2 and "is damaged: delete it" in said, said


def test_a_limit_switches_no_check_off(tmp_path):
    """The mistake would show in the full run only, after hours."""
    labeled = write_problems(tmp_path / "l", [SUM, replace(SUM, question="How many are 4 + 2?")])
    test = write_problems(tmp_path / "t", [NEW, Problem("How many are 4 + 2?", 6.0)])
    code, said = main_in_this_process(
        *BRIEF, "--limit", 1, "--labeled", labeled, "--test", f"t={test}", "--out", tmp_path / "run"
    )
    assert code == 2 and "training data" in said
