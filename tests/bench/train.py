"""Training speed and memory: SFT against transformers, DPO against TRL 0.8.6's method; in turns.

    python -m tests.bench.train [--quick] [--repeats N] [--threads N] [--size small]
    python -m tests.bench.train --vocabulary DIR --problems gsm8k/train.jsonl
    python -m tests.bench.train --device cuda --size base    # bf16 autocast, batches of 96
    python -m tests.bench.train --memory small base large    # peak memory of SFT by size
    python -m tests.bench.train --scale                      # two processes against one

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model
and GSM8K's train.jsonl. Weights are random because speed does not depend on them; dropout is off so
that losses can be compared step by step.

Each system runs in its own process, so its peak memory is measured separately. Figures are medians,
with the smallest and the largest ratio of two adjacent turns in brackets.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.problems import load_problems
from data.processes import rank_and_count, share_work, start_processes
from data.synthetic import make_problems
from data.terminal import run_command
from decode import generate
from dpo import PairExample, PreferencePair, make_pair_examples, train_dpo
from model import SIZES, T5, load_flan_t5, save_flan_t5
from run import parse_args
from sft import (
    IGNORE,
    Example,
    Schedule,
    batches,
    learning_rate,
    make_examples,
    train_sft,
)
from tests.bench.decode import TINY, describe_machine, in_new_process, resident, spread
from tests.bench.peers import load_peer
from tokenizer import Tokenizer, format_rationale, pad_batch

BETA = 0.1
PEERS = {"SFT": "transformers", "DPO": "TRL's way"}


def make_schedule(task: str, args: argparse.Namespace) -> Schedule:
    """run.py's numbers, except for smaller batches on a CPU and a log line for every step."""
    config = parse_args(["--size", "small", "--device", args.device])
    on_gpu = args.device == "cuda"
    return Schedule(
        peak_rate=config.sft_learning_rate if task == "SFT" else config.dpo_learning_rate,
        batch_size=96 if on_gpu else 12,
        micro_batch_tokens=2**14 if on_gpu else config.micro_batch_tokens,
        bf16=on_gpu,
        log_every=1,
    )


# ---------------------------------------------------------------------------------------- the peers


def peer_sft_loss(model, examples: list[Example]) -> Tensor:
    """transformers' own loss: the mean over the target tokens."""
    input_ids, mask = pad_batch([example.input_ids for example in examples], model.device)
    labels, _ = pad_batch([example.labels for example in examples], model.device, IGNORE)
    return model(input_ids, attention_mask=mask, labels=labels, use_cache=False).loss


def concatenated_logps(model, pairs: list[PairExample]) -> tuple[Tensor, Tensor]:
    """TRL's method: chosen and rejected in one batch, the question encoded for each; all logits."""
    input_ids, mask = pad_batch([pair.input_ids for pair in pairs] * 2, model.device)
    rationales = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    labels, _ = pad_batch(rationales, model.device, IGNORE)
    logits = model(input_ids, attention_mask=mask, labels=labels, use_cache=False).logits
    targets = labels.clamp(min=0)[..., None]  # (2B, T, 1)
    logps = logits.log_softmax(-1).gather(2, targets)[..., 0]
    return (logps * (labels != IGNORE)).sum(-1).chunk(2)


def peer_dpo_loss(policy, reference, pairs: list[PairExample]) -> Tensor:
    """The sigmoid loss, with the reference's probabilities computed at every step."""
    chosen, rejected = concatenated_logps(policy, pairs)
    with torch.no_grad():
        reference_chosen, reference_rejected = concatenated_logps(reference, pairs)
    margins = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -F.logsigmoid(BETA * margins).mean()


def peer_train(model, items: list, schedule: Schedule, loss_of: Callable) -> list[float]:
    """One epoch of the usual loop: shuffled batches padded to the longest, AdamW; losses by step.

    AdamW is fused, which is the default of transformers' Trainer since torch 2.8.
    """
    n_steps = math.ceil(len(items) / schedule.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=schedule.weight_decay, fused=True
    )
    source = batches(items, schedule.batch_size, schedule.seed)
    losses = []
    for step in range(n_steps):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16):
            loss = loss_of(next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps, schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------------------------- the turns


def prepare(system: str, folder: Path, items: list, schedule: Schedule, device: str) -> Callable:
    """Load a system; return a function that trains for one epoch and returns the losses by step."""
    if system == "transformers":
        model = load_peer(folder, device=device)
        return partial(peer_train, model, items, schedule, partial(peer_sft_loss, model))
    if system == "TRL's way":
        policy = load_peer(folder, device=device)
        reference = load_peer(folder, device=device)
        loss_of = partial(peer_dpo_loss, policy, reference)
        return partial(peer_train, policy, items, schedule, loss_of)
    model = load_flan_t5(folder, device=device)

    def ours() -> list[float]:
        lines: list[dict] = []
        if isinstance(items[0], Example):
            train_sft(model, items, 1, schedule, "SFT", lines.append)
        else:
            n_steps = math.ceil(len(items) / schedule.batch_size)
            train_dpo(model, items, n_steps, BETA, schedule, "DPO", lines.append)
        return [line["loss"] for line in lines]

    return ours


def train_once(n_threads: int, device: str, *arguments: object) -> tuple[float, list[float], int]:
    """In its own process: the seconds of an epoch, its losses, and the peak memory."""
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(True)
    train = prepare(*arguments, device)
    began = time.perf_counter()
    losses = train()  # Python numbers, so a GPU has finished
    seconds = time.perf_counter() - began
    if device == "cuda":
        return seconds, losses, torch.cuda.max_memory_allocated()
    return seconds, losses, resident("VmHWM")


def compare(task: str, folder: Path, items: list, args: argparse.Namespace) -> None:
    """Let ours and the peer take turns on the same items; print a row."""
    schedule = make_schedule(task, args)
    peer = PEERS[task]
    processes = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in ("ours", peer)}
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    losses: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(args.repeats):
        for name, process in processes.items():
            arguments = (args.threads, args.device, name, folder, items, schedule)
            result = process.submit(train_once, *arguments).result()
            seconds[name].append(result[0])
            losses[name] = result[1]
            memory[name] = result[2]
    for process in processes.values():
        process.shutdown()
    speeds = {name: len(items) / statistics.median(spent) for name, spent in seconds.items()}
    pairs = zip(losses["ours"], losses[peer], strict=True)
    difference = max(abs(our - their) for our, their in pairs)
    cells = [task, f"{speeds['ours']:.2f}", peer, f"{speeds[peer]:.2f}"]
    cells += [spread(seconds["ours"], seconds[peer])]
    cells += [f"{memory['ours'] / 2**20:,.0f} of {memory[peer] / 2**20:,.0f} MiB"]
    cells += [f"{difference:.1e}"]
    print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------- memory by size, two processes


def measure_memory(size: str, examples: list[Example], args: argparse.Namespace) -> tuple[int, int]:
    """In a new process: the number of parameters, and SFT's peak memory in bytes."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    before = resident("VmRSS")
    model = T5(SIZES[size])
    train_sft(model, examples, 1, make_schedule("SFT", args), "SFT", [].append)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return n_parameters, resident("VmHWM") - before


def scale_worker(questions: list[str], examples: list[Example], args: argparse.Namespace) -> None:
    """The work of one process of --scale: sample, then train; process 0 prints the times."""
    torch.set_num_threads(1)
    start_processes("cpu")
    torch.manual_seed(0)
    model = T5(SIZES["small"])
    tokenizer = Tokenizer(args.vocabulary)

    def write(some: list[str]) -> list:
        return generate(model, tokenizer, some, 2, temperature=0.7, max_new_tokens=64)

    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    share_work(questions, write)
    sampled = time.perf_counter()
    train_sft(model, examples, 1, make_schedule("SFT", args), "SFT", [].append)
    trained = time.perf_counter()
    if rank_and_count()[0] == 0:
        print(f"SECONDS {sampled - began} {trained - sampled}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_scale(repeats: int) -> None:
    """Run one and two processes in turn under torchrun, each process with one thread."""
    sampling: dict[int, list[float]] = {1: [], 2: []}
    training: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for n in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(n), "-m", "tests.bench.train", *sys.argv[1:]]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.check_output(command, env=environment, text=True)
            words = output.split("SECONDS")[1].split()
            sampling[n].append(float(words[0]))
            training[n].append(float(words[1]))
    print(f"Two processes, times as fast as one: sampling {spread(sampling[2], sampling[1])}")
    print(f"Two processes, times as fast as one: SFT {spread(training[2], training[1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="24 examples and pairs, not 256 and 96"
    )
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--problems", type=Path, help="JSONL of problems with rationales")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="turns (3)")
    parser.add_argument("--threads", type=int, default=1, help="of every system (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs="+", choices=SIZES, help="only SFT's memory by size")
    parser.add_argument("--scale", action="store_true", help="only two processes against one")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_flush_denormal(True)
    problems = load_problems(args.problems) if args.problems else make_problems(1400, seed=0)
    problems = [replace(p, rationale=format_rationale(p.rationale)) for p in problems[:1400]]
    tokenizer = Tokenizer(args.vocabulary)
    examples = make_examples(problems[: 24 if args.quick else 256], tokenizer)
    if args.scale and "RANK" in os.environ:  # torchrun has started this process
        scale_worker([problem.question for problem in problems[:32]], examples, args)
        return
    print(f"{describe_machine(args)}, {args.size} on {args.device}\n")
    if args.scale:
        measure_scale(args.repeats)
        return
    if args.memory:
        print("| size | 16 bytes per parameter | peak |\n|---|---|---|")
        for size in args.memory:
            n_parameters, peak = in_new_process(measure_memory, size, examples[:24], args)
            print(f"| {size} | {16 * n_parameters / 1e9:.1f} | {peak / 1e9:.1f} GB |", flush=True)
        return
    pairs = []
    # Three pairs per question, as in a run; the rejected rationale belongs to another question.
    for i, problem in enumerate(problems[: 8 if args.quick else 32]):
        for number in range(3):
            other = problems[(3 * i + number + 500) % len(problems)]
            pairs.append(PreferencePair(problem.question, problem.rationale, other.rationale))
    print(
        "| task | examples or pairs/s | beside | its | ratio | peak memory | difference in loss |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_flan_t5(T5(replace(SIZES[args.size], dropout=0.0)), folder)
        compare("SFT", Path(folder), examples, args)
        compare("DPO", Path(folder), make_pair_examples(pairs, tokenizer), args)


if __name__ == "__main__":
    run_command(main)
