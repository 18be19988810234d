"""What one of several processes does in tests/test_processes.py: each kind of work once, from one checkpoint.

    torchrun --nproc-per-node 2 tests/processes.py BASE OUT [--shard]
"""

import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import selftrain
from data.folder import RunFolder
from data.problems import write_jsonl
from data.synthetic import make_problems
from dpo import PreferencePair
from run import Config
from sft import deal, place
from tokenizer import Tokenizer, format_rationale

CONFIG = Config(
    sft_epochs=3, sft_learning_rate=1e-3, sft_batch_size=10, dpo_steps=5, dpo_learning_rate=1e-4, dpo_batch_size=10,
    beta=0.5, held_out=0.2, temperature=1.5, max_new_tokens=40, micro_batch_tokens=400, decode_batch_size=8, log_every=1,
)  # fmt: skip


def main() -> None:
    base, out = map(Path, sys.argv[1:3])
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    selftrain.PART["cpu"] = 20  # several parts for every process, and not the same number
    logs = []
    folder = RunFolder(out)
    deal([0], lambda _: folder.open({}))
    config = replace(CONFIG, shard="--shard" in sys.argv)
    stages = selftrain.Stages(base, Tokenizer(base), config, folder, logs.append)
    problems = [replace(p, rationale=format_rationale(p.rationale)) for p in make_problems(31, seed=0)]
    pairs = [PreferencePair(p.question, p.rationale, q.rationale) for p, q in zip(problems, problems[1:])]
    stages.sft("sft", problems)  # 31 in batches of 10: the last batch of an epoch has one example, so one piece
    stages.dpo("dpo", base, pairs)
    # As after a kill between the last part of some rows and their joining, with all processes but one slow to look.
    deal([0], lambda _: [folder.write(f"killed.parts/{i:04}-of-0003.jsonl", partial(write_jsonl, [{"row": i}])) for i in range(3)])
    find = folder.find
    folder.find = (lambda name: (time.sleep(0.5), find(name))[1]) if place()[0] else find
    assert stages.keep_rows("killed", range(3), None, lambda rows: {"rows": len(rows)}) == [{"row": i} for i in range(3)]
    folder.find = find
    known = make_problems(31, seed=1, steps=(1,))  # what the bundled checkpoint has learned to answer at length
    stages.sample("samples", base, known, 3)
    stages.evaluate("evaluation", base, {"even": known[:20], "uneven": known[:3]})
    if place()[0] == 0:
        (out / "logs.json").write_text(json.dumps(logs))
    os._exit(0)  # as run.py does


if __name__ == "__main__":
    main()
