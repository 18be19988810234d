"""What one of several processes does in tests/test_processes.py: each kind of work once, from one checkpoint.

torchrun --nproc-per-node 2 tests/processes.py BASE OUT
"""

import atexit
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.processes import from_process_0, rank_and_count, share_work, start_processes
from data.synthetic import make_problems
from data.terminal import run_command
from dpo import PreferencePair
from run import parse_args
from selftrain import Experiment
from tokenizer import Tokenizer, format_rationale

CONFIG = parse_args(
    "--sft-epochs 3 --sft-learning-rate 1e-3 --sft-batch-size 10 --dpo-steps 5 --dpo-learning-rate 1e-4 "
    "--dpo-batch-size 10 --beta 0.5 --temperature 1.5 --max-new-tokens 40 --micro-batch-tokens 400 "
    "--decode-batch-size 8 --log-every 1 --device cpu".split()
)


def main() -> None:
    base, out = map(Path, sys.argv[1:3])
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    start_processes("cpu")
    rank, n_processes = rank_and_count()
    logs = []
    problems = [replace(p, rationale=format_rationale(p.rationale)) for p in make_problems(31, 0)]
    known = make_problems(31, seed=1, steps=(1,))  # the bundled checkpoint answers these at length
    tests = {"even": known[:20], "fewer than processes": known[:3]}
    tokenizer = Tokenizer(base)
    experiment = Experiment(CONFIG, problems, known, tests, base, tokenizer, out, logs.append)
    # 31 examples in batches of 10: the last batch of an epoch has one, so most processes have none.
    experiment.sft("sft", problems)
    pairs = []
    for problem, other in zip(problems, problems[1:], strict=False):
        pairs.append(PreferencePair(problem.question, problem.rationale, other.rationale))
    experiment.dpo("dpo", base, pairs, 1)
    experiment.sample("samples.jsonl", base, 3)
    experiment.evaluate("evaluation.jsonl", base)
    for n in range(6):
        shared = share_work(list(range(n)), lambda items: [(item, rank) for item in items])
        assert shared == [(item, item % n_processes) for item in range(n)]
    assert from_process_0(lambda: rank) == 0
    if rank == 0:
        (out / "logs.json").write_text(json.dumps(logs))
    if n_processes > 1:
        atexit.register(os.abort)  # torch's threads do this at exit, in about one run of eight


if __name__ == "__main__":
    run_command(main)
