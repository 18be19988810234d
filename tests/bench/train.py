"""Training speed and memory against transformers' usual loop (SFT) and the concatenated two-model way (DPO).

    python -m tests.bench.train [--quick] [--vocabulary DIR] [--problems FILE] [--size small]
    python -m tests.bench.train --bf16                         # bf16 autocast on both sides, and our own fp32
    python -m tests.bench.train --memory small base large      # peak memory of SFT, with and without gradient checkpointing
    python -m tests.bench.train --scale                        # one process of one thread against two (torchrun)
    python -m tests.bench.train --device cuda --size base      # bf16 autocast on both sides, batches of 96, share of the peak

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model and GSM8K's
train.jsonl. Weights are random, for speed does not depend on them. Every system sits in a process of its own, whose peak
of resident memory is its own too, and they take turns; figures are medians, in brackets the smallest and largest ratio of
two neighbouring turns. Dropout is off on both sides, so that their losses can be compared step by step.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from data.problems import load_problems
from data.synthetic import make_problems
from decode import generate
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import SIZES, T5, load_flan_t5, save_flan_t5
from sft import Schedule, collate, deal, epochs, learning_rate, make_examples, place, train_sft
from tests.bench.decode import TINY, ceilings, load_peer, resident, transformers
from tokenizer import Tokenizer, format_rationale, pad_batch

BETA = 0.1
SCHEDULES = {  # table 5, but for the smaller batch on a CPU
    "cpu": [Schedule(rate, batch_size=12, log_every=1) for rate in (3e-4, 7e-7)],
    "cuda": [Schedule(rate, batch_size=96, micro_batch_tokens=2**14, bf16=True, log_every=1) for rate in (3e-4, 7e-7)],
}


# ------------------------------------------------------------------------------------------------------------- the peers


def peer_epoch(model, n: int, n_steps: int, schedule: Schedule, loss_of) -> list[float]:
    """The usual loop: shuffled batches, AdamW as it comes, clipping, the same schedule; losses by step."""
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16)
    optimizer = torch.optim.AdamW(model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    losses, batches = [], epochs(n, schedule.batch_size, schedule.seed)
    for step in range(n_steps):
        with autocast:
            loss = loss_of(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps, schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def concatenated_logps(model, input_ids, attention_mask, labels):
    """As TRL 0.8.6: chosen and rejected in one batch of twice the rows, the question of each encoded, full logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).logits
    real = labels != -100
    logps = torch.gather(logits.log_softmax(-1), 2, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * real).sum(-1).chunk(2)


def peer_sft(folder: Path, examples: list, schedule: Schedule, device: str):
    model = load_peer(folder, device=device)

    def loss_of(batch: list[int]):
        input_ids, attention_mask, labels = collate([examples[i] for i in batch], device)
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss

    return lambda n_steps: peer_epoch(model, len(examples), n_steps, schedule, loss_of)


def peer_dpo(folder: Path, pairs: list, schedule: Schedule, device: str):
    policy, reference = load_peer(folder, device=device), load_peer(folder, device=device)

    def loss_of(batch: list[int]):
        some = [pairs[i] for i in batch]
        input_ids, attention_mask = (t.to(device) for t in pad_batch([list(pair.input_ids) for pair in some] * 2))
        labels = pad_batch([pair.chosen for pair in some] + [pair.rejected for pair in some], -100)[0].to(device)
        chosen, rejected = concatenated_logps(policy, input_ids, attention_mask, labels)
        with torch.no_grad():
            reference_chosen, reference_rejected = concatenated_logps(reference, input_ids, attention_mask, labels)
        return -F.logsigmoid(BETA * (chosen - rejected - reference_chosen + reference_rejected)).mean()

    return lambda n_steps: peer_epoch(policy, len(pairs), n_steps, schedule, loss_of)


# --------------------------------------------------------------------------------------------------------------- ours


def our_sft(folder: Path, examples: list, schedule: Schedule, device: str):
    model = load_flan_t5(folder, device=device)

    def run(n_steps: int) -> list[float]:
        logs = []
        train_sft(model, examples, 1, schedule, log=logs.append)
        return [record["loss"] for record in logs]

    return run


def our_dpo(folder: Path, pairs: list, schedule: Schedule, device: str):
    model = load_flan_t5(folder, device=device)

    def run(n_steps: int) -> list[float]:
        logs = []
        train_dpo(model, pairs, [], n_steps, BETA, schedule, log=logs.append)
        return [record["loss"] for record in logs]

    return run


def fp32(train: Callable) -> Callable:
    return lambda folder, items, schedule, device: train(folder, items, replace(schedule, bf16=False), device)


SYSTEMS = {
    "SFT": {"ours": our_sft, "transformers": peer_sft, "ours in fp32": fp32(our_sft)},
    "DPO": {"ours": our_dpo, "two models, concatenated": peer_dpo, "ours in fp32": fp32(our_dpo)},
}


# ------------------------------------------------------------------------------------- memory by size, and two processes


def measure_memory(size: str, examples: list, checkpointing: bool, pipe) -> None:
    """In a process of its own: what two optimiser steps of SFT need at the most, beside the interpreter and torch."""
    torch.set_flush_denormal(True)
    before = resident("VmRSS")
    with torch.device("meta"):
        model = T5(SIZES[size])
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    schedule = Schedule(3e-4, batch_size=len(examples) // 2, gradient_checkpointing=checkpointing, log_every=9)
    train_sft(model, examples, 1, schedule, log=lambda record: None)
    pipe.send((resident("VmHWM") - before, sum(parameter.numel() for parameter in model.parameters())))


def memory_table(sizes: list[str], examples: list) -> None:
    context = get_context("spawn")
    print("| size | 16 bytes per parameter | peak | with --gradient-checkpointing |\n|---|---|---|---|")
    for size in sizes:
        cells = []
        for checkpointing in (False, True):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=measure_memory, args=(size, examples, checkpointing, send))
            process.start()
            send.close()  # so that recv ends should the process die
            grown, n_parameters = receive.recv()
            process.join()
            cells.append(f"{grown / 1e9:.1f} GB")
        print(f"| {size} | {16 * n_parameters / 1e9:.1f} GB | {' | '.join(cells)} |", flush=True)


def work_of_scale(vocabulary: Path, problems: Path | None) -> None:
    """What a process of --scale does: sample, then train, and say how long that took."""
    import torch.distributed as dist

    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    tokenizer = Tokenizer(vocabulary)
    known = [p for p in (load_problems(problems) if problems else make_problems(1400, seed=0))][:192]
    known = [replace(problem, rationale=format_rationale(problem.rationale)) for problem in known]
    torch.manual_seed(0)
    model = T5(SIZES["small"])
    questions = [[problem.question for problem in known[at : at + 16]] for at in range(0, 64, 16)]
    began = time.perf_counter()
    deal(questions, lambda part: generate(model, tokenizer, part, 2, 0.7, max_new_tokens=64, seed=0))
    sampled = time.perf_counter()
    train_sft(model, make_examples(known, tokenizer), 1, Schedule(3e-4, log_every=9), log=lambda record: None)
    if place()[0] == 0:
        print(f"SECONDS {sampled - began} {time.perf_counter() - sampled}", flush=True)
    os._exit(0)


def scale(arguments: list[str], repeats: int) -> None:
    """Let one process and two take turns, each with one thread."""
    seconds = {1: [], 2: []}
    for _ in range(repeats):
        for n in seconds:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
            command = [*start, "-m", "tests.bench.train", "--scale-worker", *arguments]
            output = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
            seconds[n].append([float(number) for number in output.split("SECONDS")[1].split()[:2]])
    for kind, name in enumerate(("sampling", "SFT")):
        ratios = [one[kind] / two[kind] for one, two in zip(seconds[1], seconds[2])]
        print(f"{name}: two processes {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast as one, "
              f"efficiency {50 * statistics.median(ratios):.0f} %")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the turns


def serve(task: str, name: str, folder: Path, items: list, schedule: Schedule, device: str, threads: int, pipe) -> None:
    """In a process of its own: train for n steps whenever asked, and say how long that took and what memory it has needed."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    os.environ["TQDM_DISABLE"] = "1"
    run = SYSTEMS[task][name](folder, items, schedule, device)
    while n_steps := pipe.recv():
        began = time.perf_counter()
        losses = run(n_steps)  # the losses are numbers, so the GPU has done its work
        memory = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
        pipe.send((time.perf_counter() - began, losses, memory))


def operations(model: T5, task: str, items: list) -> float:
    """Floating-point operations that this training needs: 6 for each parameter and real token, and 2 for the reference."""
    encoder = sum(p.numel() for p in model.encoder.parameters())
    decoder = sum(p.numel() for part in (model.decoder, model.lm_head) for p in part.parameters())
    if task == "SFT":
        return sum(6 * (encoder * len(item.input_ids) + decoder * len(item.labels)) for item in items)
    questions = sum(map(len, {item.input_ids for item in items}))
    return 8 * (encoder * questions + decoder * sum(len(item.chosen) + len(item.rejected) for item in items))


def compare(task: str, folder: Path, items: list, n_steps: int, repeats: int, schedule: Schedule, device: str) -> list[str]:
    """Let the systems of a task take turns on the same items; a row of the table for each peer."""
    context, pipes, seconds, losses, memory = get_context("spawn"), {}, {}, {}, {}
    for name in SYSTEMS[task]:
        if name == "ours" or (schedule.bf16 and device == "cpu" if name == "ours in fp32" else transformers):
            pipes[name], theirs = context.Pipe()
            arguments = (task, name, folder, items, schedule, device, torch.get_num_threads(), theirs)
            context.Process(target=serve, args=arguments, daemon=True).start()
            theirs.close()  # so that recv ends should the process die
    for turn in range(repeats):
        for name, pipe in pipes.items():
            pipe.send(n_steps)
            spent, found, memory[name] = pipe.recv()
            seconds.setdefault(name, []).append(spent)
            losses.setdefault(name, found)  # of the first turn, from the same weights
    for pipe in pipes.values():
        pipe.send(0)
    speed = f"{len(items) / statistics.median(seconds['ours']):.2f}"
    if device == "cuda":
        done = operations(load_flan_t5(folder), task, items) / statistics.median(seconds["ours"])
        speed += f" ({100 * done / ceilings(torch.bfloat16, device)[0]:.0f} % of the peak)"
    rows = []
    for name in list(pipes)[1:]:
        ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds[name])]
        rows.append([
            f"{task}, against {name}", speed, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{memory['ours'] / 2**20:,.0f} of {memory[name] / 2**20:,.0f} MiB", f"{memory['ours'] / memory[name]:.2f}",
            f"{max(abs(a - b) for a, b in zip(losses['ours'], losses[name])):.1e}",
        ])  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in rows or [[task, speed, *[""] * 4]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="48 examples and pairs, two turns")
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--problems", type=Path, help="JSONL of problems with rationales; default: synthetic ones")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--device", choices=SCHEDULES, default="cpu")
    parser.add_argument("--bf16", action="store_true", help="on a CPU: autocast on both sides, and against our own fp32")
    parser.add_argument("--tasks", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--repeats", type=int, help="turns, default 3, or 2 with --quick")
    parser.add_argument("--memory", nargs="+", choices=SIZES, help="only measure peak memory of these sizes")
    parser.add_argument("--scale", action="store_true", help="only measure two processes against one")
    parser.add_argument("--scale-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bf16 and (args.memory or args.scale):
        parser.error("--memory and --scale measure fp32 only: leave --bf16 out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    if args.scale_worker:
        return work_of_scale(args.vocabulary, args.problems)
    repeats = args.repeats or (2 if args.quick else 3)
    n_examples, n_pairs = (48, 48) if args.quick else (256, 96) if args.device == "cpu" else (1344, 960)
    schedules = [replace(schedule, bf16=schedule.bf16 or args.bf16) for schedule in SCHEDULES[args.device]]
    kind = "bf16" if schedules[0].bf16 else "fp32"
    tokenizer = Tokenizer(args.vocabulary)
    problems = load_problems(args.problems) if args.problems else make_problems(1400, seed=0)
    problems = [replace(problem, rationale=format_rationale(problem.rationale)) for problem in problems[:1400]]
    examples = make_examples(problems[:n_examples], tokenizer)
    # Three pairs a question, as in a run; the rejected side is the rationale of some other question.
    pairs = [PreferencePair(p.question, p.rationale, problems[(3 * i + k + 500) % len(problems)].rationale)
             for i, p in enumerate(problems[: n_pairs // 3]) for k in range(3)]  # fmt: skip
    steps = [-(-n // schedule.batch_size) for n, schedule in zip((n_examples, n_pairs), schedules)]
    items = {"SFT": (examples, steps[0]), "DPO": (make_pair_examples(pairs, tokenizer), steps[1])}
    version = f"transformers {transformers.__version__}" if transformers else "transformers not installed: left out"
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, load "
          f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, {version}, {args.size}, "
          f"{kind}{'' if args.device == 'cpu' else f' on {torch.cuda.get_device_name()}'}, {repeats} turns\n")  # fmt: skip
    if args.memory:
        return memory_table(args.memory, examples[:24])
    if args.scale:
        files = ["--vocabulary", args.vocabulary, *(["--problems", args.problems] if args.problems else [])]
        return scale(list(map(str, files)), repeats)
    print("| task | examples or pairs/s | times as fast as the peer | peak memory | ratio | largest difference in loss |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_flan_t5(T5(replace(SIZES[args.size], dropout=0.0)), folder)
        for task in args.tasks:
            print(*compare(task, Path(folder), *items[task], repeats, schedules[task == "DPO"], args.device), sep="\n", flush=True)


if __name__ == "__main__":
    main()
