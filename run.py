"""The whole experiment in one command: arguments, files on disk, and the closing table (paper, section 4).

    python run.py                            the whole loop on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper: public weights and data are fetched once; again, to continue"""

import argparse
import difflib
import hashlib
import json
import os
import runpy
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from calculator import rewrite
from data.folder import RunFolder
from data.problems import Problem, load_problems, read_jsonl, write_text
from data.sources import fetch_datasets, fetch_flan_t5
from data.synthetic import OUT_OF_DOMAIN, TEST_SEED, make_problems
from decode import free_memory
from model import SIZES, T5Config, read_config
from selftrain import PART, Stages, accuracies, self_train
from sft import alone, deal, place, print_log
from tokenizer import MAX_QUESTION, MAX_RATIONALE, UNKNOWN_ID, Tokenizer, format_rationale

TESTS = ("GSM8K", "MultiArith", "ASDiv", "SVAMP")
HOURS = {"small": 0.0015, "base": 0.0053, "large": 0.017, "xl": 0.064, "xxl": 0.25}  # per question and round: README
TABLE_2 = json.loads((Path(__file__).parent / "data" / "table_2.json").read_text())  # the paper's, in the order of TESTS

def option(paper, tiny, group: str, text: str):
    """A field of Config that is also a flag: its value in the paper, its value for --size tiny (our choice), what it is."""
    return field(default=paper, metadata={"tiny": tiny, "group": group, "help": text})

@dataclass
class Config:
    """Every number of a run. Sources in brackets.  DIFFERS: those of --size tiny and st_samples are ours."""
    size: str = "tiny"
    method: str = "dpo-st"
    weights: str = option("", "", "run", "a checkpoint folder; --size still chooses the numbers")
    labeled: str = option("", "", "your own data", "problems with rationales, JSONL")
    unlabeled: str = option("", "", "your own data", "problems whose rationales, if any, are not used; default: those of --labeled")
    test: list = option("", "", "your own data", "problems to be tested on, under that name; may be repeated")
    allow_leakage: bool = option(False, False, "your own data", "test on questions that are trained on, too")
    device: str = "cpu"
    calculator: bool = True
    seed: int = option(42, 42, "run", "of data order, dropout and sampling [authors' code]")
    limit: int = option(0, 0, "run", "use only the first N problems of every set; 0 for all")
    rewrite: bool = option(False, False, "method", "give annotations in L the result that the calculator prints [ours]")
    rounds: int = option(3, 2, "method", "rounds of self-training [figure 5]")
    dpo_samples: int = option(5, 5, "method", "rationales per question in the DPO step [section 4.2]")
    sft_samples: int = option(3, 3, "method", "rationales per question in the SFT step [section 4.2]")
    st_samples: int = option(8, 8, "method", "rationales per question and round for ST: as many as DPO-ST draws [ours]")
    temperature: float = option(0.7, 0.7, "method", "sampling temperature [section 4.2]")
    top_k: int = option(50, 50, "method", "sample among the k likeliest ids, 0 for all [authors' code, unsaid]")
    max_similarity: float = option(0.7, 0.7, "method", "more alike than this are duplicates [authors' code]")
    n_pairs: int = option(3, 3, "method", "preference pairs kept per question [authors' code]")
    percentile: float = option(90, 90, "method", "caps the pseudo-labels per question [authors' code]")
    max_new_tokens: int = option(300, 100, "method", "longest rationale in tokens [section 4.2]")
    sft_epochs: int = option(8, 8, "SFT", "passes over the data [table 5]")
    sft_learning_rate: float = option(3e-4, 1e-3, "SFT", "peak learning rate [table 5]")
    sft_batch_size: int = option(96, 8, "SFT", "examples per optimiser step [table 5]")
    dpo_steps: int = option(150, 100, "DPO", "optimiser steps [table 5]")
    dpo_learning_rate: float = option(7e-7, 1e-4, "DPO", "peak learning rate [table 5]")
    dpo_batch_size: int = option(96, 16, "DPO", "pairs per optimiser step [table 5]")
    beta: float = option(0.1, 0.5, "DPO", "how strongly the policy is held to the reference [section 4.2]")
    held_out: float = option(0.05, 0.05, "DPO", "part of the questions whose pairs are only scored [ours]")
    warmup_ratio: float = option(0.1, 0.1, "training", "part of the steps with a rising rate [table 5]")
    final_ratio: float = option(0.1, 0.1, "training", "the cosine ends at this part of the peak [authors' code]")
    weight_decay: float = option(0.01, 0.01, "training", "of AdamW [appendix A]")
    max_grad_norm: float = option(1.0, 1.0, "training", "gradient clipping [appendix A]")
    bf16: bool = option(False, False, "limits", "bf16, as always on a GPU: faster on CPUs with AVX-512 BF16 or AMX [ours]")
    gradient_checkpointing: bool = option(False, False, "limits", "compute activations twice rather than keep them")
    shard: bool = option(False, False, "limits", "torchrun: spread every model over the processes, for xl and xxl")
    micro_batch_tokens: int = option(0, 2048, "limits", "about the tokens per forward pass; 0: by the memory [ours]")
    decode_batch_size: int = option(0, 256, "limits", "rationales written at a time; 0: by the memory [ours]")
    save_every: float = option(10, 10, "limits", "minutes between two saves inside a training [ours]")
    timeout: float = option(30, 30, "limits", "minutes to wait for another process of torchrun [ours]")
    log_every: int = option(10, 20, "training", "optimiser steps between two printed lines [ours]")
    n_labeled: int = option(0, 250, "problems of --size tiny", "labeled problems")
    n_unlabeled: int = option(0, 1000, "problems of --size tiny", "other questions, with answers only")
    n_test: int = option(0, 2000, "problems of --size tiny", "held-out problems")

OPTIONS = [item for item in fields(Config) if item.metadata]
# What may change when a run goes on: for more of it, or where memory or time ran short.
MAY_CHANGE = ["rounds", "method", "device", *(item.name for item in OPTIONS if item.metadata["group"] == "limits")]

def parse_args(argv: list[str] | None = None) -> tuple[Config, Path]:
    """Read the command line -> the run's numbers and its folder."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "python run.py [--size SIZE] [options]"}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, **layout)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model, and with it the defaults below")
    parser.add_argument("--method", choices=("dpo-st", "st", "both"), help="default: both for tiny, else dpo-st")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/SIZE-seed-SEED")
    parser.add_argument("--report", nargs="+", metavar="DIR", help="only show the tables and figures of these runs' folders")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[0], help="default here: %(default)s")
    parser.add_argument("--no-calculator", dest="calculator", action="store_false", help="when sampling")
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.metadata["group"] for o in OPTIONS)}
    for item in OPTIONS:
        tiny, paper = item.metadata["tiny"], item.default
        default = "" if type(paper) in (bool, str) else f" (default {paper:g}{'' if tiny == paper else f'; tiny: {tiny:g}'})"
        how = {bool: {"action": "store_true"}, list: {"action": "append", "metavar": "NAME=PATH"}}.get(item.type)
        how = how or {"type": item.type, "metavar": {int: "N", float: "X", str: "PATH"}[item.type]}
        groups[item.metadata["group"]].add_argument("--" + item.name.replace("_", "-"), **how, help=item.metadata["help"] + default)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser.format_help().split(), 3, 0.7)
        parser.error(f"there is no {unknown[0]}; did you mean {' or '.join({n: 0 for n in near if n[0] == '-'}) or '--help'}?")
    out, runs = (args := vars(args)).pop("out"), args.pop("report")
    if runs:  # by its path, for many an installed package brings a `tests` of its own
        sys.exit(runpy.run_path(f"{Path(__file__).parent}/tests/bench/report.py")["main"](runs + ["--out", str(out)] * bool(out)))
    for item in OPTIONS:
        least = {"seed": 0, "limit": 0, "rounds": 0, "top_k": 0, "temperature": 0.01}.get(item.name, int(item.type is int))
        if args[item.name] is None:
            args[item.name] = item.metadata["tiny"] if args["size"] == "tiny" else item.default
        most = {"percentile": 100, "held_out": 0.5, "warmup_ratio": 1}.get(item.name, 2**31)
        if item.type in (int, float) and not (least <= args[item.name] <= most or args[item.name] == item.default):
            parser.error(f"--{item.name.replace('_', '-')} must be a number from {least} to {most}")
    names = {name for name, _, path in (test.partition("=") for test in args["test"]) if name and path}
    if bool(args["labeled"]) != bool(names) or args["unlabeled"] and not names or len(names) < len(args["test"]):
        parser.error("your own data: give --labeled FILE and --test NAME=FILE (each name once), and perhaps --unlabeled FILE")
    args["bf16"] |= args["device"] == "cuda"
    args["method"] = args["method"] or ("both" if args["size"] == "tiny" else "dpo-st")
    return Config(**args), out or Path("runs") / f"{'own-' if args['labeled'] else ''}{args['size']}-seed-{args['seed']}"

def load_data(config: Config) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """The labeled set L (rationales formatted), the unlabeled set U, and the test sets by name."""
    if config.labeled:
        labeled = load_problems(config.labeled)
        unlabeled = load_problems(config.unlabeled) if config.unlabeled else labeled
        tests = {name: load_problems(path) for name, _, path in (test.partition("=") for test in config.test)}
    elif config.size == "tiny":
        train = make_problems(config.n_labeled + config.n_unlabeled, seed=f"run {config.seed}")
        labeled, unlabeled = train[: config.n_labeled], train[config.n_labeled :]
        tests = {"held-out": make_problems(config.n_test, seed=TEST_SEED, exclude={problem.question for problem in train})}
        tests |= {family: make_problems(config.n_test // 4, TEST_SEED, families=(family,)) for family in OUT_OF_DOMAIN}
    else:
        folder = deal([None], fetch_datasets)[0]
        labeled = unlabeled = load_problems(folder / "gsm8k" / "train.jsonl")  # section 4.1: U is L without rationales
        tests = {name: load_problems(folder / name.lower() / "test.jsonl") for name in TESTS}
    spelled = lambda problems: {" ".join(problem.question.split()).casefold() for problem in problems}
    for name, problems in () if config.allow_leakage else tests.items():
        if leaked := sorted(spelled(problems) & spelled([*labeled, *unlabeled])):
            raise ValueError(f"{name}: {len(leaked)} questions are trained on ('{leaked[0]:.40}...'): drop them or --allow-leakage")
    first = config.limit or None
    spell = lambda text: rewrite(format_rationale(text)) if config.rewrite else format_rationale(text)
    labeled = [replace(problem, rationale=spell(problem.rationale)) for problem in labeled if problem.rationale][:first]
    return labeled, unlabeled[:first], {name: problems[:first] for name, problems in tests.items()}

def batch_sizes(config: Config, c: T5Config, free: float) -> tuple[int, int]:
    """--micro-batch-tokens and --decode-batch-size; if left open, fixed ones on a CPU, and on a GPU powers of two of which its free
    bytes hold the activations, beside weights, gradients and moments, or the keys and values (factors: README, "One GPU")."""
    (_, n), width = place(), c.n_heads * c.d_kv
    n_parameters = c.n_layers * c.d_model * (12 * width + 6 * c.d_ff) + 2 * c.vocab_size * c.d_model
    tokens = (0.9 * free - 16 * n_parameters / (n if config.shard else 1)) / (8 * c.vocab_size + 160 * c.n_layers * c.d_model)
    rationales = 0.5 * free / (4 * c.n_layers * width * (MAX_QUESTION + config.max_new_tokens))
    found = [1 << int(max(1, held)).bit_length() - 1 for held in (tokens, rationales)] if config.device == "cuda" else [2048, 96]
    return config.micro_batch_tokens or min(found[0], 2**14 // n), config.decode_batch_size or min(found[1], PART["cuda"] // 8)

def report(config: Config, folder: RunFolder) -> str:
    """Gather the evaluations in results.json (%: accuracy, 95 % interval) and results.md; return the table, shaped as table 2."""
    stages = {f"{method}/round-{n + 1}": [method.upper(), n + 1] for method in ("st", "dpo-st") for n in range(config.rounds)}
    results, lines = {}, []
    for stage, label in {"warm-up": ["SFT", 0], **stages}.items():
        if path := folder.find(f"{stage}/evaluation.jsonl"):
            results[stage] = accuracies(read_jsonl(path))
            lines.append(label + [f"{accuracy:.1f} ({low:.1f} to {high:.1f})" for accuracy, low, high in results[stage].values()])
    tests = list(results["warm-up"])
    for method, numbers in TABLE_2.get(config.size, {}).items():
        lines.append([f"{method}, paper", 3 * (method != "SFT"), *(dict(zip(TESTS, numbers)).get(test, "") for test in tests)])
    lines = [["method", "round", *tests], ["---"] * (len(tests) + 2), *lines]
    table = f"Greedy accuracy (%, 95 % interval), Flan-T5 {config.size}, seed {config.seed}:\n\n"
    table += "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    write_text(json.dumps(results, indent=2) + "\n", folder.path / "results.json")
    write_text(table, folder.path / "results.md")
    return table

def main() -> None:
    config, out = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever is asked to end is stopped as by Ctrl-C
    torch.set_flush_denormal(True)  # barely trained models produce denormal numbers, which are many times slower
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's word for the number of processes
        if config.device == "cuda":
            if (local := int(os.environ["LOCAL_RANK"])) >= (count := torch.cuda.device_count()):
                raise ValueError(f"there are more processes than the {count} GPUs here: lower --nproc-per-node")
            torch.cuda.set_device(local)
        dist.init_process_group(timeout=timedelta(minutes=config.timeout))  # gloo between CPUs, NCCL between GPUs
    (rank, n), began = place(), time.perf_counter()
    labeled, unlabeled, tests = load_data(config)
    if config.device == "cpu" and config.size in HOURS and rank == 0:
        print(f"2 cores: about {HOURS[config.size] * len(unlabeled) * (config.rounds + 1):,.1f} hours in fp32, --size tiny minutes")
    bundled = Path(__file__).parent / "data" / "tiny" if config.size == "tiny" else ""
    base = Path(config.weights or bundled or deal([config.size], fetch_flan_t5)[0])
    tokenizer, folder, c = Tokenizer(base), RunFolder(out), read_config(base)
    if not 0 <= c.vocab_size - tokenizer.vocab_size < 128:  # T5 rounds up to a multiple of 128
        raise ValueError(f"{base}: {tokenizer.vocab_size} ids in spiece.model, {c.vocab_size} in the model: fetch that file again")
    free = deal([torch.device(config.device)], free_memory)[0]  # the same number for all processes
    config.micro_batch_tokens, config.decode_batch_size = tokens, rationales = batch_sizes(config, c, free)
    checksum = hashlib.sha256(repr((labeled, unlabeled, tests)).encode()).hexdigest()[:16]  # a file may change under its name
    alone(lambda: folder.open({**asdict(config), "checksum_of_problems": checksum}, MAY_CHANGE))
    log = lambda record: (print_log(record), folder.log(record)) if rank == 0 else None
    if rank == 0:
        texts, most = [tokenizer.encode(problem.rationale) for problem in labeled], min(MAX_RATIONALE, config.max_new_tokens)
        print(f"Flan-T5 {config.size} on {n} x {config.device}: {len(labeled)} labeled, {len(unlabeled)} unlabeled -> {out}\n"
              f"At a time: {tokens} tokens in training, {rationales} rationales in decoding\nRationales over {most} tokens: "
              f"{sum(len(t) > most for t in texts)}, with unknown signs: {sum(UNKNOWN_ID in t for t in texts)}")  # fmt: skip
    for method in ("st", "dpo-st") if config.method == "both" else (config.method,):
        model = self_train(method, labeled, unlabeled, tests, config, Stages(base, tokenizer, config, folder, log))
    if rank == 0:
        print(f"\n{report(config, folder)}\n{time.perf_counter() - began:,.0f} s. All tables and figures: python run.py --report"
              f" {out}\nNext: python decode.py --checkpoint {model} 'QUESTION'")  # fmt: skip

if __name__ == "__main__":
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nrun.py: stopped; the same command continues where it was: python {' '.join(sys.argv)}", file=sys.stderr)
        code = 130
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        problem, advice, code = " ".join(str(error).split()), "", 2
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in problem:
            advice = ": lower --micro-batch-tokens (training) or --decode-batch-size (sampling); the same command continues"
        elif "gloo" in problem or isinstance(error, dist.DistError):
            problem = f"another process has ended, or needs more than --timeout ({problem[:150]}); the same command continues"
        elif isinstance(error, RuntimeError):
            raise
        elif getattr(error, "errno", None) and not isinstance(error, BrokenPipeError):  # disk full, no right to write
            advice = ": mend that, and the same command continues"
        print(f"run.py: {problem}{advice}", file=sys.stderr)
    if place()[1] > 1:  # out by the back door: on the usual way gloo's threads often abort the process (pytorch #179291)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
