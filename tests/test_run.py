"""run.py: a whole run is one command, which can be stopped at any moment, asked, and pointed at the real thing."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import decode
import run
import selftrain
import sft
from conftest import ROOT
from data.problems import read_jsonl
from model import SIZES, T5, save_flan_t5

# Small enough for seconds, yet every stage has work: some samples are right, some are wrong.
SHORT = "--rounds 1 --limit 30 --sft-epochs 20 --dpo-steps 3".split()


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run run.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a run but its log, which tells of restarts."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    for name, count in (("st/round-1/samples-for-labels", 8), ("dpo-st/round-1/samples-for-pairs", 5),
                        ("dpo-st/round-1/samples-for-labels", 3)):  # fmt: skip
        rows = read_jsonl(finished / f"{name}.jsonl")
        assert len(rows) == 30 and all(len(row["rationales"]) == count for row in rows)
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["warm-up", "st/round-1", "dpo-st/round-1"]
    for stage, row in results.items():
        stored = read_jsonl(finished / stage / "evaluation.jsonl")
        assert row == {r["test"]: round(r["accuracy"], 2) for r in stored}
        assert list(row) == ["held-out", "held-out without calculator"]
        assert all(len(r["rationales"]) == 30 for r in stored)
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


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(finished, tmp_path):
    """kill -9 in any stage, then the same command: what has its name is complete, so the end is the same to the byte."""
    rng, out = random.Random(0), tmp_path / "run"
    arguments = [sys.executable, "run.py", *SHORT, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stages = len(list(out.rglob("*.jsonl")))
        deadline = time.time() + 60
        while process.poll() is None and time.time() < deadline and len(list(out.rglob("*.jsonl"))) <= stages:
            time.sleep(0.02)  # let it come at least one stage further, so that the kills spread over the run
        time.sleep(rng.uniform(0, 0.7))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 4, "the run ended before it could be killed"
    result = command(*SHORT, "--out", out)
    assert result.returncode == 0, result.stderr
    assert hashes(out) == hashes(finished)


def test_other_numbers_in_the_same_folder_are_refused(finished):
    """Mixing stages of two settings in one folder would be a result of neither."""
    result = command(*SHORT, "--out", finished, "--beta", "0.3")
    assert result.returncode == 2 and "--beta" in result.stderr and "Traceback" not in result.stderr


def test_a_memory_limit_may_be_lowered_when_a_run_goes_on(finished, tmp_path):
    """The advice `use a batch size of at most N` must be possible to follow without starting all over."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/dpo-st/round-1/evaluation.jsonl").unlink()
    result = command(*SHORT, "--out", tmp_path / "run", "--decode-batch-size", 16, "--micro-batch-tokens", 1024)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/dpo-st/round-1/evaluation.jsonl").is_file()


def test_the_model_of_a_finished_run_can_be_asked(finished):
    """A run's checkpoint is all that decode.py needs; piped output carries no colour codes."""
    result = subprocess.run(
        [sys.executable, "decode.py", "--checkpoint", finished / "dpo-st/round-1/sft", "How many are 3 + 4?"],
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
        (["--data", "no/such/folder"], "no/such/folder"),
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


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    """Its last ids would index past the embedding: a crash in the middle of a batch, on a GPU without a word."""
    save_flan_t5(T5(replace(SIZES["tiny"], vocab_size=300)), tmp_path / "model")
    shutil.copy(ROOT / "data/tiny/spiece.model", tmp_path / "model")
    result = command("--weights", tmp_path / "model", "--out", tmp_path / "run")
    assert result.returncode == 2 and "vocabulary" in result.stderr and "Traceback" not in result.stderr


def test_broken_data_is_refused_with_its_line(tmp_path):
    """A bad line in somebody's file is named by file and number, before anything is trained."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n{"question": 5}\n')
    result = command("--data", tmp_path, "--out", tmp_path / "run")
    assert result.returncode == 2 and "train.jsonl, line 2" in result.stderr and "Traceback" not in result.stderr


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
    assert all(run.flag(item.name) in text for item in run.NUMBERS)


def test_the_paper_has_the_same_numbers_wherever_they_are_defaults():
    """Functions can be called without a Config: their defaults must not drift away from the documented ones."""
    config, _ = run.parse_args(["--size", "base", "--device", "cpu"])
    schedule = sft.Schedule(config.sft_learning_rate)
    for item in fields(sft.Schedule)[2:]:
        assert getattr(schedule, item.name) == getattr(config, item.name), item.name
    assert (decode.TOP_K, decode.MAX_NEW_TOKENS) == (config.top_k, config.max_new_tokens)
    rules = selftrain.MAX_SIMILARITY, selftrain.N_PAIRS, selftrain.PERCENTILE
    assert rules == (config.max_similarity, config.n_pairs, config.percentile)


def test_the_real_checkpoint_and_real_gsm8k_run_every_stage(shared, tmp_path):
    """Real vocabulary, real questions, public layout: the path of --size base without the download."""
    if os.environ.get("SLOW_TESTS") is None:
        limits = ["--limit", "4", "--sft-epochs", "1", "--dpo-steps", "1", "--dpo-samples", "2", "--sft-samples", "1"]
    else:
        limits = ["--limit", "64"]
    result = command(
        "--weights", shared / "mini-flan-t5", "--data", shared / "data", "--rounds", 1, *limits, "--out", tmp_path / "run"
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
