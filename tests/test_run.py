"""run.py: a whole run is one command, which can be stopped at any moment, asked, and pointed at the real thing."""

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
from dataclasses import asdict, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import decode
import run
import selftrain
import sft
from conftest import ROOT, hear_ctrl_c
from data.problems import Problem, read_jsonl, write_jsonl
from model import SIZES, T5, save_flan_t5

# Small enough for seconds, yet every stage has work: some samples are right, some are wrong.
SHORT = "--rounds 1 --limit 24 --sft-epochs 12 --dpo-steps 3 --st-samples 4 --max-new-tokens 60 --save-every 0".split()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run run.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a run but its log, which tells of restarts."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.jsonl", "lock", "lock-journal")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main_in_this_process(*arguments: object) -> tuple[int, str]:
    """run.py as a command, but without the second that a new process takes: its exit code and what it said on stderr."""
    said, before, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["run.py", *map(str, arguments)]
    gc.freeze()  # what exists by now need not be looked through afterwards
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
        gc.collect()  # and with what is left of it the lock of its folder
        gc.unfreeze()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One short run of both methods that nobody stopped."""
    out = tmp_path_factory.mktemp("finished") / "run"
    result = command(*SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def test_one_command_leaves_the_whole_run_on_disk(finished):
    """The contract on files: per round samples, pairs, pseudo-labels and checkpoints; results for people and programs."""
    for name in (
        "config.json", "log.jsonl", "results.json", "results.md", "warm-up/sft/pytorch_model.bin",
        "warm-up/sft/spiece.model", "warm-up/evaluation.jsonl", "st/round-1/samples-for-labels.jsonl",
        "st/round-1/pseudo-labels.jsonl", "st/round-1/sft/config.json", "dpo-st/round-1/samples-for-pairs.jsonl",
        "dpo-st/round-1/preference-pairs.jsonl", "dpo-st/round-1/samples-for-labels.jsonl",
        "dpo-st/round-1/pseudo-labels.jsonl", "dpo-st/round-1/sft/config.json", "dpo-st/round-1/evaluation.jsonl",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("*.partial"))


def test_the_numbers_of_a_run_add_up(finished):
    """Samples per question, accuracies and tables come from different code paths: a mix-up of stages would show here."""
    for name, count in (("st/round-1/samples-for-labels", 4), ("dpo-st/round-1/samples-for-pairs", 5),
                        ("dpo-st/round-1/samples-for-labels", 3)):  # fmt: skip
        rows = read_jsonl(finished / f"{name}.jsonl")
        assert len(rows) == 24 and all(len(row["rationales"]) == count for row in rows)
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["warm-up", "st/round-1", "dpo-st/round-1"]
    for stage, row in results.items():
        stored = read_jsonl(finished / stage / "evaluation.jsonl")
        assert row == selftrain.accuracies(stored)
        assert list(row) == ["held-out", "library", "orchard", "held-out without calculator"] and len(stored) == 4 * 24
    table = (finished / "results.md").read_text()
    assert "| SFT | 0 |" in table and "| ST | 1 |" in table and "| DPO-ST | 1 |" in table


def test_the_log_of_dpo_starts_at_log_two(finished):
    """The policy is its own reference before the first step; any other value means dropout or a wrong reference."""
    first = next(r for r in read_jsonl(finished / "log.jsonl") if r["stage"].endswith("/dpo") and r.get("step") == 1)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_same_command_again_repeats_nothing(finished):
    """Finished stages are read back, not made again: no file changes, and no stage is logged twice."""
    before, log = hashes(finished), (finished / "log.jsonl").read_bytes()
    assert command(*SHORT, "--out", finished).returncode == 0
    assert hashes(finished) == before and (finished / "log.jsonl").read_bytes() == log


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(finished, tmp_path, slow):
    """kill -9 in any stage, also in the midst of a training, then the same command: what is listed is whole, and a training
    goes on with the step after the last save, so the end is the same to the byte. --slow kills twenty times instead of three."""
    rng, out = random.Random(0), tmp_path / "run"
    arguments = [sys.executable, "run.py", *SHORT, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills, wanted, where = 0, 20 if slow else 3, []

    def listed() -> list[str]:
        sums = out / "sha256sums.txt"
        return sums.read_text().splitlines() if sums.exists() else []

    while kills < wanted:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines, deadline = listed(), time.time() + 60
        while process.poll() is None and time.time() < deadline and listed() == lines:
            time.sleep(0.02)  # let it come at least a little further, so that the kills spread over the run
        time.sleep(rng.uniform(0, 10 / wanted))
        assert process.poll() is None, f"the run ended before its {wanted} kills: {kills}, {where}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        where.append((listed() or ["nothing"])[-1].split()[-1])
    result = command(*SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    assert hashes(out) == hashes(finished), where
    assert any(".step-" in name for name in where), where


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_who_is_asked_to_stop_says_how_to_go_on(tmp_path, stop):
    """A scheduler's SIGTERM and a person's Ctrl-C are no errors: one sentence, and what was finished is listed."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    while process.poll() is None and not (out / "sha256sums.txt").exists() or ".step-" not in (out / "sha256sums.txt").read_text():
        time.sleep(0.02)
    process.send_signal(stop)
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command continues" in words and "Traceback" not in words
    assert ".step-" in (out / "sha256sums.txt").read_text()


def test_two_runs_in_one_folder(finished, tmp_path):
    """The second would write the first one's files by turns with it; it says so at once instead."""
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (out / "sha256sums.txt").exists():
        time.sleep(0.02)
    result = command(*SHORT, "--out", out)
    first.kill()
    first.wait()
    assert result.returncode == 2 and "another process is at work" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files, in place of a full disk")
def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_finished(finished, tmp_path):
    """Files may not grow beyond 64 kB: the first save fails as on a full disk. With room again, the same command goes on."""
    import resource

    out, limit = tmp_path / "run", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    result = subprocess.run([sys.executable, "run.py", *SHORT, "--out", str(out)], cwd=ROOT, preexec_fn=limit, capture_output=True,
                            text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "File too large" in result.stderr and "the same command continues" in result.stderr
    assert not (out / "warm-up/sft").exists() and (out / "sha256sums.txt").read_text() == ""
    assert command(*SHORT, "--rounds", 0, "--method", "st", "--out", out).returncode == 0


def test_a_damaged_run_is_refused_by_name(finished, tmp_path):
    """Every file that a run is built on, one after another: a bit flipped, the end lost, the file gone."""
    shutil.copytree(finished, tmp_path / "run")
    names = [line.split("  ")[1] for line in (finished / "sha256sums.txt").read_text().splitlines()]
    assert len(names) > 15
    for number, name in enumerate([*names, "config.json", "sha256sums.txt"]):
        path, kind = tmp_path / "run" / name, number % 3
        whole = path.read_bytes()
        if kind == 0:
            path.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
        elif kind == 1:
            path.write_bytes(whole[:-9])
        else:
            path.unlink()
        code, words = main_in_this_process(*SHORT, "--out", tmp_path / "run")
        assert code == 2 and "Traceback" not in words and name.split("/")[-1] in words, (name, words)
        path.write_bytes(whole)
    assert main_in_this_process(*SHORT, "--out", tmp_path / "run")[0] == 0


def test_other_numbers_in_the_same_folder_are_refused(finished):
    """Mixing stages of two settings in one folder would be a result of neither."""
    result = command(*SHORT, "--out", finished, "--beta", "0.3")
    assert result.returncode == 2 and "--beta" in result.stderr and "Traceback" not in result.stderr


def test_a_memory_limit_may_be_lowered_when_a_run_goes_on(finished, tmp_path):
    """The advice `use a batch size of at most N` must be possible to follow without starting all over."""
    shutil.copytree(finished, tmp_path / "run")
    sums = tmp_path / "run/sha256sums.txt"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:-1]))  # the last evaluation is to be made again
    result = command(*SHORT, "--out", tmp_path / "run", "--decode-batch-size", 16, "--micro-batch-tokens", 1024)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/dpo-st/round-1/evaluation.jsonl").is_file()


def test_a_run_in_bf16_keeps_its_checkpoints_in_fp32(tmp_path):
    """Every stage takes the flag, DPO still starts near log 2 (gradients take another attention kernel than the reference, and
    bf16 rounds each by its own), and the next round trains weights that have lost no digit."""
    code, said = main_in_this_process(*SHORT, "--method", "dpo-st", "--bf16", "--out", tmp_path / "run")
    assert code == 0, said
    first = next(record for record in read_jsonl(tmp_path / "run/log.jsonl") if "reward_margin" in record)
    assert first["loss"] == pytest.approx(0.6931, abs=0.05)
    for name in ("warm-up/sft", "dpo-st/round-1/dpo", "dpo-st/round-1/sft"):
        state = torch.load(tmp_path / "run" / name / "pytorch_model.bin", weights_only=True)
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}, name


@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_the_model_of_a_finished_run_can_be_asked(finished, flags):
    """A run's checkpoint is all that decode.py needs; piped output carries no colour codes."""
    result = subprocess.run(
        [sys.executable, "decode.py", *flags, "--checkpoint", finished / "dpo-st/round-1/sft", "How many are 3 + 4?"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stdout and "\033" not in result.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "huge"], "tiny"),
        (["--rounds", "-1"], "--rounds"),
        (["--sft-batch-size", "0"], "--sft-batch-size"),
        (["--beta", "nan"], "--beta"),
        (["--percentile", "150"], "--percentile"),
        (["--held-out", "1"], "--held-out"),
        (["--weights", "no/such/folder"], "no/such/folder"),
        (["--labeled", "no/such/file", "--test", "mine=no/such/file"], "no/such/file"),
        (["--labeled", "no/such/file"], "--test"),
        (["--labeled", "no/such/file", "--test", "no/such/file"], "--test NAME=FILE"),
        (["--labeled", "no/such/file", "--test", "a=b", "--test", "a=c"], "each name once"),
        (["extra"], "--help"),
        (["--sead", "3"], "--seed"),
        (["--dpo-learning_rate=1"], "--dpo-learning-rate"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    """A traceback tells a newcomer nothing: the message names what was given and what to do."""
    result = command("--out", tmp_path / "run", *arguments)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 400


def test_a_first_command_that_fails_does_not_claim_the_folder(tmp_path):
    """The corrected command must not be told that the folder belongs to a run with other numbers."""
    result = command("--weights", "no/such/folder", "--out", tmp_path / "run")
    assert result.returncode == 2 and not (tmp_path / "run").exists()


def write_problems(path: Path, problems: list) -> Path:
    write_jsonl(map(asdict, problems), path)
    return path


TALLER = "Ana is taller than Ben. Ben is taller than Carl. Who is {}?"
OWN = ["--sft-epochs", 2, "--dpo-steps", 2, "--rounds", 1, "--method", "dpo-st", "--dpo-samples", 3, "--max-new-tokens", 30]


def test_your_own_problems_with_answers_in_words(tmp_path):
    """Ten problems that a teacher types in, other questions without rationales, a test; the answer is a name."""
    labeled = [Problem(f"{i}: {TALLER.format('tallest')}", "Ana", "Ana is taller than Ben.\n#### Ana") for i in range(10)]
    unlabeled = [Problem(f"{i}: {TALLER.format('tallest')} Say it.", "ana") for i in range(4)]
    test = [Problem("The test: " + TALLER.format("tallest"), "ANA"), Problem("The test: " + TALLER.format("shortest"), "Carl")]
    files = ["--labeled", write_problems(tmp_path / "l.jsonl", labeled), "--unlabeled", write_problems(tmp_path / "u.jsonl", unlabeled)]
    files += ["--test", f"taller={write_problems(tmp_path / 't.jsonl', test)}"]
    code, words = main_in_this_process(*files, *OWN, "--out", tmp_path / "run")
    assert code == 0, words
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["warm-up"]) == {"taller", "taller without calculator"}
    assert len(read_jsonl(tmp_path / "run/dpo-st/round-1/samples-for-pairs.jsonl")) == 4


def test_what_a_model_cannot_learn_to_write_is_counted_before_it_is_trained(tmp_path):
    """A rationale longer than what is ever written has no end, an answer with a sign that the vocabulary lacks cannot be spelled: the
    accuracy of 0 that follows would be a riddle."""
    names = [("Ana", "She is.\n#### Ana"), ("Ana", "She is. " * 20 + "\n#### Ana"), ("Zoë", "She is.\n#### Zoë")]
    labeled = [Problem(f"Who is number {i}?", answer, rationale) for i, (answer, rationale) in enumerate(names)]
    files = ["--labeled", write_problems(tmp_path / "l.jsonl", labeled)]
    files += ["--test", f"who={write_problems(tmp_path / 't.jsonl', [Problem('Who?', 'Ana')])}"]
    result = command(*files, *OWN, "--rounds", 0, "--out", tmp_path / "run")
    assert "Rationales over 30 tokens: 1, with unknown signs: 1\n" in result.stdout, result.stderr


def test_questions_in_both_training_and_test_are_refused_unless_allowed(tmp_path):
    """A score on questions that were trained on says nothing; found after a week of training it is too late."""
    shared = Problem("How many are 2 + 3?", 5.0, "2 + 3 = <<2+3=5>>5\n#### 5")
    labeled = write_problems(tmp_path / "l.jsonl", [shared, Problem("How many are 2 + 4?", 6.0, "2 + 4 = <<2+4=6>>6\n#### 6")])
    test = write_problems(tmp_path / "t.jsonl", [shared, Problem("How many are 2 + 5?", 7.0)])
    files = ["--labeled", labeled, "--test", f"mine={test}", *OWN, "--out", tmp_path / "run"]
    code, words = main_in_this_process(*files)
    assert code == 2 and "mine: 1 question" in words and "2 + 3" in words and "--allow-leakage" in words
    assert not (tmp_path / "run").exists()
    code, words = main_in_this_process(*files, "--allow-leakage")
    assert code == 0, words
    write_problems(test, [replace(shared, answer=50.0, rationale=None)])  # another file under the same name
    result = command(*files, "--allow-leakage")
    assert result.returncode == 2 and "a run with other problems" in result.stderr and "another --out" in result.stderr


def test_a_large_model_on_a_cpu_says_first_what_it_will_take(tmp_path, monkeypatch, capsys):
    """Nobody should find out on the third day. The sentence comes before the weights are fetched."""
    def fetch(size):
        raise OSError("stopped here")

    labeled = write_problems(tmp_path / "l.jsonl", [Problem("How many are 2 + 4?", 6.0, "2 + 4 = <<2+4=6>>6\n#### 6")] * 1000)
    test = write_problems(tmp_path / "t.jsonl", [Problem("How many are 2 + 5?", 7.0)])
    monkeypatch.setattr(run, "fetch_flan_t5", fetch)
    monkeypatch.setattr(sys, "argv", ["run.py", "--size", "base", "--device", "cpu", "--labeled", str(labeled), "--test", f"t={test}"])
    with pytest.raises(OSError):
        run.main()
    assert "21.2 hours" in (said := capsys.readouterr().out) and "--size tiny" in said, said


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    """Its last ids would index past the embedding: a crash in the middle of a batch, on a GPU without a word."""
    save_flan_t5(T5(replace(SIZES["tiny"], vocab_size=300)), tmp_path / "model")
    shutil.copy(ROOT / "data/tiny/spiece.model", tmp_path / "model")
    result = command("--weights", tmp_path / "model", "--out", tmp_path / "run")
    assert result.returncode == 2 and "vocabulary" in result.stderr and "Traceback" not in result.stderr


def test_two_hundred_broken_lines_are_refused_with_their_number(tmp_path):
    """A bad line in somebody's file is named by file and number, before anything is trained; skipped, it would change the
    training set without a word."""
    good = '{"question": "How many are 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\\n#### 2"}'
    rng, path = random.Random(0), tmp_path / "train.jsonl"
    for number in range(200):
        broken = bytearray(good.encode())
        kind = number % 4
        if kind == 0:  # cut short
            del broken[rng.randrange(1, len(broken)) :]
        elif kind == 1:  # a piece lost in the frame of the object
            at = rng.choice([0, 1, broken.index(b":"), broken.index(b","), len(broken) - 1])
            del broken[at : at + rng.randint(1, 3)]
        elif kind == 2:  # no text in any encoding
            broken[rng.randrange(2, len(broken))] = rng.choice([0xFF, 0xC0, 0x80])
        else:  # well-formed, and wrong
            broken = rng.choice([b"5", b"[]", b"null", b'{"question": 5, "answer": "#### 2"}', b'{"question": "", "answer": "#### 2"}',
                                 b'{"question": "q"}', b'{"question": "q", "answer": "7 apples"}', b'{"question": "q", "answer": NaN}',
                                 b'{"question": "q", "answer": "#### 2", "ans": 3}', b'{"question": "q", "answer": true}'])  # fmt: skip
        lines = [good.encode()] * rng.randint(0, 5)
        path.write_bytes(b"\n".join([*lines, bytes(broken), good.encode()]))
        code, words = main_in_this_process("--labeled", path, "--test", f"mine={path}", "--out", tmp_path / "run")
        assert code == 2 and f"train.jsonl, line {len(lines) + 1}:" in words and words.count("\n") == 1, (bytes(broken), words)
    assert not (tmp_path / "run").exists()


def test_fifty_broken_checkpoints_are_refused_in_one_sentence(tmp_path):
    """--weights on a folder of which something was lost on the way. (What each sentence names: tests/test_model.py.)"""
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
            victim.write_bytes(content[: rng.randrange(len(content) * 9 // 10)] if number % 3 == 1 else rng.randbytes(len(content)))
        code, words = main_in_this_process("--weights", folder, "--limit", 2, "--out", tmp_path / f"run-{number}")
        assert code == 2 and words.count("\n") == 1 and "Traceback" not in words, (victim, words)


def test_out_of_memory_says_which_number_to_lower(tmp_path, monkeypatch):
    """What CUDA says is ten lines about allocators; the reader needs the name of a flag, and that nothing is lost."""
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"), RuntimeError("[enforce fail]: can't allocate memory")):

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(selftrain, "generate", fail)
        out = tmp_path / type(error).__name__
        code, words = main_in_this_process("--limit", 2, "--sft-epochs", 1, "--out", out)
        assert code == 2 and "--micro-batch-tokens" in words and "--decode-batch-size" in words and words.count("\n") == 1
        assert "warm-up/sft/" in (out / "sha256sums.txt").read_text()


def test_every_hyper_parameter_of_the_paper_is_a_flag_with_that_default():
    """Table 5 and section 4.2, number by number: the defaults of --size base are the paper."""
    config, out = run.parse_args(["--size", "base", "--device", "cpu"])
    assert out == Path("runs/base-seed-42")
    assert (config.rounds, config.dpo_samples, config.sft_samples, config.temperature, config.top_k) == (3, 5, 3, 0.7, 50)
    assert (config.sft_epochs, config.sft_learning_rate, config.sft_batch_size) == (8, 3e-4, 96)
    assert (config.dpo_steps, config.dpo_learning_rate, config.dpo_batch_size, config.beta) == (150, 7e-7, 96, 0.1)
    assert (config.warmup_ratio, config.final_ratio, config.weight_decay, config.max_grad_norm) == (0.1, 0.1, 0.01, 1.0)
    assert (config.max_new_tokens, config.method, config.seed) == (300, "dpo-st", 42)
    text = command("--help").stdout
    assert all("--" + item.name.replace("_", "-") in text for item in run.OPTIONS)


@pytest.mark.parametrize("words, meant", [
    ("--devise cpu", "--device"), ("--samples 5", "--st-samples or --sft-samples or --dpo-samples"), ("--no-calculater", "--no-calculator"),
    ("--sft-learning=1e-3", "--sft-learning-rate"), ("base", "--help"), ("--xyz", "--help"),
])  # fmt: skip
def test_a_mistyped_option_is_answered_by_options_only(capsys, words, meant):
    """Words of the help text are near, too: `run.py base` was asked whether it meant base."""
    with pytest.raises(SystemExit):
        run.parse_args(words.split())
    assert f"there is no {words.split()[0]}; did you mean {meant}" in capsys.readouterr().err


def test_sampling_at_temperature_0_is_refused(capsys):
    """All samples of a question would be the same greedy text: no pair in it, so that DPO is skipped, hours later."""
    with pytest.raises(SystemExit):
        run.parse_args(["--temperature", "0"])
    assert "--temperature must be a number from 0.01" in capsys.readouterr().err


def test_the_paper_has_the_same_numbers_wherever_they_are_defaults():
    """Functions can be called without a Config: their defaults must not drift away from the documented ones."""
    config, _ = run.parse_args(["--size", "base", "--device", "cpu"])
    config.micro_batch_tokens, config.decode_batch_size = run.batch_sizes(config, SIZES["base"], 0)
    schedule = sft.Schedule(config.sft_learning_rate)
    for item in fields(sft.Schedule)[2:]:
        assert getattr(schedule, item.name) == getattr(config, item.name), item.name
    assert (decode.TOP_K, decode.MAX_NEW_TOKENS) == (config.top_k, config.max_new_tokens)
    rules = selftrain.MAX_SIMILARITY, selftrain.N_PAIRS, selftrain.PERCENTILE
    assert rules == (config.max_similarity, config.n_pairs, config.percentile)


def test_the_real_checkpoint_and_real_gsm8k_run_every_stage(shared, tmp_path, slow):
    """Real vocabulary, real questions, public layout: the path of --size base without the download."""
    if not slow:
        limits = ["--limit", "4", "--sft-epochs", "1", "--dpo-steps", "1", "--dpo-samples", "2", "--sft-samples", "1", "--max-new-tokens", "60"]
    else:
        limits = ["--limit", "64"]
    data = shared / "data"
    tests = [f"--test={name}={data / name.lower() / 'test.jsonl'}" for name in run.TESTS]
    result = command(
        "--weights", shared / "mini-flan-t5", "--labeled", data / "gsm8k/train.jsonl", *tests, "--rounds", 1, *limits, "--out", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["warm-up"]) == {"GSM8K", "MultiArith", "ASDiv", "SVAMP", "GSM8K without calculator"}


def test_size_base_fetches_checks_and_starts(shared, tmp_path):
    """The real command against a local server in the part of the public hosts, with a small checkpoint in base's place.

    The second start asks the hosts for nothing; one flipped byte in the weights is noticed and nothing of it is kept."""
    data, sources, mini = shared / "data", shared / "sources", shared / "mini-flan-t5"
    Hosts.files = {f"{part}.jsonl": data / "gsm8k" / f"{part}.jsonl" for part in ("train", "dev", "test")}
    Hosts.files |= {name: sources / name for name in ("MultiArith.json", "ASDiv.xml", "SVAMP.json")}
    Hosts.files |= {path.name: path for path in mini.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hosts)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    hosts = {"DPO_ST_GITHUB": url, "HF_ENDPOINT": url, "DPO_ST_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path),
             "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    start = ["--size", "base", "--device", "cpu", "--rounds", 1, "--limit", 2, "--sft-epochs", 1, "--dpo-steps", 1,
             "--max-new-tokens", 20, "--out"]  # fmt: skip
    result = command(*start, tmp_path / "first", **hosts)
    assert result.returncode == 0, result.stderr
    assert "| DPO-ST, paper | 3 | 27.2 | " in (tmp_path / "first/results.md").read_text()
    assert len(Hosts.asked) == 9, Hosts.asked
    assert command(*start, tmp_path / "second", **hosts).returncode == 0
    assert len(Hosts.asked) == 9, "what is in the cache was fetched again"
    broken = bytearray((mini / "model.safetensors").read_bytes())
    broken[-1] ^= 1
    (tmp_path / "broken").write_bytes(broken)
    Hosts.stated = {"model.safetensors": hashlib.sha256((mini / "model.safetensors").read_bytes()).hexdigest()}
    Hosts.files["model.safetensors"] = tmp_path / "broken"
    result = command(*start, tmp_path / "third", **{**hosts, "DPO_ST_CACHE": str(tmp_path / "other")})
    server.shutdown()
    assert result.returncode == 2 and "model.safetensors" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "other").rglob("*.safetensors"))


class Hosts(BaseHTTPRequestHandler):
    """Plays the two public hosts: GitHub's raw files and the model hub with its checksum header and redirect."""

    files: dict[str, Path] = {}
    stated: dict[str, str] = {}  # checksums that differ from what is sent
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
            self.send_header("X-Linked-ETag", f'"{self.stated.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()}"')
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
