"""The whole experiment in one command: arguments, files on disk, and the closing table (paper, section 4).

    python run.py                            the whole loop on a laptop, nothing downloaded
    python run.py --size base --rounds 3     the paper: public Flan-T5 weights and data are fetched once
    python run.py --out DIR --ask "..."      the rationale of a finished run's model

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
from tqdm import tqdm

from data.problems import Problem, load_problems, read_jsonl, write_jsonl, write_text
from data.sources import DownloadError, fetch_datasets, fetch_flan_t5
from data.synthetic import make_problems
from decode import generate, mark_forced
from model import SIZES, load_flan_t5, read_json, save_flan_t5
from selftrain import Stages, column, self_train
from sft import print_log
from tokenizer import Tokenizer, format_rationale

HERE = Path(__file__).parent
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
    """Every number of a run. Sources in brackets: paper, authors' code, or our choice."""

    size: str = "tiny"
    method: str = "dpo-st"
    seed: int = 42  # authors' code
    weights: str = ""
    data: str = ""
    limit: int = 0
    device: str = "cpu"
    calculator: bool = True
    rounds: int = number(3, 2, "method", "rounds of self-training [figure 5]")
    dpo_samples: int = number(5, 5, "method", "rationales per question in the DPO step [section 4.2]")
    sft_samples: int = number(3, 3, "method", "rationales per question in the SFT step [section 4.2]")
    st_samples: int = number(8, 8, "method", "rationales per question and round for ST: as many as DPO-ST draws [ours]")
    temperature: float = number(0.7, 0.7, "method", "sampling temperature [section 4.2]")
    top_k: int = number(50, 50, "method", "sample among the k likeliest ids, 0 for all [authors' code, unsaid]")
    max_new_tokens: int = number(300, 100, "method", "longest rationale in tokens [section 4.2]")
    sft_epochs: int = number(8, 30, "SFT", "passes over the data [table 5]")
    sft_learning_rate: float = number(3e-4, 1e-3, "SFT", "peak learning rate [table 5]")
    sft_batch_size: int = number(96, 32, "SFT", "examples per optimiser step [table 5]")
    dpo_steps: int = number(150, 100, "DPO", "optimiser steps [table 5]")
    dpo_learning_rate: float = number(7e-7, 1e-4, "DPO", "peak learning rate [table 5]")
    dpo_batch_size: int = number(96, 16, "DPO", "pairs per optimiser step [table 5]")
    beta: float = number(0.1, 0.5, "DPO", "how strongly the policy is held to the reference [section 4.2]")
    held_out: float = number(0.05, 0.05, "DPO", "part of the questions whose pairs are only scored [ours]")
    warmup_ratio: float = number(0.1, 0.1, "training", "part of the steps with a rising rate [table 5]")
    final_ratio: float = number(0.1, 0.1, "training", "the cosine ends at this part of the peak [authors' code]")
    weight_decay: float = number(0.01, 0.01, "training", "of AdamW [appendix A]")
    max_grad_norm: float = number(1.0, 1.0, "training", "gradient clipping [appendix A]")
    micro_batch_tokens: int = number(8192, 8192, "training", "padded tokens per forward pass: lower it for less memory [ours]")
    decode_batch_size: int = number(96, 64, "training", "rationales written at a time: lower it for less memory [ours]")
    log_every: int = number(10, 20, "training", "optimiser steps between two printed lines [ours]")
    n_labeled: int = number(0, 250, "problems of --size tiny", "labeled problems")
    n_unlabeled: int = number(0, 750, "problems of --size tiny", "other questions, with answers only")
    n_test: int = number(0, 2000, "problems of --size tiny", "held-out problems")


def parse_args(argv: list[str] | None = None) -> tuple[Config, Path, str | None]:
    """Read the command line -> the run's numbers, its folder, and a question to --ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the model, and with it the defaults below")
    parser.add_argument("--method", choices=("dpo-st", "st", "both"), help="default: both for tiny, else dpo-st")
    parser.add_argument("--seed", type=int, default=42, help="of data order, dropout and sampling")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/SIZE-seed-SEED")
    parser.add_argument("--weights", default="", metavar="DIR", help="a Flan-T5 checkpoint instead of the public one")
    parser.add_argument("--data", default="", metavar="DIR", help="datasets: gsm8k/train.jsonl, gsm8k/test.jsonl, ...")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="use only the first N problems of every set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--no-calculator", dest="calculator", action="store_false", help="sample without the calculator")
    parser.add_argument("--ask", metavar="QUESTION", help="answer with the last model of the run folder, then stop")
    groups = {}
    for item in fields(Config):
        if item.metadata:
            group, tiny = item.metadata["group"], item.metadata["tiny"]
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            default = f"{item.default:g}" if tiny == item.default else f"{item.default:g}; tiny: {tiny:g}"
            groups[group].add_argument(
                "--" + item.name.replace("_", "-"), type=item.type, metavar="N" if item.type is int else "X",
                help=f"{item.metadata['help'].replace('%', '%%')} (default {default})",
            )  # fmt: skip
    args = vars(parser.parse_args(argv))
    out, question = args.pop("out"), args.pop("ask")
    for item in fields(Config):
        if item.metadata and args[item.name] is None:
            args[item.name] = item.metadata["tiny"] if args["size"] == "tiny" else item.default
        elif item.metadata and args[item.name] < 0:
            parser.error(f"--{item.name.replace('_', '-')} must not be negative")
    args["method"] = args["method"] or ("both" if args["size"] == "tiny" else "dpo-st")
    config = Config(**args)
    return config, out or Path("runs") / f"{config.size}-seed-{config.seed}", question


def load_data(config: Config) -> tuple[list[Problem], list[Problem], dict[str, list[Problem]]]:
    """The labeled set L (rationales formatted), the unlabeled set U, and the test sets by name."""
    if config.size == "tiny" and not config.data:
        n_train = config.n_labeled + config.n_unlabeled
        train = make_problems(n_train, seed=config.seed)
        labeled, unlabeled = train[: config.n_labeled], train[config.n_labeled :]
        seen = {problem.question for problem in train}
        tests = {"held-out": make_problems(config.n_test, seed=config.seed + 10**6, exclude=seen)}
    else:
        folder = Path(config.data) if config.data else fetch_datasets()
        labeled = unlabeled = load_problems(folder / "gsm8k" / "train.jsonl")
        paths = {name: folder / place / "test.jsonl" for name, place in TESTS.items()}
        tests = {name: load_problems(path) for name, path in paths.items() if path.exists()}
        if not tests:
            raise FileNotFoundError(f"{folder} has no test set: put one at {paths['GSM8K']}")
    first = config.limit or None
    lacking = [problem.question for problem in labeled[:first] if problem.rationale is None]
    if lacking:
        raise ValueError(f"the labeled set has a problem without a rationale: {lacking[0][:60]!r}")
    labeled = [replace(problem, rationale=format_rationale(problem.rationale)) for problem in labeled[:first]]
    return labeled, unlabeled[:first], {name: problems[:first] for name, problems in tests.items()}


class RunFolder:
    """The files of a run. Everything is written beside its place and renamed into it: what has a name is complete."""

    def __init__(self, path: Path, config: Config):
        """Start or continue a run. Raises ValueError if the folder holds a run with other numbers."""
        self.path = path
        stored, wanted = path / "config.json", asdict(config)
        before = read_json(stored) if stored.exists() else wanted
        free = {"rounds", "method", "device"}  # more rounds or the other method continue a run as it is
        changed = [f"{key} {before.get(key)} -> {wanted[key]}" for key in wanted if before.get(key) != wanted[key]]
        changed = [change for change in changed if change.split()[0] not in free]
        if changed:
            raise ValueError(f"{path} holds a run with other numbers ({', '.join(changed)}): choose another --out")
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

    def keep_model(self, name: str, make: Callable, base: Path) -> Path:
        folder = self.path / name
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            save_flan_t5(make(), partial)
            shutil.copy(base / "spiece.model", partial)
            os.replace(partial, folder)
        return folder

    def report(self, config: Config) -> str:
        """Gather the evaluations in results.json and results.md; return the table, in the shape of table 2."""
        results = {}
        for path in sorted(self.path.glob("**/evaluation.jsonl")):
            stage = path.parent.relative_to(self.path).as_posix()
            results[stage] = {column(row): round(row["accuracy"], 2) for row in read_jsonl(path)}
        write_text(json.dumps(results, indent=2) + "\n", self.path / "results.json")
        tests = list(results["warm-up"])
        lines = ["| method | round | " + " | ".join(tests) + " |", "|---" * (len(tests) + 2) + "|"]
        for stage, row in results.items():
            pass
        for label, prefix in (("SFT", "warm-up"), ("ST", "st/"), ("DPO-ST", "dpo-st/")):
            for stage in sorted((s for s in results if s.startswith(prefix)), key=lambda s: int(s.split("-")[-1]) if "/" in s else 0):
                cells = [f"{results[stage][test]:.1f}" for test in tests]
                lines.append(f"| {label} | {stage.split('-')[-1] if '/' in stage else 0} | {' | '.join(cells)} |")
            if config.size in PAPER and list(TESTS) == [test for test in tests if test in TESTS]:
                paper = dict(zip(TESTS, PAPER[config.size][label]))
                lines.append(f"| {label} (paper) | {3 if label != 'SFT' else 0} | " + " | ".join(str(paper.get(t, "")) for t in tests) + " |")
        table = "\n".join(lines) + "\n"
        write_text(f"Greedy accuracy (%), Flan-T5 {config.size}, seed {config.seed}\n\n{table}", self.path / "results.md")
        return table


def ask(out: Path, question: str, device: str) -> None:
    """Print the rationale of the run's newest SFT model, the calculator's digits marked."""
    finished = [path.parent for path in out.glob("**/sft/config.json")]
    if not finished:
        raise FileNotFoundError(f"{out} holds no finished model yet: run without --ask first")
    folder = max(finished, key=lambda path: (path.parts[-3:-1], path.stat().st_mtime))
    model, tokenizer = load_flan_t5(folder, device=device), Tokenizer(folder)
    marks = ("\033[1m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("«", "»")
    print(mark_forced(tokenizer, generate(model, tokenizer, [question])[0][0], *marks))


def main() -> None:
    config, out, question = parse_args()
    torch.set_flush_denormal(True)  # barely trained models produce denormal numbers, which are many times slower
    torch.backends.cuda.matmul.allow_tf32 = True  # authors' code
    if question is not None:
        return ask(out, question, config.device)
    began = time.perf_counter()
    base = Path(config.weights) if config.weights else HERE / "data" / "tiny" if config.size == "tiny" else fetch_flan_t5(config.size)
    labeled, unlabeled, tests = load_data(config)
    tokenizer = Tokenizer(base)
    folder = RunFolder(out, config)
    print(f"DPO-ST, Flan-T5 {config.size} on {config.device}: L {len(labeled)}, U {len(unlabeled)}, run folder {out}")
    stages = Stages(
        base, tokenizer, config, folder.keep_rows, lambda name, make: folder.keep_model(name, make, base), folder.log
    )
    for method in ("st", "dpo-st") if config.method == "both" else (config.method,):
        self_train(method, labeled, unlabeled, tests, config, stages)
    print(f"\nGreedy accuracy (%) after {time.perf_counter() - began:,.0f} s:\n\n{folder.report(config)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, DownloadError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"run.py: {error}")
