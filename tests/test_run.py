"""run.py: one command does a complete run, can be stopped at any time, leaves a usable model, and accepts real data."""

import contextlib
import gc
import hashlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import run
import selftrain
from calculator import calculate
from data.problems import Problem, read_jsonl, write_jsonl
from data.results import accuracies, compare, make_table, mark_results, read_evaluations
from data.terminal import STAGES, Plan, progress
from model import SIZES, T5, save_flan_t5
from tests.conftest import ROOT, hear_ctrl_c

# Takes only seconds, yet every stage has work: some samples are right, some are wrong.
SHORT = "--rounds 1 --limit 24 --sft-epochs 12 --dpo-steps 3 --max-new-tokens 60".split()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run run.py in a new process."""
    return subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file of a run."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def count(folder: Path) -> int:
    """How many files and folders there are, while a run makes and removes some."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def main_in_this_process(*arguments: object) -> tuple[int, str]:
    """Run run.py without the extra second that a new process takes; return its exit code and stderr."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["run.py", *map(str, arguments)]
    gc.freeze()  # later garbage collections skip existing objects
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
        ):
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        sys.argv = before
        gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One short, uninterrupted run of both methods."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = command(*SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def test_one_command_leaves_the_whole_run_on_disk(finished):
    """A run must leave samples, pairs, pseudo-labels and checkpoints for each round, and results for people and programs."""
    for name in (
        "config.json", "log.jsonl", "results.json", "results.md", "warm-up/sft/pytorch_model.bin",
        "warm-up/sft/spiece.model", "warm-up/evaluation.jsonl", "st/round-1/samples-for-labels.jsonl",
        "st/round-1/pseudo-labels.jsonl", "st/round-1/sft/config.json", "dpo-st/round-1/samples-for-pairs.jsonl",
        "dpo-st/round-1/preference-pairs.jsonl", "dpo-st/round-1/samples-for-labels.jsonl",
        "dpo-st/round-1/pseudo-labels.jsonl", "dpo-st/round-1/sft/config.json", "dpo-st/round-1/evaluation.jsonl",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("*unfinished*"))


def test_the_numbers_of_a_run_add_up(finished):
    """Samples per question, accuracies and tables come from different code paths, so a mix-up of stages would show here."""
    for name, count in (("st/round-1/samples-for-labels", 3), ("dpo-st/round-1/samples-for-pairs", 5),
                        ("dpo-st/round-1/samples-for-labels", 3)):  # fmt: skip
        rows = read_jsonl(finished / f"{name}.jsonl")
        assert len(rows) == 24 and all(len(row["rationales"]) == count for row in rows)
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["warm-up", "st/round-1", "dpo-st/round-1"]
    for stage, row in results.items():
        stored = read_jsonl(finished / stage / "evaluation.jsonl")
        assert row == accuracies(stored)
        assert list(row) == ["held-out", "library", "orchard", "dev", "dev without calculator"]
        assert len(stored) == 5 * 24
    table = (finished / "results.md").read_text()
    assert "| SFT | 0 |" in table and "| ST | 1 |" in table and "| DPO-ST | 1 |" in table


def test_the_log_of_dpo_starts_at_log_two(finished):
    """Before the first step the policy equals its reference; any other value means dropout or a wrong reference."""
    first = next(
        r
        for r in read_jsonl(finished / "log.jsonl")
        if r["stage"].endswith("/dpo") and r.get("step") == 1
    )
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_same_command_again_repeats_nothing(finished):
    """Finished stages are read from disk, not run again: no file changes, not even the log."""
    before = hashes(finished)
    assert command(*SHORT, "--out", finished).returncode == 0
    assert hashes(finished) == before


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(finished, tmp_path, slow):
    """After kill -9 in any stage, rerun the same command: files with their final names are complete, the rest is made
    again, and every byte of the result is the same, the log included. --slow kills twenty times instead of three."""
    rng, out, where = random.Random(0), tmp_path / "run", []
    arguments = [sys.executable, "run.py", *SHORT, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wanted = 20 if slow else 3
    while len(where) < wanted:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before, deadline = count(out), time.time() + 60
        if (
            len(where) > wanted // 3
        ):  # let some get a stage further, so that the kills are spread over the run
            while process.poll() is None and time.time() < deadline and count(out) == before:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 3))
        if process.poll() is not None:
            assert len(where) >= wanted / 2, "the run ended before enough kills"
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        where.append(count(out))
    result = command(*SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    expected = hashes(finished)
    found = hashes(out)
    for both in (expected, found):
        both.pop("config.json")  # contains the folder's name
    assert found == expected, where


def test_ctrl_c_is_one_sentence(tmp_path):
    """Ctrl-C is not an error: one sentence says how to continue."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    while process.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT  # so that a shell loop around it ends, too
    assert "the same command continues" in words and len(words.splitlines()) == 1


def test_a_second_run_in_one_folder_is_refused_and_the_first_is_not_disturbed(finished, tmp_path):
    """A run may be started twice by mistake. The second one says so; the first one's log stays complete."""
    out = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "log.jsonl").exists() and first.poll() is None:
        time.sleep(0.02)
    second = command(*SHORT, "--out", out)
    assert second.returncode == 2 and "another run is using" in second.stderr, second.stderr
    assert first.wait(300) == 0
    found, expected = hashes(out), hashes(finished)
    for name in expected.keys() - {"config.json"}:
        assert found[name] == expected[name], name


@pytest.mark.skipif(os.name == "nt", reason="needs a file-size limit to simulate a full disk")
def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_finished(tmp_path):
    """Files may not exceed 64 kB, so the first save fails as on a full disk. Once there is space again,
    the same command continues."""
    import resource

    out = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "is the disk full?" in result.stderr and not list((out / "warm-up").iterdir())
    assert command(*SHORT, "--rounds", 0, "--method", "st", "--out", out).returncode == 0


def test_other_numbers_in_the_same_folder_are_refused(finished):
    """A folder that mixes stages of two settings would be a result of neither."""
    result = command(*SHORT, "--out", finished, "--beta", "0.3")
    assert (
        result.returncode == 2
        and "--beta 0.5" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    """A plain file in place of the folder represents any location that the user cannot write to."""
    (tmp_path / "file").write_text("mine")
    code, words = main_in_this_process(*SHORT, "--out", tmp_path / "file" / "run")
    assert code == 2 and "Traceback" not in words and words.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_in_bf16_keeps_its_checkpoints_in_fp32(tmp_path):
    """Every stage accepts the flag. DPO starts at log 2, because policy and reference compute alike, and
    the next round trains weights that have lost no precision."""
    code, said = main_in_this_process(
        *SHORT, "--method", "dpo-st", "--bf16", "--out", tmp_path / "run"
    )
    assert code == 0, said
    first = next(
        record for record in read_jsonl(tmp_path / "run/log.jsonl") if "reward_margin" in record
    )
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    for name in ("warm-up/sft", "dpo-st/round-1/dpo", "dpo-st/round-1/sft"):
        state = torch.load(tmp_path / "run" / name / "pytorch_model.bin", weights_only=True)
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}, name


def test_the_model_of_a_finished_run_can_be_asked(finished):
    """decode.py needs only a run's checkpoint."""
    result = subprocess.run(
        [sys.executable, "decode.py", "--checkpoint", finished / "dpo-st/round-1/sft", "How many are 3 + 4?"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("How many are 3 + 4?\n  ")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "huge"], "tiny"),
        (["--rounds", "-1"], "--rounds"),
        (["--sft-batch-size", "0"], "--sft-batch-size"),
        (["--beta", "nan"], "--beta"),
        (["--percentile", "150"], "--percentile"),
        (["--max-similarity", "2"], "--max-similarity"),
        (["--weights", "no/such/folder"], "no/such/folder"),
        (["--labeled", "no/such/file", "--test", "mine=no/such/file"], "no/such/file"),
        (["--labeled", "no/such/file"], "--test"),
        (["--labeled", "no/such/file", "--test", "no/such/file"], "NAME=FILE"),
        (["--labeled", "no/such/file", "--test", "a=b", "--test", "a=c"], "each name once"),
        (["--unlabeled", "no/such/file"], "--labeled"),
        (["extra"], "extra"),
        (["--sead", "3"], "--sead"),
        (["--temperature", "0"], "--temperature"),
        (["--beta", "abc"], "--beta"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    """A traceback tells a newcomer nothing. The message names the argument and what to do."""
    result = command("--out", tmp_path / "run", *arguments)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 400


def test_a_first_command_that_fails_does_not_claim_the_folder(tmp_path):
    """The corrected command must not be told that the folder belongs to a run with other settings."""
    result = command("--weights", "no/such/folder", "--out", tmp_path / "run")
    assert result.returncode == 2 and not (tmp_path / "run").exists()


def test_a_terminal_that_lacks_a_sign_loses_nothing():
    """The marks « and » are not in every encoding; on a Chinese terminal they caused a traceback."""
    for script, arguments in (
        ("decode.py", ["Tom has 3 pens. How many?"]),
        ("calculator.py", ["48 / 2"]),
    ):
        result = subprocess.run(
            [sys.executable, script, *arguments], cwd=ROOT, capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr


def test_a_run_can_be_started_from_elsewhere(tmp_path):
    """Start through a link, from another folder, into a path with spaces; the printed command works there."""
    (tmp_path / "link.py").symlink_to(ROOT / "run.py")
    flags = "--rounds 0 --method st --limit 4 --sft-epochs 1 --max-new-tokens 20 --out".split()
    result = subprocess.run(
        [sys.executable, "link.py", *flags, "my run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout.strip().splitlines()[-1].replace("python", sys.executable, 1)
    assert subprocess.run(printed, shell=True, cwd=tmp_path, capture_output=True).returncode == 0


def write_problems(path: Path, problems: list) -> Path:
    write_jsonl(map(asdict, problems), path)
    return path


TALLER = "Ana is taller than Ben. Ben is taller than Carl. Who is {}?"
OWN = [
    "--sft-epochs",
    2,
    "--dpo-steps",
    2,
    "--rounds",
    1,
    "--method",
    "dpo-st",
    "--dpo-samples",
    3,
    "--max-new-tokens",
    30,
]


def test_your_own_problems_with_answers_in_words(tmp_path):
    """A teacher types in ten problems, other questions without rationales, and a test set; the answers are names."""
    labeled = [
        Problem(f"{i}: {TALLER.format('tallest')}", "Ana", "Ana is taller than Ben.\n#### Ana")
        for i in range(10)
    ]
    unlabeled = [Problem(f"{i}: {TALLER.format('tallest')} Say it.", "ana") for i in range(4)]
    test = [
        Problem("The test: " + TALLER.format("tallest"), "ANA"),
        Problem("The test: " + TALLER.format("shortest"), "Carl"),
    ]
    files = [
        "--labeled",
        write_problems(tmp_path / "l.jsonl", labeled),
        "--unlabeled",
        write_problems(tmp_path / "u.jsonl", unlabeled),
    ]
    files += ["--test", f"taller={write_problems(tmp_path / 't.jsonl', test)}"]
    code, words = main_in_this_process(*files, *OWN, "--out", tmp_path / "run")
    assert code == 0, words
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["warm-up"]) == {"taller"}
    assert len(read_jsonl(tmp_path / "run/dpo-st/round-1/samples-for-pairs.jsonl")) == 4


def test_labeled_problems_without_a_rationale_are_refused(tmp_path):
    """If they were dropped silently, they would be missing from training without anyone noticing."""
    labeled = [Problem("How many are 2 + 4?", 6.0, "#### 6"), Problem("How many are 2 + 7?", 9.0)]
    files = ["--labeled", write_problems(tmp_path / "l.jsonl", labeled)]
    files += ["--test", f"t={write_problems(tmp_path / 't.jsonl', [Problem('How many?', 3.0)])}"]
    code, words = main_in_this_process(*files, "--out", tmp_path / "run")
    assert code == 2 and "How many are 2 + 7?" in words and "--unlabeled" in words
    assert not (tmp_path / "run").exists()


def test_what_a_model_cannot_learn_to_write_is_counted_before_it_is_trained(tmp_path):
    """The model never finishes a rationale longer than its limit, and loses characters that the vocabulary lacks.
    Without the counts, the accuracy would be unexplained."""
    names = [
        ("Ana", "She is.\n#### Ana"),
        ("Ana", "She is. " * 20 + "\n#### Ana"),
        ("Ana", "Zoë is not.\n#### Ana"),
    ]
    labeled = [
        Problem(f"Who is number {i}?", answer, rationale)
        for i, (answer, rationale) in enumerate(names)
    ]
    files = ["--labeled", write_problems(tmp_path / "l.jsonl", labeled)]
    files += ["--test", f"who={write_problems(tmp_path / 't.jsonl', [Problem('Who?', 'Ana')])}"]
    result = command(*files, *OWN, "--rounds", 0, "--out", tmp_path / "run")
    assert "1 are longer than 30 tokens and 1 have such characters" in result.stdout, result.stderr
    assert (
        "Of 4 questions in L, U and the tests 0 are cut at 200 tokens and 0 have" in result.stdout
    )


def test_questions_in_both_training_and_test_are_refused_unless_allowed(tmp_path):
    """A score on training questions says nothing, and after a week of training it is too late to find out."""
    shared = Problem("How many are 2 + 3?", 5.0, "2 + 3 = <<2+3=5>>5\n#### 5")
    labeled = write_problems(
        tmp_path / "l.jsonl",
        [shared, Problem("How many are 2 + 4?", 6.0, "2 + 4 = <<2+4=6>>6\n#### 6")],
    )
    test = write_problems(tmp_path / "t.jsonl", [shared, Problem("How many are 2 + 5?", 7.0)])
    files = ["--labeled", labeled, "--test", f"mine={test}", *OWN, "--out", tmp_path / "run"]
    code, words = main_in_this_process(*files)
    assert (
        code == 2
        and "mine: 1 question" in words
        and "2 + 3" in words
        and "--allow-leakage" in words
    )
    assert not (tmp_path / "run").exists()
    code, words = main_in_this_process(*files, "--allow-leakage")
    assert code == 0, words
    write_problems(
        test, [replace(shared, answer=50.0, rationale=None)]
    )  # a different file with the same name
    result = command(*files, "--allow-leakage")
    assert (
        result.returncode == 2
        and "a run with other problems" in result.stderr
        and "another --out" in result.stderr
    )


def test_questions_that_are_cut_are_counted(tmp_path):
    """Two long questions that differ only in their last sentence get the same ids: the run must say so first."""
    long = "Ana has 3 nuts. " * 60
    labeled = [Problem(long + end, 3.0, "#### 3") for end in ("How many?", "How many more?")]
    files = ["--labeled", write_problems(tmp_path / "l.jsonl", labeled)]
    files += ["--test", f"t={write_problems(tmp_path / 't.jsonl', [Problem('How many?', 3.0)])}"]
    result = command(*files, *OWN, "--rounds", 0, "--out", tmp_path / "run")
    assert "Of 3 questions in L, U and the tests 2 are cut" in result.stdout, result.stderr


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    """Its last ids would index past the embedding: a crash in the middle of a batch, on a GPU without an explanation."""
    save_flan_t5(T5(replace(SIZES["tiny"], vocab_size=300)), tmp_path / "model")
    shutil.copy(ROOT / "data/tiny/spiece.model", tmp_path / "model")
    result = command("--weights", tmp_path / "model", "--out", tmp_path / "run")
    assert (
        result.returncode == 2
        and "they do not match" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_two_hundred_broken_lines_are_refused_with_their_number(tmp_path):
    """A bad line is reported by file and line number before training starts. Skipping it would silently change the
    training set."""
    good = '{"question": "How many are 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\\n#### 2"}'
    rng, path = random.Random(0), tmp_path / "train.jsonl"
    for number in range(200):
        broken = bytearray(good.encode())
        kind = number % 4
        if kind == 0:  # truncated
            del broken[rng.randrange(1, len(broken)) :]
        elif kind == 1:  # bytes missing from the object's punctuation
            at = rng.choice([0, 1, broken.index(b":"), broken.index(b","), len(broken) - 1])
            del broken[at : at + rng.randint(1, 3)]
        elif kind == 2:  # not valid UTF-8
            broken[rng.randrange(2, len(broken))] = rng.choice([0xFF, 0xC0, 0x80])
        else:  # well-formed but wrong
            broken = rng.choice([b"5", b"[]", b"null", b'{"question": 5, "answer": "#### 2"}', b'{"question": "", "answer": "#### 2"}',
                                 b'{"question": "q"}', b'{"question": "q", "answer": "7 apples"}', b'{"question": "q", "answer": NaN}',
                                 b'{"question": "q", "answer": "#### 2", "rationale": "#### 2"}', b'{"question": "q", "answer": true}'])  # fmt: skip
        lines = [good.encode()] * rng.randint(0, 5)
        path.write_bytes(b"\n".join([*lines, bytes(broken), good.encode()]))
        code, words = main_in_this_process(
            "--labeled", path, "--test", f"mine={path}", "--out", tmp_path / "run"
        )
        assert (
            code == 2 and f"train.jsonl, line {len(lines) + 1}:" in words and words.count("\n") == 1
        ), (bytes(broken), words)
    assert not (tmp_path / "run").exists()


def test_fifty_broken_checkpoints_are_refused_in_one_sentence(tmp_path):
    """--weights with a folder that was damaged in transfer. (tests/test_model.py tests what each sentence names.)"""
    shutil.copytree(ROOT / "data/tiny", tmp_path / "whole")
    rng = random.Random(0)
    for number in range(50):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        victim = folder / rng.choice(["config.json", "pytorch_model.bin", "spiece.model"])
        content = victim.read_bytes()
        if number % 3 == 0:
            victim.unlink()
        else:
            victim.write_bytes(
                content[: rng.randrange(len(content) * 9 // 10)]
                if number % 3 == 1
                else rng.randbytes(len(content))
            )
        code, words = main_in_this_process(
            "--weights", folder, "--limit", 2, "--out", tmp_path / f"run-{number}"
        )
        assert code == 2 and words.count("\n") == 1 and "Traceback" not in words, (victim, words)


def test_out_of_memory_says_which_number_to_lower(tmp_path, monkeypatch):
    """CUDA prints ten lines about allocators; the user needs the name of a flag, and to know that nothing is lost."""
    for error in (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(selftrain, "generate", fail)
        out = tmp_path / type(error).__name__
        code, words = main_in_this_process("--limit", 2, "--sft-epochs", 1, "--out", out)
        assert (
            code == 2
            and "--micro-batch-tokens" in words
            and "--decode-batch-size" in words
            and words.count("\n") == 1
        )
        assert (out / "warm-up/sft").exists()


def test_every_hyper_parameter_of_the_paper_is_a_flag_with_that_default():
    """The defaults of --size base are the numbers in table 5 and section 4.2 of the paper."""
    config = run.parse_args(["--size", "base", "--device", "cpu"])
    assert config.out == "runs/base-seed-42"
    assert (config.rounds, config.dpo_samples, config.sft_samples, config.st_samples) == (
        3,
        5,
        3,
        3,
    )
    assert (config.temperature, config.top_k) == (0.7, 50)
    assert (config.sft_epochs, config.sft_learning_rate, config.sft_batch_size) == (8, 3e-4, 96)
    assert (config.dpo_steps, config.dpo_learning_rate, config.dpo_batch_size) == (150, 7e-7, 96)
    assert config.later_ratio == 1
    assert (config.beta, config.max_similarity, config.n_pairs, config.percentile) == (
        0.1,
        0.7,
        3,
        90,
    )
    assert (config.warmup_ratio, config.final_ratio) == (0.1, 0.1)
    assert (config.weight_decay, config.max_grad_norm) == (0.01, 1.0)
    assert (config.max_new_tokens, config.method, config.seed) == (300, "dpo-st", 42)


def test_every_number_among_the_flags_says_where_it_comes_from():
    """Its help or its group's title says in brackets: the paper's section, the authors' code, or our choice."""
    for group in run.make_parser()._action_groups[2:]:
        for action in group._group_actions:
            if type(action.default) in (int, float) and action.dest != "limit":
                assert "[" in action.help + group.title, action.dest


def test_the_papers_rows_are_below_the_runs_own(tmp_path):
    """Whoever runs the paper's experiment wants to compare; the row says that its settings are the paper's.
    Runs of other sizes, and of your own problems, have no such row."""
    for stage in ("warm-up", "dpo-st/round-1"):
        row = {"calculator": True, "rationales": [""], "correct": [True], "answer": 1.0}
        rows = [{"test": test} | row for test in run.TESTS]
        (tmp_path / stage).mkdir(parents=True)
        write_jsonl([*rows, rows[0] | {"calculator": False}], tmp_path / stage / "evaluation.jsonl")
    base = "--size base --device cpu".split()
    table = make_table(read_evaluations(tmp_path), run.parse_args(base))
    assert "| DPO-ST, paper, with its own settings |  | 27.2 | 74.3 | 29.2 | 22.6 |  |" in table
    own = "--labeled a.jsonl --test mine=b.jsonl".split()
    for flags in ("--size small --device cpu".split(), [*base, *own]):
        assert "paper" not in make_table(read_evaluations(tmp_path), run.parse_args(flags))


def test_the_real_checkpoint_and_real_gsm8k_run_every_stage(shared, public_sets, tmp_path, slow):
    """Real vocabulary, real questions, the public file layout: as with --size base, but without the download."""
    if not slow:
        limits = [
            "--limit",
            "4",
            "--sft-epochs",
            "1",
            "--dpo-steps",
            "1",
            "--dpo-samples",
            "2",
            "--sft-samples",
            "1",
            "--max-new-tokens",
            "60",
        ]
    else:
        limits = ["--limit", "64"]
    data = public_sets
    tests = [f"--test={name}={data / name.lower() / 'test.jsonl'}" for name in run.TESTS]
    tests.append(f"--test=dev={data / 'gsm8k' / 'dev.jsonl'}")
    result = command(
        "--weights",
        shared / "mini-flan-t5",
        "--labeled",
        data / "gsm8k/train.jsonl",
        *tests,
        "--rounds",
        1,
        *limits,
        "--out",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["warm-up"]) == {
        "GSM8K",
        "MultiArith",
        "ASDiv",
        "SVAMP",
        "dev",
        "dev without calculator",
    }


def test_size_base_fetches_checks_and_starts(shared, tmp_path):
    """The real command, with a local server that plays the public hosts and a small checkpoint in place of base.

    The second run downloads nothing. One flipped bit in the weights is detected, and the file is not kept."""
    data, sources, mini = shared / "data", shared / "sources", shared / "mini-flan-t5"
    Hosts.files = {
        f"{part}.jsonl": data / "gsm8k" / f"{part}.jsonl" for part in ("train", "dev", "test")
    }
    Hosts.files |= {name: sources / name for name in ("MultiArith.json", "ASDiv.xml", "SVAMP.json")}
    Hosts.files |= {path.name: path for path in mini.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hosts)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    hosts = {"DPO_ST_GITHUB": url, "HF_ENDPOINT": url, "DPO_ST_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path),
             "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    pinned = {
        "spiece.model": hashlib.sha256((mini / "spiece.model").read_bytes()).hexdigest(),
        "base/model.safetensors": hashlib.sha256(
            (mini / "model.safetensors").read_bytes()
        ).hexdigest(),
    }
    program = (
        "import runpy, data.sources; "
        f"data.sources.SHA256 = {pinned}; "
        "runpy.run_path('run.py', run_name='__main__')"
    )

    def command(*arguments, **environment) -> subprocess.CompletedProcess:
        """Run run.py with the checksums of the small files."""
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    start = ["--size", "base", "--device", "cpu", "--rounds", 1, "--limit", 2, "--sft-epochs", 1, "--dpo-steps", 1,
             "--max-new-tokens", 20, "--out"]  # fmt: skip
    hosts["HF_HUB_OFFLINE"] = ""
    result = command(*start, tmp_path / "first", **hosts)
    assert result.returncode == 0, result.stderr
    assert len(Hosts.asked) == 9, Hosts.asked  # six datasets, config, vocabulary, weights
    assert command(*start, tmp_path / "second", **hosts).returncode == 0
    assert len(Hosts.asked) == 9, "a cached file was fetched again"
    broken = bytearray((mini / "model.safetensors").read_bytes())
    broken[-1] ^= 1
    (tmp_path / "broken").write_bytes(broken)
    Hosts.files["model.safetensors"] = tmp_path / "broken"
    result = command(
        *start, tmp_path / "third", **{**hosts, "DPO_ST_CACHE": str(tmp_path / "other")}
    )
    server.shutdown()
    assert (
        result.returncode == 2
        and "model.safetensors" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not list((tmp_path / "other").rglob("*.safetensors"))


class Hosts(BaseHTTPRequestHandler):
    """Plays the two public hosts: GitHub's raw files and the model hub with its checksum header and redirect."""

    files: dict[str, Path] = {}
    stated: dict[str, str] = {}  # checksums that differ from the files sent
    asked: list[str] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.rsplit("/", 1)[-1]
        path = self.files.get(name)
        if path is None:
            return self.send_error(404)
        if "/resolve/" in self.path:
            self.send_response(302)
            self.send_header(
                "X-Linked-ETag",
                f'"{self.stated.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()}"',
            )
            self.send_header("X-Linked-Size", str(path.stat().st_size))
            self.send_header("Location", "/blob/" + name)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        if body:
            self.asked.append(self.path)
            self.wfile.write(path.read_bytes())

    def log_message(self, *_):
        pass


# ------------------------------------------------------------------------------------ what a run shows


def test_the_closing_words_say_what_was_learned(finished):
    """A newcomer sees the sets named, the noise of one run, what was gained and lost, and one problem in full."""
    text = (finished / "results.md").read_text()
    for words in (
        "± of the last row (95 %)",
        "- library: a kind of story that is in neither L nor U",
        "dpo-st/round-1 against SFT:",
        "DPO-ST against ST, round-1:",
        "sign test, p =",
    ):
        assert words in text, words


def test_the_sign_test_is_exact():
    """Eight gained and none lost: 2 / 2^8; five and three: as likely as not."""
    old = [{"test": "t", "calculator": True, "correct": [False]}] * 8
    new = [{"test": "t", "calculator": True, "correct": [True]}] * 8
    assert compare(old, new) == "8 gained, 0 lost: more than chance (sign test, p = 0.0078)"
    half = new[:5] + old[:3]
    other = old[:5] + new[:3]
    assert compare(other, half) == "5 gained, 3 lost: this may be chance (sign test, p = 0.73)"
    assert "p = 1)" in compare(new[:1] + old[:1], old[:1] + new[:1])
    assert compare(old, old) == "the same problems are solved"


def test_the_calculators_results_are_marked_in_stored_texts():
    """Rationales are stored as text; what the calculator wrote is what it would write again."""
    text = "He has [ 2 + 3 = 5] 5. Then [ 5 * 2 = 11] 11. [ two = 2]. #### 11"
    marked = "He has [ 2 + 3 = «5]» 5. Then [ 5 * 2 = 11] 11. [ two = 2]. #### 11"
    assert mark_results(text, calculate) == marked


def test_every_stage_says_which_of_how_many_it_is(finished, tmp_path):
    """A run of hours without a number leaves one guessing; the plan comes from the algorithm itself."""
    result = command(*SHORT, "--out", tmp_path / "run")
    numbers = [line.split(" ")[0] for line in result.stdout.splitlines() if " stage " in line]
    stages = list(dict.fromkeys(numbers))
    assert stages == [f"{i}/13" for i in range(1, 14)], stages
    plan = Plan(run.parse_args(SHORT))
    selftrain.self_train(plan, "dpo-st")
    assert len(plan.names) == 9 and plan.names[0] == "warm-up/sft"


def test_a_long_stage_says_in_a_file_how_far_it_is(monkeypatch, capsys):
    """A scheduler's log must not be silent for an hour; a bar drawn with carriage returns is unreadable there."""
    now = [0.0]
    monkeypatch.setattr(STAGES, "names", [])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress(range(10), "sampling", "rationale"):
        now[0] += 30
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("sampling: ") for line in lines), lines


def test_the_warm_up_of_another_run_can_be_used(finished, tmp_path):
    """Another beta needs no other warm-up; another seed does, and is refused by name."""
    result = command(*SHORT, "--beta", 0.3, "--warm-up", finished, "--out", tmp_path / "beta")
    assert result.returncode == 0 and "The warm-up is that of" in result.stdout, result.stderr
    ours, theirs = hashes(tmp_path / "beta"), hashes(finished)
    for name in theirs:
        if name.startswith("warm-up"):
            assert ours[name] == theirs[name], name
    for flags, word in (
        (["--seed", 43], "seed"),
        (["--sft-learning-rate", 0.01], "sft-learning-rate"),
    ):
        code, said = main_in_this_process(
            *SHORT, *flags, "--warm-up", finished, "--out", tmp_path / word
        )
        assert code == 2 and f"differs in {word}" in said
        assert not (tmp_path / word / "warm-up").exists()
    code, said = main_in_this_process(*SHORT, "--warm-up", tmp_path, "--out", tmp_path / "none")
    assert code == 2 and "no run with a finished warm-up" in said
