"""The whole experiment in one command: arguments, files on disk, and the closing table (paper, section 4).

    python run.py                            the whole loop on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper: public Flan-T5 weights and data are fetched once

The same command continues a run that was stopped: a stage whose result is in the run folder is not repeated.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from data.problems import Problem, load_problems, read_jsonl, write_jsonl, write_text
from data.sources import DownloadError, fetch_datasets, fetch_flan_t5
from data.synthetic import TEST_SEED, make_problems
from model import SIZES, T5, read_config, read_json, save_flan_t5
from selftrain import Stages, self_train
from sft import print_log
from tokenizer import Tokenizer, format_rationale

TESTS = {"GSM8K": "gsm8k", "MultiArith": "multiarith", "ASDiv": "asdiv", "SVAMP": "svamp"}
PAPER = {  # table 2: greedy accuracy (%), calculator on
    "base": {"SFT": (18.1, 54.2, 26.2, 19.5), "ST": (25.9, 73.8, 28.2, 24.2), "DPO-ST": (27.2, 74.3, 29.2, 22.6)},
    "large": {"SFT": (30.8, 77.2, 38.1, 33.6), "ST": (35.6, 86.2, 42.5, 34.8), "DPO-ST": (37.4, 89.0, 42.8, 36.8)},
}


def number(paper: float, tiny: float, group: str, text: str):
    """A hyper-parameter: its value in the paper, its value for --size tiny (our choice), and what it is."""
    return field(default=paper, metadata={"tiny": tiny, "group": group, "help": text})


@dataclass
class Config:
    """Every number of a run. Sources in brackets.  DIFFERS: those of --size tiny are our choice."""
    size: str = "tiny"
    method: str = "dpo-st"
    weights: str = ""
    data: str = ""
    device: str = "cpu"
    calculator: bool = True
    seed: int = number(42, 42, "run", "of data order, dropout and sampling [authors' code]")
    limit: int = number(0, 0, "run", "use only the first N problems of every set; 0 for all")
    rounds: int = number(3, 2, "method", "rounds of self-training [figure 5]")
    dpo_samples: int = number(5, 5, "method", "rationales per question in the DPO step [section 4.2]")
    sft_samples: int = number(3, 3, "method", "rationales per question in the SFT step [section 4.2]")
    st_samples: int = number(8, 8, "method", "rationales per question and round for ST: as many as DPO-ST draws [ours]")
    temperature: float = number(0.7, 0.7, "method", "sampling temperature [section 4.2]")
    top_k: int = number(50, 50, "method", "sample among the k likeliest ids, 0 for all [authors' code, unsaid]")
    max_similarity: float = number(0.7, 0.7, "method", "more alike than this are duplicates [authors' code]")
    n_pairs: int = number(3, 3, "method", "preference pairs kept per question [authors' code]")
    percentile: float = number(90, 90, "method", "caps the pseudo-labels per question [authors' code]")
    max_new_tokens: int = number(300, 100, "method", "longest rationale in tokens [section 4.2]")
    sft_epochs: int = number(8, 8, "SFT", "passes over the data [table 5]")
    sft_learning_rate: float = number(3e-4, 1e-3, "SFT", "peak learning rate [table 5]")
    sft_batch_size: int = number(96, 8, "SFT", "examples per optimiser step [table 5]")
    dpo_steps: int = number(150, 100, "DPO", "optimiser steps [table 5]")
    dpo_learning_rate: float = number(7e-7, 1e-4, "DPO", "peak learning rate [table 5]")
    dpo_batch_size: int = number(96, 16, "DPO", "pairs per optimiser step [table 5]")
    beta: float = number(0.1, 0.5, "DPO", "how strongly the policy is held to the reference [section 4.2]")
    held_out: float = number(0.05, 0.05, "DPO", "part of the questions whose pairs are only scored [ours]")
    warmup_ratio: float = number(0.1, 0.1, "training", "part of the steps with a rising rate [table 5]")
    final_ratio: float = number(0.1, 0.1, "training", "the cosine ends at this part of the peak [authors' code]")
    weight_decay: float = number(0.01, 0.01, "training", "of AdamW [appendix A]")
    max_grad_norm: float = number(1.0, 1.0, "training", "gradient clipping [appendix A]")
    micro_batch_tokens: int = number(2048, 2048, "training", "about the tokens per forward pass: a memory limit [ours]")
    decode_batch_size: int = number(96, 256, "training", "rationales written at a time: a memory limit [ours]")
    log_every: int = number(10, 20, "training", "optimiser steps between two printed lines [ours]")
    n_labeled: int = number(0, 250, "problems of --size tiny", "labeled problems")
    n_unlabeled: int = number(0, 1000, "problems of --size tiny", "other questions, with answers only")
    n_test: int = number(0, 2000, "problems of --size tiny", "held-out problems")


NUMBERS = [item for item in fields(Config) if item.metadata]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_args(argv: list[str] | None = None) -> tuple[Config, Path]:
    """Read the command line -> the run's numbers and its folder."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model, and with it the defaults below")
    parser.add_argument("--method", choices=("dpo-st", "st", "both"), help="default: both for tiny, else dpo-st")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/SIZE-seed-SEED")
    parser.add_argument("--weights", default="", metavar="DIR", help="a checkpoint; --size still chooses the numbers")
    parser.add_argument("--data", default="", metavar="DIR", help="datasets: gsm8k/train.jsonl, gsm8k/test.jsonl, ...")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--no-calculator", dest="calculator", action="store_false", help="when sampling")
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(n.metadata["group"] for n in NUMBERS)}
    for item in NUMBERS:
        tiny, letter = item.metadata["tiny"], "N" if item.type is int else "X"
        default = f"(default {item.default:g})" if tiny == item.default else f"(default {item.default:g}; tiny: {tiny:g})"
        text = f"{item.metadata['help']} {default}"
        groups[item.metadata["group"]].add_argument(flag(item.name), type=item.type, metavar=letter, help=text)
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    if args["device"] == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU here; leave the flag out to run on the CPU")
    for item in NUMBERS:
        least = 1 if item.type is int and item.name not in ("seed", "limit", "rounds", "top_k") else 0
        if args[item.name] is None:
            args[item.name] = item.metadata["tiny"] if args["size"] == "tiny" else item.default
        most = {"percentile": 100, "held_out": 0.5, "warmup_ratio": 1}.get(item.name, 2**31)
        if not (least <= args[item.name] <= most or args[item.name] == item.default):
            parser.error(f"{flag(item.name)} must be a number from {least} to {most}")
    args["method"] = args["method"] or ("both" if args["size"] == "tiny" else "dpo-st")
    return Config(**args), out or Path("runs") / f"{args['size']}-seed-{args['seed']}"


def load_data(config: Config) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """The labeled set L (rationales formatted), the unlabeled set U, and the test sets by name."""
    if config.size == "tiny" and not config.data:
        train = make_problems(config.n_labeled + config.n_unlabeled, seed=f"run {config.seed}")
        labeled, unlabeled = train[: config.n_labeled], train[config.n_labeled :]
        seen = {problem.question for problem in train}
        tests = {"held-out": make_problems(config.n_test, seed=TEST_SEED, exclude=seen)}
    else:
        folder = Path(config.data) if config.data else fetch_datasets()
        unlabeled = load_problems(folder / "gsm8k" / "train.jsonl")  # section 4.1: U is L without rationales
        labeled = [problem for problem in unlabeled if problem.rationale]
        paths = {name: folder / place / "test.jsonl" for name, place in TESTS.items()}
        tests = {name: load_problems(path) for name, path in paths.items() if path.exists()}
        if not tests:
            raise FileNotFoundError(f"{folder} has no test set: put one at {paths['GSM8K']}")
    first = config.limit or None
    labeled = [replace(problem, rationale=format_rationale(problem.rationale)) for problem in labeled[:first]]
    return labeled, unlabeled[:first], {name: problems[:first] for name, problems in tests.items()}


class RunFolder:
    """The files of a run. Each is written beside its place and renamed into it: what has its name is complete."""
    def __init__(self, path: Path, config: Config, base: Path):
        """Start or continue a run. Raises ValueError if the folder holds a run with other numbers."""
        self.path, self.config, self.base = path, config, base
        stored, wanted = path / "config.json", asdict(config)
        before = read_json(stored) if stored.exists() else wanted
        may_change = ("rounds", "method", "device", "decode_batch_size", "micro_batch_tokens")  # more of it, or memory
        changed = [f"{flag(k)} {before.get(k)}" for k in wanted if k not in may_change and before.get(k) != wanted[k]]
        if changed:
            raise ValueError(f"{path} holds a run with {', '.join(changed)}: repeat that, or choose another --out")
        write_text(json.dumps(wanted, indent=2) + "\n", stored)

    def log(self, record: dict) -> None:
        print_log(record)
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def keep_rows(self, name: str, make: Callable[[], list[dict]]) -> list[dict]:
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            write_jsonl(make(), path)
        return read_jsonl(path)

    def keep_model(self, name: str, make: Callable[[], T5]) -> Path:
        folder = self.path / name
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped here
            save_flan_t5(make(), partial)
            shutil.copy(self.base / "spiece.model", partial)
            getattr(os, "sync", int)()  # or a power cut may keep the new name and lose the weights; Windows has none
            os.replace(partial, folder)
        return folder

    def report(self) -> str:
        """Gather the evaluations in results.json and results.md; return the table, in the shape of table 2."""
        rounds = range(1, self.config.rounds + 1)
        stages = {f"{method}/round-{n}": [method.upper(), n] for method in ("st", "dpo-st") for n in rounds}
        results, lines = {}, []
        for stage, label in {"warm-up": ["SFT", 0], **stages}.items():
            path = self.path / stage / "evaluation.jsonl"
            if path.exists():
                results[stage] = {row["test"]: round(row["accuracy"], 2) for row in read_jsonl(path)}
                lines.append(label + [f"{accuracy:.1f}" for accuracy in results[stage].values()])
        tests = list(results["warm-up"])
        for method, numbers in PAPER.get(self.config.size, {}).items():
            cells = [dict(zip(TESTS, numbers)).get(test, "") for test in tests]
            lines.append([f"{method}, paper", 0 if method == "SFT" else 3] + cells)
        lines = [["method", "round", *tests], ["---"] * (len(tests) + 2), *lines]
        table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
        title = f"Greedy accuracy (%), Flan-T5 {self.config.size}, seed {self.config.seed}:\n\n"
        write_text(json.dumps(results, indent=2) + "\n", self.path / "results.json")
        write_text(title + table, self.path / "results.md")
        return title + table


def main() -> None:
    config, out = parse_args()
    torch.set_flush_denormal(True)  # barely trained models produce denormal numbers, which are many times slower
    torch.backends.cuda.matmul.allow_tf32 = True  # authors' code
    bundled = Path(__file__).parent / "data" / "tiny" if config.size == "tiny" else None
    base = Path(config.weights) if config.weights else bundled or fetch_flan_t5(config.size)
    labeled, unlabeled, tests = load_data(config)
    tokenizer = Tokenizer(base)
    if tokenizer.vocab_size > read_config(base).vocab_size:
        raise ValueError(f"{base} has a vocabulary of {tokenizer.vocab_size} ids, more than its model knows")
    folder = RunFolder(out, config, base)
    print(f"Flan-T5 {config.size} on {config.device}: {len(labeled)} labeled, {len(unlabeled)} unlabeled -> {out}")
    began = time.perf_counter()
    stages = Stages(base, tokenizer, config, folder.keep_rows, folder.keep_model, folder.log)
    for method in ("st", "dpo-st") if config.method == "both" else (config.method,):
        model = self_train(method, labeled, unlabeled, tests, config, stages)
    print(f"\n{folder.report()}\n{time.perf_counter() - began:,.0f} s. Next: decode.py --checkpoint {model} 'QUESTION'")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nrun.py: stopped; the same command continues with the stage it was in")
    except (ValueError, OSError, DownloadError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
