"""Several processes: torchrun is the whole interface, and what comes out is what one process makes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from model import load_flan_t5

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(n: int, *arguments: object, **options) -> subprocess.Popen:
    """torchrun with n processes, or plain python for one."""
    begin = [*TORCHRUN, str(n)] if n > 1 else [sys.executable]
    return subprocess.Popen([*begin, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    """The same work by 1, 2 and 4 processes, and by two that share every matrix between them; with dropout."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(ROOT / "data/tiny", folder / "base")
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps(config | {"dropout_rate": 0.1}))
    for name, n, *flags in (("1", 1), ("2", 2), ("4", 4), ("shard", 2, "--shard")):
        process = start(n, "tests/processes.py", folder / "base", folder / name, *flags)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    return {name: folder / name for name in ("1", "2", "4", "shard")}


def curves(folder: Path, stage: str) -> dict[str, list[float]]:
    """Every number of a training's log, step by step."""
    logs = [record for record in json.loads((folder / "logs.json").read_text()) if record["stage"] == stage]
    return {key: [record[key] for record in logs] for key in logs[0] if key != "stage"}


@pytest.mark.parametrize("name", ["2", "4", "shard"])
def test_losses_are_those_of_one_process(results, name):
    """The global batch is what the paper's learning rate was made for, so it must not grow with the processes; dropout,
    too, must fall where it falls in one process. Batches of one example leave most processes without work."""
    for stage, steps in (("sft", 12), ("dpo", 5)):
        expected, found = curves(results["1"], stage), curves(results[name], stage)
        assert expected.keys() == found.keys() and len(found["loss"]) == steps
        for key in expected:
            tolerance = 1e-5 if "loss" in key else 1e-3
            assert found[key] == pytest.approx(expected[key], abs=tolerance, rel=1e-4 if key == "grad_norm" else 0), key


@pytest.mark.parametrize("name", ["2", "4", "shard"])
def test_a_slow_process_finds_what_the_others_found(results, name):
    """Whether a stage is done is asked of the disk, which process 0 changes: it must wait until all have looked, or one skips
    the work that the others do together, and all wait for each other for ever."""
    assert (results[name] / "killed.jsonl").read_bytes() == (results["1"] / "killed.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["2", "4", "shard"])
def test_rationales_are_the_same_to_the_byte(results, name):
    """Sampled or greedy. Parts are cut before they are dealt, so every batch is the same one, and nothing is left to
    rounding at near-ties."""
    for file in ("samples.jsonl", "evaluation.jsonl"):
        assert (results[name] / file).read_bytes() == (results["1"] / file).read_bytes()
    rows = [json.loads(line) for line in (results["1"] / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 31 and len({text for row in rows for text in row["rationales"]}) > 45


@pytest.mark.parametrize("name", ["2", "4", "shard"])
def test_checkpoints_are_whole_and_those_of_one_process(results, name):
    """Whoever trained it, with however many shares: one public checkpoint, written by one process, and listed."""
    for stage in ("sft", "dpo"):
        ours, expected = (load_flan_t5(results[key] / stage) for key in (name, "1"))
        for (key, a), b in zip(ours.state_dict().items(), expected.parameters()):
            torch.testing.assert_close(a, b.detach(), atol=2e-4, rtol=1e-3, msg=key)
    assert not list(results[name].rglob("*.partial")) and not list(results[name].glob("*.parts"))
    listed = {line.split("  ")[1] for line in (results[name] / "sha256sums.txt").read_text().splitlines()}
    assert listed == {f"{s}/{f}" for s in ("sft", "dpo") for f in ("config.json", "pytorch_model.bin", "spiece.model")} | {
        "samples.jsonl", "evaluation.jsonl", "killed.jsonl"
    }  # fmt: skip


RUN = ["run.py", *"--rounds 1 --limit 20 --sft-epochs 30 --dpo-steps 2 --method dpo-st --max-new-tokens 40 --save-every 0".split()]


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.02)
    assert condition(), "the run never came that far"


def children(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    text = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in text.splitlines() if "run.py" in line]


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps, to find the processes that torchrun started")
def test_a_process_that_dies_takes_the_run_down_and_the_same_command_goes_on(tmp_path):
    """The kernel kills one of them for want of memory: the others must not wait for it for ever, and what was saved by two
    is continued by one, in the middle of a training."""
    out = tmp_path / "run"
    process = start(2, *RUN, "--out", out)
    wait_for(lambda: list(out.glob("warm-up/sft.step-*")), process)
    began = time.time()
    os.kill(children(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 60
    process = start(1, *RUN, "--out", out)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["stage"] == "warm-up/sft"]
    assert steps[0] == 1 and min(steps[1:]) > 1, "the training began anew"
    assert "| DPO-ST | 1 |" in output and not list(out.rglob("*.step-*"))


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps, to find the processes that torchrun started")
def test_a_process_that_hangs_is_not_waited_for_for_ever(tmp_path, slow):
    """A machine that is up but does not answer, here stopped by SIGSTOP: after --timeout the others say so and end. (Some
    40 seconds more go by until torchrun has killed the stopped one, so this runs with --slow.)"""
    if not slow:
        pytest.skip("takes a minute: only with --slow")
    out = tmp_path / "run"
    process = start(2, *RUN, "--timeout", 0.1, "--out", out)
    wait_for(lambda: list(out.glob("warm-up/sft.step-*")), process)
    began = time.time()
    os.kill(children(process)[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - began < 60
    assert "another process has ended, or needs more than --timeout" in output and "the same command continues" in output
