"""Self-training, plain and with DPO: the paper's text rules, Algorithms 1 and 2, and their stages.

First the rules for rationales (sections 3.1 and 4.2), which need no model; then the algorithms;
then what each of their steps does and how its result is stored. Left out: tensors (model.py,
decode.py, sft.py, dpo.py), flags and data (run.py).

    python selftrain.py        # one question: the tiny model's samples -> pairs -> pseudo-labels
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from calculator import format_number
from data.folder import is_finished, write_atomically
from data.problems import Problem, same_answer, write_jsonl
from data.processes import from_process_0, share_work
from data.results import accuracies, read_samples
from data.synthetic import make_problems
from data.terminal import STAGES, run_command, say_record
from decode import Sample, generate, mark_forced
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import T5, load_flan_t5, save_flan_t5
from sft import Log, Schedule, make_examples, train_sft
from tokenizer import Tokenizer, format_rationale

MAX_SIMILARITY = 0.7  # section 4.2: more similar rationales are duplicates
N_PAIRS = 3  # authors' code: preference pairs kept per question
PERCENTILE = 90  # authors' code: caps the pseudo-labels per question
Rationales = list[list[str]]  # the samples of each question
NO_LABEL = "no correct sample, or all too similar to gold or above the cap (--percentile)"
SCHEDULE_FLAGS = (  # the fields of sft.Schedule that are the same for SFT and DPO
    *("warmup_ratio", "final_ratio", "weight_decay", "max_grad_norm"),
    *("micro_batch_tokens", "bf16", "log_every", "seed"),
)

# ---------------------------------------------------------------------------- rules for rationales


def extract_answer(rationale: str) -> float | None:
    """The last `#### NUMBER` as a number, or None. Source: authors' code, eval_sampling.py.

    >>> extract_answer("He pays 3 * 400 = [ 3 * 400 = 1200] 1200. #### 1,200")
    1200.0
    """
    found = re.findall(r"#+ (-?[0-9.,]+)", rationale)
    try:
        answer = float(found[-1].replace(",", ""))
    except (IndexError, ValueError):
        return None
    return answer if math.isfinite(answer) else None


def is_correct(rationale: str, answer: float | str) -> bool:
    """Whether the rationale reaches the gold answer: a number or, in your own data, a short text.

    A number may also be rounded as the calculator rounds: 0.33 is correct for 1/3.
    DIFFERS: one definition of correct everywhere; the authors' code has two tolerances.
    """
    if not isinstance(answer, str):
        predicted = extract_answer(rationale)
        if predicted is None:
            return False
        return same_answer(predicted, answer) or predicted == float(format_number(answer))
    _, mark, predicted = rationale.rpartition("#### ")
    return mark != "" and same_answer(predicted, answer)


def split_samples(rationales: Sequence[str], answer: float | str) -> tuple[list[str], list[str]]:
    """One question's correct and incorrect samples, each sorted and without exact duplicates.

    The order matters: `deduplicate` keeps the first of two similar rationales. Source: authors'
    code.
    """
    correct, incorrect = [], []
    for rationale in sorted(set(rationales)):
        if is_correct(rationale, answer):
            correct.append(rationale)
        else:
            incorrect.append(rationale)
    return correct, incorrect


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Similarity of two sets of tokenizer pieces, from 0 to 1; 1 when both are empty.

    >>> jaccard(frozenset("abc"), frozenset("bcd"))
    0.5
    """
    if not a and not b:
        return 1.0
    return len(a & b) / len(a | b)


def deduplicate(
    rationales: Sequence[str], tokenizer: Tokenizer, max_similarity: float
) -> list[str]:
    """Keep a rationale only if its similarity to every kept one is at most max_similarity.

    >>> texts = ["2 + 3 = 5. #### 5", "3 + 2 = 5. #### 5", "Ben has 5 coins. #### 5"]
    >>> deduplicate(texts, Tokenizer("data/tiny"), MAX_SIMILARITY)  # the second: same pieces
    ['2 + 3 = 5. #### 5', 'Ben has 5 coins. #### 5']
    """
    kept: list[str] = []
    kept_pieces: list[frozenset[str]] = []
    for rationale in rationales:
        pieces = tokenizer.piece_set(rationale)
        if all(jaccard(pieces, other) <= max_similarity for other in kept_pieces):
            kept.append(rationale)
            kept_pieces.append(pieces)
    return kept


def make_pairs(
    problem: Problem,
    rationales: Sequence[str],
    tokenizer: Tokenizer,
    max_similarity: float,
    n_pairs: int,
) -> list[PreferencePair]:
    """Pair the correct with the incorrect rationales of one question; [] if either is missing.

    Source: section 4.2 (deduplicate); authors' code, make_dpo_data.py (the gold rationale is the
    first winning one; the n_pairs least similar pairs are kept).
    DIFFERS: equally similar pairs keep their order; the authors shuffle them first.
    """
    correct, incorrect = split_samples(rationales, problem.answer)
    gold = [problem.rationale] if problem.rationale else []
    winning = deduplicate(gold + correct, tokenizer, max_similarity)
    losing = deduplicate(incorrect, tokenizer, max_similarity)
    # Tokenize each text once; it occurs in many pairs.
    pieces = {rationale: tokenizer.piece_set(rationale) for rationale in winning + losing}
    pairs = []
    for chosen in winning:
        for rejected in losing:
            pairs.append(PreferencePair(problem.question, chosen, rejected))
    pairs.sort(key=lambda pair: jaccard(pieces[pair.chosen], pieces[pair.rejected]))
    return pairs[:n_pairs]


def make_pseudo_labels(
    problems: Sequence[Problem],
    samples: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_similarity: float,
    percentile: float,
) -> list[Problem]:
    """S_a: correct rationales as training problems; samples[i] belong to problems[i].

    A problem's gold rationale is kept before any sample and left out at the end, because L has it.
    The number kept per question is capped at a percentile of that number over the questions that
    have any. Source: section 3.1; the cap and gold: authors' code, make_rft_data.py.
    DIFFERS: the authors format these texts a second time, so that theirs end in `#### 24.`.
    """
    kept = []
    for problem, rationales in zip(problems, samples, strict=True):
        correct, _ = split_samples(rationales, problem.answer)
        gold = [problem.rationale] if problem.rationale else []
        kept.append(deduplicate(gold + correct, tokenizer, max_similarity))
    counts = [len(rationales) for rationales in kept if rationales]
    if not counts:
        return []
    cap = int(np.percentile(counts, percentile))  # rounded down
    labels = []
    for problem, rationales in zip(problems, kept):
        for rationale in rationales[:cap]:
            if rationale != problem.rationale:
                labels.append(replace(problem, rationale=rationale))
    return labels


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """The probability that k of n samples include a correct one. Source: Chen et al. (2021).

    >>> pass_at_k(n=5, n_correct=1, k=3)
    0.6
    """
    return 1 - math.comb(n - n_correct, k) / math.comb(n, k)


# ------------------------------------------------------------------------------ Algorithms 1 and 2


def self_train(experiment: "Experiment", method: str) -> Path:
    """Run Algorithm 1 (method "st") or Algorithm 2 ("dpo-st"); return the last f'.

    f, f_prime and f_d are checkpoint folders: models travel from stage to stage as files. The first
    argument of each stage is the file or folder that it makes.
    """
    L, c = experiment.L, experiment.config
    # Earlier rounds count: labels as in the paper (L <- S_a + L), pairs as in the authors' code.
    drawn_for_pairs: list[Rationales] = []  # by f'
    drawn_for_labels: list[Rationales] = []  # by f' (ST) or f_d (DPO-ST)
    f_prime = experiment.sft("warm-up/sft", L)  # f' = SFT(f, L)
    experiment.evaluate("warm-up/evaluation.jsonl", f_prime)
    for round_number in range(1, c.rounds + 1):
        here = f"{method}/round-{round_number}"
        writer = f_prime
        k = c.st_samples
        if method == "dpo-st":
            # DPO step: f_d = DPO(policy f', reference f', D)
            new = experiment.sample(f"{here}/samples-for-pairs.jsonl", f_prime, c.dpo_samples)
            drawn_for_pairs.append(new)
            D = experiment.pairs(f"{here}/preference-pairs.jsonl", drawn_for_pairs)
            f_d = experiment.dpo(f"{here}/dpo", f_prime, D, round_number)
            writer = f_d
            k = c.sft_samples
        # SFT step: f' = SFT(f, L + S_a), always from the base weights f
        new = experiment.sample(f"{here}/samples-for-labels.jsonl", writer, k)
        drawn_for_labels.append(new)
        S_a = experiment.pseudo_labels(f"{here}/pseudo-labels.jsonl", drawn_for_labels)
        f_prime = experiment.sft(f"{here}/sft", L + S_a)
        experiment.evaluate(f"{here}/evaluation.jsonl", f_prime)
    return f_prime


@dataclass
class Experiment:
    """The inputs of the algorithms, and their steps; each step makes one file or folder."""

    config: argparse.Namespace  # the flags of run.py
    L: list[Problem]  # labeled, with formatted rationales
    U: list[Problem]  # unlabeled; only problems that L also has keep their rationale, as gold
    tests: dict[str, list[Problem]]  # by name
    f: Path  # the checkpoint with the base weights
    tokenizer: Tokenizer
    folder: Path  # of this run
    log: Log

    def once(self, name: str, make: Callable[[], object], write: Callable) -> Path:
        """Make a result and write it under its name, unless it is there already.

        This is all that a restart needs: the same command continues where a run was stopped. Under
        torchrun every process makes the result, and process 0 writes it.
        """
        path = self.folder / name
        if not from_process_0(partial(is_finished, path)):
            with STAGES.stage(name):
                result = make()
            from_process_0(partial(write_atomically, path, partial(write, result)))
        return path

    def sft(self, name: str, problems: list[Problem]) -> Path:
        """SFT(f, problems): supervised fine-tuning that starts from the base weights f."""
        c = self.config

        def train() -> T5:
            model = load_flan_t5(self.f, device=c.device)
            examples = make_examples(problems, self.tokenizer)
            schedule = self.schedule(c.sft_learning_rate, c.sft_batch_size)
            return train_sft(model, examples, c.sft_epochs, schedule, name, self.log)

        return self.once(name, train, self.save)

    def dpo(self, name: str, policy: Path, pairs: list[PreferencePair], round_number: int) -> Path:
        """DPO(policy, reference = policy, pairs); without pairs, the policy itself.

        In later rounds --size tiny takes smaller steps: fewer samples then lose their answer.
        """
        c = self.config
        if not pairs:
            return policy

        def train() -> T5:
            model = load_flan_t5(policy, device=c.device)
            examples = make_pair_examples(pairs, self.tokenizer)
            peak_rate = c.dpo_learning_rate * (c.later_ratio if round_number > 1 else 1)
            schedule = self.schedule(peak_rate, c.dpo_batch_size)
            return train_dpo(model, examples, c.dpo_steps, c.beta, schedule, name, self.log)

        return self.once(name, train, self.save)

    def sample(self, name: str, model: Path, k: int) -> Rationales:
        """Draw k rationales for each question of U; the seed includes the stage's name."""
        c = self.config

        def draw() -> list[dict]:
            rows = self.generate(
                self.load(model),
                self.U,
                name,
                n_samples=k,
                temperature=c.temperature,
                top_k=c.top_k,
                calculator=c.calculator,
                seed=f"{c.seed}/{name}",
            )
            record = {"stage": name, "rationales": k * len(rows)}
            for draws in (1, k):
                chances = [pass_at_k(n=k, n_correct=sum(row["correct"]), k=draws) for row in rows]
                record[f"pass@{draws}"] = 100 * float(np.mean(chances))
            self.log(record)
            return rows

        path = self.once(name, draw, write_jsonl)
        return read_samples(path, self.U, k)

    def pairs(self, name: str, rounds: list[Rationales]) -> list[PreferencePair]:
        """D, from the samples of all rounds so far."""
        c = self.config
        pairs = []
        for problem, rationales in zip(self.U, join_rounds(rounds), strict=True):
            pairs += make_pairs(problem, rationales, self.tokenizer, c.max_similarity, c.n_pairs)
        return self.keep(name, pairs, if_none="the DPO step is skipped")

    def pseudo_labels(self, name: str, rounds: list[Rationales]) -> list[Problem]:
        """S_a, from the samples of all rounds so far."""
        c = self.config
        labels = make_pseudo_labels(
            self.U, join_rounds(rounds), self.tokenizer, c.max_similarity, c.percentile
        )
        return self.keep(name, labels, if_none=f"SFT uses L alone: {NO_LABEL}")

    def keep(self, name: str, items: list, if_none: str) -> list:
        """Store pairs or labels for people to read; a restart makes them again from the samples."""

        def to_rows() -> list[dict]:
            questions = {item.question for item in items}
            record = {"stage": name, "kept": len(items), "questions": len(questions)}
            if not items:
                record["note"] = if_none
            self.log(record)
            return [asdict(item) for item in items]

        self.once(name, to_rows, write_jsonl)
        return items

    def evaluate(self, name: str, f_prime: Path) -> None:
        """Greedy rationales with the calculator on every test; dev also without (figure 7)."""

        def answer() -> list[dict]:
            model = self.load(f_prime)
            plan = [(test, True) for test in self.tests]
            if "dev" in self.tests:
                plan.append(("dev", False))
            rows = []
            for test, calculator in plan:
                answers = self.generate(model, self.tests[test], test, calculator=calculator)
                rows += [{"test": test, "calculator": calculator} | row for row in answers]
            self.log({"stage": name} | accuracies(rows))
            return rows

        self.once(name, answer, write_jsonl)

    def generate(self, model: T5, problems: list[Problem], title: str, **options) -> list[dict]:
        """Generate rationales: one row per problem. options go to decode.generate."""
        c = self.config

        def generate_share(share: Sequence[Problem]) -> list[dict]:
            questions = [problem.question for problem in share]
            generated = generate(
                model,
                self.tokenizer,
                questions,
                max_new_tokens=c.max_new_tokens,
                batch_size=c.decode_batch_size,
                title=title,
                **options,
            )
            return [to_row(problem, samples) for problem, samples in zip(share, generated)]

        return share_work(problems, generate_share)

    def load(self, model: Path) -> T5:
        """Load a model for inference.

        DIFFERS: with --bf16 its weights are bf16, too; the authors keep fp32 weights and autocast.
        """
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        return load_flan_t5(model, dtype, self.config.device)

    def save(self, model: T5, path: Path) -> None:
        """Write a checkpoint that includes the vocabulary."""
        save_flan_t5(model, path)
        (path / "spiece.model").write_bytes((self.f / "spiece.model").read_bytes())

    def schedule(self, peak_rate: float, batch_size: int) -> Schedule:
        flags = {name: getattr(self.config, name) for name in SCHEDULE_FLAGS}
        return Schedule(peak_rate, batch_size, **flags)


def join_rounds(rounds: list[Rationales]) -> Rationales:
    """The rationales of all rounds, question by question.

    >>> join_rounds([[["a"], ["b"]], [["c"], ["d", "e"]]])
    [['a', 'c'], ['b', 'd', 'e']]
    """
    return [list(chain.from_iterable(samples)) for samples in zip(*rounds, strict=True)]


def to_row(problem: Problem, samples: Sequence[Sample]) -> dict:
    """One line of a file of samples or of an evaluation."""
    rationales = [sample.text for sample in samples]
    return {
        "question": problem.question,
        "answer": problem.answer,
        "rationales": rationales,
        "correct": [is_correct(rationale, problem.answer) for rationale in rationales],
        "finished": [sample.finished for sample in samples],
    }


def main() -> None:
    torch.set_num_threads(1)  # two threads are slower at this size
    folder = Path(__file__).parent / "data" / "tiny"
    tokenizer = Tokenizer(folder)
    L = []
    for problem in make_problems(64, seed=0, steps=(2, 3)):
        L.append(replace(problem, rationale=format_rationale(problem.rationale)))
    schedule = Schedule(peak_rate=1e-3, batch_size=8, seed=0)
    examples = make_examples(L, tokenizer)
    model = train_sft(load_flan_t5(folder), examples, 3, schedule, "f' = SFT(f, L)", say_record)

    question = (
        "Felix bakes 74 cookies on Monday and 44 on Friday. The dog eats 16 cookies. "
        "How many cookies does Felix end up with?"
    )
    sampling = {"temperature": 0.7, "max_new_tokens": 100, "seed": 1}
    [samples] = generate(model, tokenizer, [question], n_samples=6, **sampling)
    print(f"\n{question}\nSix samples; the calculator's tokens are between « and »:")
    for sample in samples:
        verdict = "correct:  " if is_correct(sample.text, 102.0) else "incorrect:"
        print(f"  {verdict} {mark_forced(tokenizer, sample)}")
    problem = Problem(question, answer=102.0)
    rationales = [sample.text for sample in samples]
    print("Preference pairs, the least similar:")
    for pair in make_pairs(problem, rationales, tokenizer, MAX_SIMILARITY, N_PAIRS):
        print(f"  chosen:   {pair.chosen}\n  rejected: {pair.rejected}")
    print("Pseudo-labels:")
    for label in make_pseudo_labels([problem], [rationales], tokenizer, MAX_SIMILARITY, PERCENTILE):
        print(f"  {label.rationale}")


if __name__ == "__main__":
    run_command(main)
