"""The paper's figure 6, and a DPO step seen closely: what it does to the texts it is trained on.

    python -m tests.bench.dpo_step runs/tiny-seed-? [--round 1] [--problems N] [--out DIR]
    python -m tests.bench.dpo_step runs/tiny-seed-? --closely [--round 1] [--out DIR]

The model before the step is f', the model after it f_d. Figure 6, on the dev problems: Pass@1 is
greedy; Pass@10 uses ten samples at the run's temperature. Pseudo-labels are counted in the run's
files, from three samples for each question of U, without gold rationales.

--closely: the change of log pi(y|x) across the step, for chosen, rejected and greedy texts, by the
pair's similarity and by token. Then the step is repeated with the three MOST similar pairs of each
question, from all its samples without deduplication. Runs that differ in the seed are merged.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.problems import Problem, read_jsonl
from data.terminal import run_command
from dpo import PreferencePair
from model import T5, load_flan_t5
from run import load_data
from selftrain import Experiment, jaccard, make_pairs
from sft import IGNORE, token_logps
from tests.bench.drawing import (
    BLUE,
    GREEN,
    RED,
    add_legend,
    add_plain_style,
    new_figure,
    save_figures,
)
from tests.bench.report import chances, config_of, count_labels, interval, spread, table
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

NAMES = ("greedy Pass@1 (%)", "Pass@10 (%)", "pseudo-labels")
N_BANDS = 4  # of similarity, with equally many pairs in each

# ----------------------------------------------------------------------------------------- figure 6


def measure_model(
    folder: Path, config: argparse.Namespace, checkpoint: str, dev: Sequence[Problem]
) -> tuple[float, float]:
    """Pass@1 and Pass@10 of a model of the run, in %, with the calculator."""
    tokenizer = Tokenizer(folder / checkpoint)
    experiment = Experiment(config, [], [], {"dev": dev}, folder, tokenizer, folder, print)
    model = experiment.load(folder / checkpoint)
    greedy = experiment.generate(model, dev, "dev")
    sampled = experiment.generate(
        model,
        dev,
        str(folder / checkpoint),
        n_samples=10,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=f"figure 6/{config.seed}",
    )
    return 100 * statistics.mean(chances(greedy, 1)), 100 * statistics.mean(chances(sampled, 10))


def before_step(number: int) -> str:
    """The checkpoint f' that a round's DPO step starts from."""
    return "warm-up/sft" if number == 1 else f"dpo-st/round-{number - 1}/sft"


def measure_step(folder: Path, number: int, n_problems: int | None) -> dict[str, list[float]]:
    """The three numbers before and after the DPO step of a round."""
    config = config_of(folder)
    _, _, tests = load_data(config)
    if "dev" not in tests:
        raise ValueError(f"{folder}: this run has no test set named dev")
    dev = tests["dev"][: config.limit or None][:n_problems]
    here = f"dpo-st/round-{number}"
    before = before_step(number)
    tokenizer = Tokenizer(folder / before)
    found = {}
    for when, model, samples in (("before", before, "pairs"), ("after", f"{here}/dpo", "labels")):
        rows = read_jsonl(folder / here / f"samples-for-{samples}.jsonl")
        n_labels = count_labels(rows, tokenizer, 3)
        found[when] = [*measure_model(folder, config, model, dev), n_labels]
    return found


def draw(found: list[dict[str, list[float]]]):
    """Draw bars before and after the step, for each of the three numbers."""
    figure, panels = new_figure(10, 4, 3)
    for number, axes in enumerate(panels):
        for x, when, color in ((0, "before", "#999999"), (1, "after", RED)):
            values = [run[when][number] for run in found]
            error = statistics.stdev(values) if len(values) > 1 else None
            axes.bar(x, statistics.mean(values), yerr=error, capsize=6, color=color)
        axes.set_xticks((0, 1), ("before DPO", "after DPO"))
        axes.set_ylabel(NAMES[number])
    return figure


def print_figure_6(found: list[dict[str, list[float]]]) -> None:
    rows = []
    for number, name in enumerate(NAMES):
        before = [run["before"][number] for run in found]
        after = [run["after"][number] for run in found]
        differences = [two - one for one, two in zip(before, after, strict=True)]
        rows.append([name, spread(before), spread(after), interval(differences)])
    print(table(["", "before DPO", "after DPO", "difference"], rows))


# ------------------------------------------------------------------------------------ seen closely


@torch.no_grad()
def logps_of(model: T5, tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Tensor]:
    """log pi of every token of each (question, rationale), EOS included; (T,) each."""
    found = []
    for begin in range(0, len(texts), 64):
        part = texts[begin : begin + 64]
        questions = [tokenizer.encode(question, MAX_QUESTION) for question, _ in part]
        rationales = [tokenizer.encode(rationale, MAX_RATIONALE) for _, rationale in part]
        input_ids, mask = pad_batch(questions, model.device)
        labels, _ = pad_batch(rationales, model.device, IGNORE)
        logps = token_logps(model, model.encode(input_ids, mask), mask, labels)
        found += [row[: len(ids)].cpu() for row, ids in zip(logps, rationales)]
    return found


def written_by_calculator(tokenizer: Tokenizer, rationale: str) -> Tensor:
    """Which tokens stand between `[ ... =` and the end of `]`; (T,) bool, EOS included."""
    inside = forced = False
    marks = []
    for token in tokenizer.encode(rationale, MAX_RATIONALE):
        piece = tokenizer.sentencepiece.id_to_piece(token)
        inside = inside or "[" in piece
        marks.append(forced)
        forced = inside and (forced or "=" in piece)
        if "]" in piece:
            inside = forced = False
    return torch.tensor(marks)


def start_of_difference(tokenizer: Tokenizer, pair: PreferencePair) -> int:
    """The first token in which the two rationales of a pair differ."""
    chosen, rejected = (tokenizer.encode(text) for text in (pair.chosen, pair.rejected))
    same = [one == other for one, other in zip(chosen, rejected)]
    return same.index(False) if False in same else len(same)


class Step:
    """A model before and after a DPO step, and the change of log pi of the texts around it."""

    def __init__(self, experiment: Experiment, before: T5, after: T5, pairs: list[PreferencePair]):
        tokenizer = experiment.tokenizer
        self.pairs = pairs
        asked = list(dict.fromkeys(pair.question for pair in pairs))
        rows = experiment.generate(before, [Problem(question, "") for question in asked], "greedy")
        greedy = [(row["question"], row["rationales"][0]) for row in rows]

        def change(texts: list[tuple[str, str]]) -> list[Tensor]:
            old, new = (logps_of(model, tokenizer, texts) for model in (before, after))
            return [two - one for one, two in zip(old, new)]

        self.chosen = change([(pair.question, pair.chosen) for pair in pairs])
        self.rejected = change([(pair.question, pair.rejected) for pair in pairs])
        self.greedy = change(greedy)
        pieces = [
            (tokenizer.piece_set(pair.chosen), tokenizer.piece_set(pair.rejected)) for pair in pairs
        ]
        self.similarity = [jaccard(*both) for both in pieces]
        self.forced = {
            kind: [written_by_calculator(tokenizer, getattr(pair, kind)) for pair in pairs]
            for kind in ("chosen", "rejected")
        }
        self.start = [start_of_difference(tokenizer, pair) for pair in pairs]

    def totals(self) -> dict[str, float]:
        """Mean changes of complete texts in nats, and how many chosen ones fall, in %."""
        sums = torch.stack([change.sum() for change in self.chosen])
        return {
            "pairs": len(self.pairs),
            "similarity": statistics.mean(self.similarity),
            "chosen": sums.mean().item(),
            "rejected": statistics.mean(change.sum().item() for change in self.rejected),
            "greedy": statistics.mean(change.sum().item() for change in self.greedy),
            "chosen that fall, %": 100 * (sums < 0).float().mean().item(),
        }

    def by_similarity(self) -> list[tuple[float, float, float]]:
        """Mean similarity, change of the chosen and of the rejected, in bands of similarity."""
        order = sorted(range(len(self.pairs)), key=lambda i: self.similarity[i])
        bands = []
        for number in range(N_BANDS):
            band = order[number * len(order) // N_BANDS : (number + 1) * len(order) // N_BANDS]
            sums = [
                [changes[i].sum().item() for i in band] for changes in (self.chosen, self.rejected)
            ]
            means = [statistics.mean(values) for values in sums]
            bands.append((statistics.mean(self.similarity[i] for i in band), *means))
        return bands

    def by_token(self) -> dict[str, dict[str, float]]:
        """Mean change per pair in nats, by kind of token: where in a text the change happens."""
        found = {}
        for kind, changes in (("chosen", self.chosen), ("rejected", self.rejected)):
            parts = {name: 0.0 for name in ("before the texts differ", "the first that differs", "the calculator's, later", "others, later")}  # fmt: skip
            for change, forced, start in zip(changes, self.forced[kind], self.start):
                place = torch.arange(len(change))
                parts["before the texts differ"] += change[place < start].sum().item()
                parts["the first that differs"] += change[place == start].sum().item()
                parts["the calculator's, later"] += change[(place > start) & forced].sum().item()
                parts["others, later"] += change[(place > start) & ~forced].sum().item()
            found[kind] = {name: value / len(changes) for name, value in parts.items()}
        return found


def look_closely(folder: Path, number: int) -> tuple[Step, Step]:
    """The run's own DPO step, and the same step with the most similar pairs."""
    config = config_of(folder)
    here = folder / "dpo-st" / f"round-{number}"
    before = folder / before_step(number)
    tokenizer = Tokenizer(before)
    experiment = Experiment(config, [], [], {}, before, tokenizer, folder, lambda record: None)
    pairs = [PreferencePair(**row) for row in read_jsonl(here / "preference-pairs.jsonl")]
    policy = load_flan_t5(before)
    usual = Step(experiment, policy, load_flan_t5(here / "dpo"), pairs)

    similar = []
    for row in read_jsonl(here / "samples-for-pairs.jsonl"):
        problem = Problem(row["question"], row["answer"])
        ranked = make_pairs(problem, row["rationales"], tokenizer, 1.0, len(row["rationales"]) ** 2)
        similar += ranked[-config.n_pairs :]
    with tempfile.TemporaryDirectory() as scratch:
        repeated = replace(experiment, folder=Path(scratch))
        trained = load_flan_t5(repeated.dpo("dpo", before, similar, number))
    return usual, Step(experiment, policy, trained, similar)


def print_closely(steps: list[tuple[Step, Step]]) -> None:
    """The tables of --closely: means over runs."""
    rows = []
    names = ("least similar pairs (the authors')", "most similar pairs, duplicates kept")
    for name, ours in zip(names, zip(*steps)):
        totals = [step.totals() for step in ours]
        rows.append([name, *(f"{statistics.mean(t[k] for t in totals):.2f}" for k in totals[0])])
    print("Change of log pi(y|x) across the step, in nats, mean over pairs and runs:\n")
    print(table(["trained on", *steps[0][0].totals()], rows))
    bands = [step.by_similarity() for step, _ in steps]
    rows = []
    for number in range(N_BANDS):
        means = [statistics.mean(band[number][i] for band in bands) for i in range(3)]
        rows.append([f"{means[0]:.2f}", f"{means[1]:+.2f}", f"{means[2]:+.2f}"])
    print("\nBy the pair's similarity (least similar pairs):\n")
    print(table(["similarity", "chosen", "rejected"], rows))
    tokens = [step.by_token() for step, _ in steps]
    rows = []
    for name in tokens[0]["chosen"]:
        means = [statistics.mean(t[kind][name] for t in tokens) for kind in ("chosen", "rejected")]
        rows.append([name, *(f"{mean:+.2f}" for mean in means)])
    print("\nBy token: nats per text that come from these tokens:\n")
    print(table(["tokens", "chosen", "rejected"], rows))


def draw_closely(steps: list[tuple[Step, Step]], tokenizer: Tokenizer):
    """Left: the change by similarity. Right: one pair, token by token, the calculator's shaded."""
    figure, (left, right) = new_figure(16, 5, 2)
    for changes, color in (("rejected", RED), ("chosen", BLUE)):
        step = steps[0][0]
        sums = [change.sum().item() for change in getattr(step, changes)]
        left.plot(step.similarity, sums, ".", color=color, alpha=0.3, label=f"{changes}, first run")
    for i, (name, color) in enumerate((("chosen", BLUE), ("rejected", RED)), 1):
        bands = [step.by_similarity() for step, _ in steps]
        points = [[statistics.mean(b[n][j] for b in bands) for j in (0, i)] for n in range(N_BANDS)]
        left.plot(*zip(*points), "-o", color=color, label=f"{name}, mean of runs: {len(steps)}")
    left.axhline(0, color="grey", linewidth=1)
    left.set_xlabel("similarity of the pair (Jaccard)")
    left.set_ylabel("change of log pi(y|x) (nats)")
    left.set_ylim(-25, 6)
    add_legend(left, fontsize=9)
    step = steps[0][0]
    lengths = [len(change) for change in step.chosen]
    typical = min(range(len(lengths)), key=lambda i: (abs(lengths[i] - 30), i))
    pair = step.pairs[typical]
    place = 0.0
    labels = []
    for kind, color in (("chosen", BLUE), ("rejected", RED)):
        ids = tokenizer.encode(getattr(pair, kind), MAX_RATIONALE)
        changes = getattr(step, kind)[typical]
        forced = step.forced[kind][typical]
        for token, change, by_tool in zip(ids, changes.tolist(), forced.tolist()):
            if by_tool:
                right.axvspan(place - 0.5, place + 0.5, color=GREEN, alpha=0.2, linewidth=0)
            right.bar(place, change, color=color)
            labels.append((place, tokenizer.sentencepiece.id_to_piece(token).replace("▁", "")))
            place += 1
        place += 3
    right.set_xticks(*zip(*labels), rotation=90, fontsize=8)
    right.axhline(0, color="grey", linewidth=1)
    right.set_ylabel("change of log pi of the token (nats)")
    right.set_xlabel("one pair: chosen, then rejected; shaded: the calculator's tokens")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--problems", type=int, help="the first N of dev (all)")
    parser.add_argument("--closely", action="store_true", help="log-probabilities, not figure 6")
    parser.add_argument("--out", type=Path, help="of the picture (none)")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if config_of(args.runs[0]).size == "tiny":
        torch.set_num_threads(1)
    if args.closely:
        steps = [look_closely(folder, args.round) for folder in args.runs]
        print_closely(steps)
        if args.out and add_plain_style():
            picture = draw_closely(steps, Tokenizer(args.runs[0] / before_step(args.round)))
            save_figures({"dpo-closely": picture}, args.out)
        return
    found = [measure_step(folder, args.round, args.problems) for folder in args.runs]
    print_figure_6(found)
    if args.out and add_plain_style():
        save_figures({"dpo-step": draw(found)}, args.out)


if __name__ == "__main__":
    run_command(main)
