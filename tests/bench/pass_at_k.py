"""pass@k on the test sets of finished runs, with and without the calculator, before and after every DPO step.

    python -m tests.bench.pass_at_k runs/tiny-seed-? [--samples 5] [--problems 500] [--tests held-out] [--models warm-up/sft ...]

A run keeps greedy answers only for its test sets; this draws anew, from the checkpoints in its folder, at its temperature and
top-k. One table a test set; runs that differ in the seed are merged, of a single run the 95 % interval is a bootstrap over problems.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

import run
from decode import generate
from model import T5, load_flan_t5
from selftrain import is_correct, pass_at_k
from tests.bench.report import about_samples, config_of, spread
from tokenizer import Tokenizer


def bootstrap(values: list[float], n: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean, by drawing the values again with replacement (seed 0)."""
    means = np.random.default_rng(0).choice(values, (n, len(values))).mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def draw(model: T5, tokenizer: Tokenizer, problems: list, config: run.Config, n_samples: int, calculator: bool, title: str) -> list[dict]:
    """n_samples rationales for each problem, in the rows that a run would keep."""
    written = generate(
        model, tokenizer, [problem.question for problem in problems], n_samples, config.temperature, config.top_k, config.max_new_tokens,
        calculator, f"pass@k/{config.seed}", config.decode_batch_size or 96, progress=title,
    )  # fmt: skip
    return [{"answer": problem.answer, "rationales": [s.text for s in row], "finished": [s.finished for s in row]}
            for problem, row in zip(problems, written)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--problems", type=int, default=500, help="the first so many of every test set")
    parser.add_argument("--tests", nargs="+", help="names of test sets; default: all")
    parser.add_argument("--models", nargs="+", help="checkpoints in the folders; default: all")
    args = parser.parse_args()
    if missing := [folder for folder in args.runs if not (folder / "config.json").exists()]:
        parser.error(f"{missing[0]} is not the folder of a run")
    if args.samples < 1 or args.problems < 1:
        parser.error("--samples and --problems must be at least 1")
    torch.set_flush_denormal(True)
    rows: dict[tuple[str, str, bool], list[dict]] = {}
    for folder in args.runs:
        config = config_of(json.loads((folder / "config.json").read_text()))
        found = sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("spiece.model"))
        tests = run.load_data(config)[2]
        if unknown := (set(args.models or ()) - set(found)) | (set(args.tests or ()) - set(tests)):
            parser.error(f"{folder} has no {unknown.pop()}: its models are {', '.join(found)}, its tests {', '.join(tests)}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if config.bf16 or device == "cuda" else torch.float32
        for name in args.models or found:
            model, tokenizer = load_flan_t5(folder / name, dtype, device), Tokenizer(folder / name)
            for test, calculator in itertools.product(args.tests or tests, (True, False)):
                problems = tests[test][: args.problems]
                drawn = draw(model, tokenizer, problems, config, args.samples, calculator, f"{folder / name} {test}")
                rows.setdefault((test, name, calculator), []).append(drawn)
    for test in dict.fromkeys(key[0] for key in rows):
        lines = []
        for (of, name, calculator), runs in rows.items():
            if of == test:
                n = len(runs[0])
                about = [about_samples(drawn, tokenizer, args.samples) for drawn in runs]
                cells = {key: spread([numbers[key] for numbers in about]) for key in about[0]}
                for k in {1, args.samples} if len(runs) == 1 else ():
                    right = [sum(is_correct(text, row["answer"]) for text in row["rationales"]) for row in runs[0]]
                    low, high = bootstrap([100 * pass_at_k(args.samples, n_right, k) for n_right in right])
                    cells[f"pass@{k}"] += f" ({low:.1f} to {high:.1f})"
                lines.append([name + ("" if calculator else ", no calculator"), *cells.values()])
        print(f"\n{test}: {args.samples} samples for each of {n} problems, {len(args.runs)} runs, %\n\n"
              f"| | {' | '.join(cells)} |\n{'|---' * (len(cells) + 1)}|")  # fmt: skip
        print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
