"""Self-training, plain and with DPO: Algorithms 1 and 2 of the paper, and the rules on text they rest on (section 3).

Left out: tensors (model, decode, sft, dpo) and files (run.py keeps what each stage makes).

    python selftrain.py        # one question's samples -> preference pairs -> pseudo-labels
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from data.problems import Problem
from decode import Sample, generate
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import T5, load_flan_t5
from sft import Schedule, make_examples, train_sft
from tokenizer import Tokenizer

MAX_SIMILARITY, N_PAIRS, PERCENTILE = 0.7, 3, 90  # authors' code
ANSWER = re.compile(r"#+ (-?[0-9.,]+)")


def extract_answer(rationale: str) -> float | None:
    """The last `#### NUMBER` as a number, None when there is none. Source: authors' code, eval_sampling.py."""
    found = ANSWER.findall(rationale)
    try:
        answer = float(found[-1].replace(",", ""))
    except (IndexError, ValueError):
        return None
    return answer if math.isfinite(answer) else None


def is_correct(rationale: str, answer: float) -> bool:
    """Whether the rationale reaches the gold answer.  DIFFERS: one tolerance everywhere; the authors use two."""
    predicted = extract_answer(rationale)
    return predicted is not None and abs(predicted - answer) < 1e-4


def split_samples(rationales: Sequence[str], answer: float) -> tuple[list[str], list[str]]:
    """Sort one question's samples into correct and incorrect ones, exact duplicates dropped, order kept."""
    distinct = list(dict.fromkeys(rationales))
    correct = [rationale for rationale in distinct if is_correct(rationale, answer)]
    return correct, [rationale for rationale in distinct if rationale not in correct]


def accuracy(rationales: Sequence[str], problems: Sequence[Problem]) -> float:
    """Percentage of problems solved; one rationale per problem."""
    return 100 * sum(is_correct(r, p.answer) for r, p in zip(rationales, problems, strict=True)) / len(problems)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Similarity |a & b| / |a | b| of two sets of tokenizer pieces, 1 when both are empty."""
    return len(a & b) / len(a | b) if a or b else 1.0


def deduplicate(rationales: Iterable[str], tokenizer: Tokenizer, max_similarity: float = MAX_SIMILARITY) -> list[str]:
    """Keep a rationale only if it is at most max_similarity alike to every one kept before it."""
    kept: list[tuple[str, frozenset[str]]] = []
    for rationale in rationales:
        pieces = tokenizer.piece_set(rationale)
        if all(jaccard(pieces, other) <= max_similarity for _, other in kept):
            kept.append((rationale, pieces))
    return [rationale for rationale, _ in kept]


def make_pairs(
    problems: Sequence[Problem], samples: Sequence[Sequence[str]], tokenizer: Tokenizer,
    max_similarity: float = MAX_SIMILARITY, n_pairs: int = N_PAIRS,
) -> list[PreferencePair]:  # fmt: skip
    """Pair correct with incorrect rationales; samples[i] are all rationales drawn so far for problems[i].

    Of each question's pairs the n_pairs least similar are kept: they teach the most about what separates right from
    wrong. Source: section 4.2; thresholds from the authors' code, make_dpo_data.py.
    """
    pairs = []
    for problem, rationales in zip(problems, samples, strict=True):
        correct, incorrect = split_samples(rationales, problem.answer)
        winning = deduplicate(filter(None, [problem.rationale, *correct]), tokenizer, max_similarity)  # gold first
        losing = deduplicate(incorrect, tokenizer, max_similarity)
        pieces = {rationale: tokenizer.piece_set(rationale) for rationale in winning + losing}
        both = [(chosen, rejected) for chosen in winning for rejected in losing]
        both.sort(key=lambda pair: jaccard(pieces[pair[0]], pieces[pair[1]]))
        pairs += [PreferencePair(problem.question, *pair) for pair in both[:n_pairs]]
    return pairs


def make_pseudo_labels(
    problems: Sequence[Problem], samples: Sequence[Sequence[str]], tokenizer: Tokenizer,
    max_similarity: float = MAX_SIMILARITY, percentile: float = PERCENTILE,
) -> list[Problem]:  # fmt: skip
    """Turn correct rationales into training problems, the gold rationale first: L + S_a where U and L share questions.

    The number kept per question is capped at a percentile of that number over the questions that have any.
    Source: section 3.1; thresholds from the authors' code, make_rft_data.py.
    """
    correct = [split_samples(rationales, p.answer)[0] for p, rationales in zip(problems, samples, strict=True)]
    labels = [filter(None, [p.rationale, *rationales]) for p, rationales in zip(problems, correct)]
    kept = [deduplicate(rationales, tokenizer, max_similarity) for rationales in labels]
    counts = [len(rationales) for rationales in kept if rationales]
    most = int(np.percentile(counts, percentile)) if counts else 0
    return [replace(p, rationale=rationale) for p, rationales in zip(problems, kept) for rationale in rationales[:most]]


def self_train(method: str, labeled: Sequence[Problem], unlabeled: Sequence[Problem], tests: dict, config, stages) -> Path:
    """Run Algorithm 1 (method "st") or Algorithm 2 (method "dpo-st"); return the last model's folder.

    labeled is L: problems with formatted rationales. unlabeled is U: its questions and answers are used, not its
    rationales. tests: lists of problems by name. config: run.Config. stages: a Stages, which does the work.
    """
    gold, known = {problem.question: problem.rationale for problem in labeled}, set(labeled)
    unlabeled = [replace(problem, rationale=gold.get(problem.question)) for problem in unlabeled]
    drawn_for_pairs: list[list[str]] = [[] for _ in unlabeled]  # all rounds' samples, question by question
    drawn_for_labels: list[list[str]] = [[] for _ in unlabeled]
    model = stages.sft("warm-up/sft", labeled)  # f' = SFT(f, L)
    stages.evaluate("warm-up/evaluation", model, tests)
    for number in range(1, config.rounds + 1):
        here = f"{method}/round-{number}"
        if method == "dpo-st":  # DPO step: f_d = DPO(f', f', D)
            samples = stages.sample(f"{here}/samples-for-pairs", model, unlabeled, config.dpo_samples)
            drawn_for_pairs = [a + b for a, b in zip(drawn_for_pairs, samples, strict=True)]
            pairs = stages.pairs(f"{here}/preference-pairs", unlabeled, drawn_for_pairs)
            sampler, n_samples = stages.dpo(f"{here}/dpo", model, pairs), config.sft_samples
        else:
            sampler, n_samples = model, config.st_samples
        # SFT step: f' = SFT(f, L + S_a), from the original weights f, never from the last round's
        samples = stages.sample(f"{here}/samples-for-labels", sampler, unlabeled, n_samples)
        drawn_for_labels = [a + b for a, b in zip(drawn_for_labels, samples, strict=True)]
        pseudo_labels = stages.pseudo_labels(f"{here}/pseudo-labels", unlabeled, drawn_for_labels)
        new = [problem for problem in pseudo_labels if problem not in known]
        model = stages.sft(f"{here}/sft", [*labeled, *new])
        stages.evaluate(f"{here}/evaluation", model, tests)
    return model


class Stages:
    """The pieces of work in `self_train`. A model passes between them as the folder of its checkpoint.

    keep_rows(name, make) and keep_model(name, make) return what is stored under a name, and call make only when nothing
    is; log(record) writes one line.
    """
    def __init__(self, base: Path, tokenizer: Tokenizer, config, keep_rows: Callable, keep_model: Callable, log: Callable):
        self.base, self.tokenizer, self.config = base, tokenizer, config
        self.keep_rows, self.keep_model, self.log = keep_rows, keep_model, log
        same = {item.name: getattr(config, item.name) for item in fields(Schedule)[2:]}
        self.sft_schedule = Schedule(config.sft_learning_rate, config.sft_batch_size, **same)
        self.dpo_schedule = Schedule(config.dpo_learning_rate, config.dpo_batch_size, **same)

    def sft(self, name: str, problems: Sequence[Problem]) -> Path:
        """Supervised fine-tuning, always from the original weights."""

        def make() -> T5:
            model, examples = load_flan_t5(self.base, device=self.config.device), make_examples(problems, self.tokenizer)
            return train_sft(model, examples, self.config.sft_epochs, self.sft_schedule, name, self.log)

        return self.keep_model(name, make)

    def dpo(self, name: str, policy: Path, pairs: Sequence[PreferencePair]) -> Path:
        """DPO from `policy`; the pairs of the first few questions are held out, to be scored only."""
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        unseen = set(questions[: int(len(questions) * self.config.held_out)])
        held_out = make_pair_examples([pair for pair in pairs if pair.question in unseen], self.tokenizer)
        examples = make_pair_examples([pair for pair in pairs if pair.question not in unseen], self.tokenizer)
        if not examples:
            self.log({"stage": name, "skipped": "no question has both a correct and an incorrect rationale"})
            return policy

        def make() -> T5:
            c, model = self.config, load_flan_t5(policy, device=self.config.device)
            return train_dpo(model, examples, held_out, c.dpo_steps, c.beta, self.dpo_schedule, name, self.log)

        return self.keep_model(name, make)

    def generate(self, folder: Path, problems: Sequence[Problem], title: str, **options) -> list[list[Sample]]:
        c = self.config
        model = load_flan_t5(folder, torch.bfloat16 if c.device == "cuda" else torch.float32, c.device)
        options = {"max_new_tokens": c.max_new_tokens, "batch_size": c.decode_batch_size, "progress": title} | options
        return generate(model, self.tokenizer, [problem.question for problem in problems], **options)

    def sample(self, name: str, model: Path, problems: Sequence[Problem], n_samples: int) -> list[list[str]]:
        """n_samples rationales per problem at the sampling temperature."""

        def make() -> list[dict]:
            c = self.config
            options = {"n_samples": n_samples, "temperature": c.temperature, "top_k": c.top_k, "calculator": c.calculator}
            samples = self.generate(model, problems, name, seed=f"{c.seed}/{name}", **options)
            rationales = [[sample.text for sample in row] for row in samples]
            solved = sum(is_correct(r, p.answer) for p, row in zip(problems, rationales) for r in row)
            self.log({"stage": name, "rationales": n_samples * len(problems), "correct": solved})
            return [{"question": p.question, "rationales": row} for p, row in zip(problems, rationales)]

        return [row["rationales"] for row in self.keep_rows(name, make)]

    def pairs(self, name: str, problems: Sequence[Problem], samples: Sequence[Sequence[str]]) -> list[PreferencePair]:
        rules = self.config.max_similarity, self.config.n_pairs
        return self.keep(name, PreferencePair, lambda: make_pairs(problems, samples, self.tokenizer, *rules))

    def pseudo_labels(self, name: str, problems: Sequence[Problem], samples: Sequence[Sequence[str]]) -> list[Problem]:
        rules = self.config.max_similarity, self.config.percentile
        return self.keep(name, Problem, lambda: make_pseudo_labels(problems, samples, self.tokenizer, *rules))

    def keep(self, name: str, kind: type, make: Callable[[], list]) -> list:
        def make_rows() -> list[dict]:
            made = make()
            self.log({"stage": name, "kept": len(made), "questions": len({item.question for item in made})})
            return [asdict(item) for item in made]

        return [kind(**row) for row in self.keep_rows(name, make_rows)]

    def evaluate(self, name: str, model: Path, tests: dict[str, Sequence[Problem]]) -> None:
        """Greedy accuracy (%) on every test set, and on the first one without the calculator too."""

        def make() -> list[dict]:
            rows, first = [], next(iter(tests))
            written = self.generate(model, [problem for problems in tests.values() for problem in problems], name)
            texts = iter([*written, *self.generate(model, tests[first], name, calculator=False)])
            for title, problems in (*tests.items(), (f"{first} without calculator", tests[first])):
                rationales = [next(texts)[0].text for _ in problems]
                rows.append({"test": title, "accuracy": accuracy(rationales, problems), "rationales": rationales})
            self.log({"stage": name, **{row["test"]: row["accuracy"] for row in rows}})
            return rows

        self.keep_rows(name, make)


if __name__ == "__main__":
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "tiny")
    problem = Problem("Tom has 3 boxes of 4 pens and loses 2. How many pens are left?", 10.0)
    samples = [
        "Tom has 3 * 4 = [ 3 * 4 = 12] 12 pens. He has 12 - 2 = [ 12 - 2 = 10] 10 left. #### 10",
        "Tom has 3 * 4 = [ 3 * 4 = 12] 12 pens. Now 12 - 2 = [ 12 - 2 = 10] 10 are left. #### 10",
        "Tom has 3 + 4 = [ 3 + 4 = 7] 7 pens. He has 7 - 2 = [ 7 - 2 = 5] 5 left. #### 5",
    ]
    verdicts = [f"{'in' * (not is_correct(text, problem.answer))}correct: {text}" for text in samples]
    pairs = [f"chosen: {p.chosen}\n  rejected: {p.rejected}" for p in make_pairs([problem], [samples], tokenizer)]
    labels = [label.rationale for label in make_pseudo_labels([problem], [samples], tokenizer)]
    for title, lines in ((problem.question, verdicts), ("Preference pairs:", pairs), ("Pseudo-labels:", labels)):
        print(title, *lines, sep="\n  ")
