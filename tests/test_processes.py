"""Several processes: torchrun is the whole interface, and what comes out is what one process makes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import load_flan_t5
from tests.conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(n: int, *arguments: object, **options) -> subprocess.Popen:
    """torchrun with n processes, or plain python for one."""
    begin = [*TORCHRUN, str(n)] if n > 1 else [sys.executable]
    return subprocess.Popen(
        [*begin, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    """The same work by 1, 2 and 4 processes. The bundled model has no dropout, whose draw would differ."""
    folder = tmp_path_factory.mktemp("processes")
    for n in (1, 2, 4):
        process = start(n, "tests/processes.py", ROOT / "data" / "tiny", folder / str(n))
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    return {str(n): folder / str(n) for n in (1, 2, 4)}


def test_nothing_at_exit_turns_success_into_failure(results):
    """torchrun reports a failed run if a process aborts after its last line, as torch's own threads
    sometimes make it do. The processes of `results` are made to abort at every ordinary exit."""
    assert all((results[n] / "logs.json").exists() for n in ("2", "4"))


def test_a_sigterm_during_exit_adds_no_second_message(tmp_path):
    """torchrun sends one to every process when the first has failed, perhaps while they are exiting."""
    script = (
        "import atexit, os, runpy, signal, sys; "
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM); "
        "sys.argv = ['run.py', '--weights', 'no/such/folder', '--out', sys.argv[1]]; "
        "runpy.run_path('run.py', run_name='__main__')"
    )
    process = start(1, "-c", script, tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "no/such/folder" in output
    assert len(output.splitlines()) == 1, output


def curves(folder: Path, stage: str) -> dict[str, list[float]]:
    """Every number of a training's log, step by step."""
    logs = [
        record
        for record in json.loads((folder / "logs.json").read_text())
        if record["stage"] == stage
    ]
    return {key: [record[key] for record in logs] for key in logs[0] if key != "stage"}


@pytest.mark.parametrize("name", ["2", "4"])
def test_losses_are_those_of_one_process(results, name):
    """The global batch is what the paper's learning rate was made for, so it must not grow with the
    processes. Batches of one example leave most processes without work."""
    for stage, steps in (("sft", 12), ("dpo", 5)):
        expected, found = curves(results["1"], stage), curves(results[name], stage)
        assert expected.keys() == found.keys() and len(found["loss"]) == steps
        for key in expected:
            tolerance = 1e-5 if key == "loss" else 1e-3
            assert found[key] == pytest.approx(
                expected[key], abs=tolerance, rel=1e-4 if key == "grad_norm" else 0
            ), key


@pytest.mark.parametrize("name", ["2", "4"])
def test_rationales_are_the_same_but_for_near_ties(results, name):
    """Sampled or greedy: own randomness per rationale, and all in their places, also where there are
    fewer problems than processes."""
    for file in ("samples.jsonl", "evaluation.jsonl"):
        rows, expected = (
            [json.loads(line) for line in (results[key] / file).read_text().splitlines()]
            for key in (name, "1")
        )
        assert [row["question"] for row in rows] == [row["question"] for row in expected]
        texts = [
            (a, b) for x, y in zip(rows, expected) for a, b in zip(x["rationales"], y["rationales"])
        ]
        assert sum(a != b for a, b in texts) <= len(texts) // 50
    assert len({a for a, _ in texts}) > 10


@pytest.mark.parametrize("name", ["2", "4"])
def test_checkpoints_are_whole_and_those_of_one_process(results, name):
    """Whoever trained it: one public checkpoint, written by one process."""
    for stage in ("sft", "dpo"):
        ours, expected = (load_flan_t5(results[key] / stage) for key in (name, "1"))
        for (key, a), b in zip(ours.state_dict().items(), expected.parameters()):
            torch.testing.assert_close(a, b.detach(), atol=2e-4, rtol=1e-3, msg=key)
    assert not list(results[name].rglob("*unfinished*"))


RUN = [
    "run.py",
    *"--rounds 1 --limit 20 --sft-epochs 30 --dpo-steps 2 --method dpo-st --max-new-tokens 40".split(),
]


def own_tracebacks(output: str) -> int:
    """How many there are besides the one in which torchrun says that a process has failed."""
    return output.count("Traceback") - output.count("ChildFailedError(")


def children(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    text = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in text.splitlines() if "run.py" in line]


@pytest.mark.skipif(
    shutil.which("ps") is None, reason="needs ps, to find the processes that torchrun started"
)
def test_a_process_that_dies_takes_the_run_down_and_the_same_command_goes_on(tmp_path):
    """The kernel kills one of them for want of memory: the others must not wait for it for ever, and say
    so in one sentence; what was finished by two is continued by one."""
    out = tmp_path / "run"
    process = start(4, *RUN, "--out", out)
    deadline = time.time() + 90
    while (
        not (out / "warm-up" / "evaluation.jsonl").exists()
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.02)
    assert (out / "warm-up" / "evaluation.jsonl").exists(), "the run never came that far"
    began = time.time()
    os.kill(children(process)[2], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 60
    assert output.count("run.py: ") == 1 and "the same command continues" in output, output
    assert own_tracebacks(output) == 0, output
    warm_up = (out / "warm-up/sft/pytorch_model.bin").stat().st_mtime_ns
    process = start(1, *RUN, "--out", out)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "| DPO-ST | 1 |" in output
    assert (out / "warm-up/sft/pytorch_model.bin").stat().st_mtime_ns == warm_up, (
        "the warm-up was made again"
    )


def test_a_fault_of_one_is_told_once(tmp_path):
    """All processes read the same wrong command; and one whose disk is full must not leave the others
    waiting. Neither is a traceback."""
    process = start(2, "run.py", "--weights", "no/such/folder", "--out", tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and output.count("run.py: ") == 1 and "no/such/folder" in output
    assert own_tracebacks(output) == 0, output


def test_the_job_for_a_cluster_stops_requeues_and_continues(tmp_path):
    """The job in data/README.md, with two processes in place of eight GPUs and a queue that only takes notes: bash
    accepts it, SIGTERM ends the run in one sentence, the job is queued again, and the next one continues."""
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    job = text.partition("```bash\n")[2].partition("```")[0]
    assert job.count("#SBATCH") == 8 and "run.py --size large --rounds 3" in job
    brief = " ".join(RUN).replace("--sft-epochs 30", "--sft-epochs 6")
    torchrun = f"{shlex.join(TORCHRUN)} 2 {brief}"
    job = job.replace(
        "torchrun --nproc-per-node 8 run.py --size large --rounds 3", torchrun
    ).replace("runs/large", str(tmp_path / "run"))
    (tmp_path / "job").write_text(job)
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho $* > {tmp_path}/queued\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert subprocess.run(["bash", "-n", tmp_path / "job"]).returncode == 0
    environment = ENVIRONMENT | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_NUM_TASKS": "1",
    }
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE}
    first = subprocess.Popen(["bash", str(tmp_path / "job")], stderr=subprocess.STDOUT, **options)
    deadline = time.time() + 90
    while not (tmp_path / "run" / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert (tmp_path / "queued").read_text() == "requeue 7\n", output
    assert "stopped; the same command continues" in output, output
    assert f'{ROOT}/run.py", line' not in output  # torchrun shows a traceback of its own
    second = subprocess.run(["bash", str(tmp_path / "job")], timeout=200, **options)
    assert "| DPO-ST | 1 |" in second.stdout
