"""Self-training, plain and with DPO: Algorithms 1 and 2 of the paper, and their rules on text.

First the rules (sections 3.1 and 4.2), which know no model; then the algorithms; then the stages
that the algorithms are made of, and how their results come to stand on disk. Left out: tensors
(model.py, decode.py, sft.py, dpo.py).

    python selftrain.py        # one question: the tiny model's samples -> pairs -> pseudo-labels
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.folder import remove_leftovers, write_beside
from data.problems import Problem, read_jsonl, same_answer, write_jsonl
from data.synthetic import make_problems
from decode import generate, mark_forced
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import T5, load_flan_t5, save_flan_t5
from sft import Schedule, from_process_0, make_examples, rank_and_count, share_work, train_sft
from tokenizer import Tokenizer, format_rationale

MAX_SIMILARITY = 0.7  # section 4.2: rationales that are more alike are duplicates
N_PAIRS = 3  # authors' code: preference pairs kept per question
PERCENTILE = 90  # authors' code: caps the pseudo-labels per question
Samples = Sequence[Sequence[str]]  # rationales, question by question

# ----------------------------------------------------------------------------------- rules on text


def extract_answer(rationale: str) -> float | None:
    """The last `#### NUMBER` as a number, or None. Source: authors' code, eval_sampling.py."""
    found = re.findall(r"#+ (-?[0-9.,]+)", rationale)
    try:
        answer = float(found[-1].replace(",", ""))
    except (IndexError, ValueError):
        return None
    return answer if math.isfinite(answer) else None


def is_correct(rationale: str, answer: float | str) -> bool:
    """Whether the rationale reaches the gold answer, a number or, in your own data, a short text.

    DIFFERS: one meaning of correct everywhere; the authors' code has two tolerances.
    """
    if isinstance(answer, str):
        _, mark, predicted = rationale.rpartition("#### ")
        return mark != "" and same_answer(predicted, answer)
    predicted = extract_answer(rationale)
    return predicted is not None and same_answer(predicted, answer)


def split_samples(rationales: Sequence[str], answer: float | str) -> tuple[list[str], list[str]]:
    """One question's samples as correct and incorrect ones, each sorted, exact duplicates dropped.

    The order matters: of two similar rationales `deduplicate` keeps the first. Source: authors'
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
    """Similarity |a & b| / |a | b| of two sets of tokenizer pieces, 1 when both are empty."""
    if not a and not b:
        return 1.0
    return len(a & b) / len(a | b)


def deduplicate(
    rationales: Sequence[str], tokenizer: Tokenizer, max_similarity: float = MAX_SIMILARITY
) -> list[str]:
    """Keep a rationale only if it is at most max_similarity alike to every one kept before it."""
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
    max_similarity: float = MAX_SIMILARITY,
    n_pairs: int = N_PAIRS,
) -> list[PreferencePair]:
    """Pair the correct with the incorrect rationales of one question; there may be none.

    Source: section 4.2 (deduplicate); authors' code, make_dpo_data.py (the gold rationale leads the
    winning ones, the n_pairs least similar pairs are kept).
    DIFFERS: pairs that are equally similar keep their order; the authors shuffle them first.
    """
    correct, incorrect = split_samples(rationales, problem.answer)
    gold = [problem.rationale] if problem.rationale else []
    winning = deduplicate(gold + correct, tokenizer, max_similarity)
    losing = deduplicate(incorrect, tokenizer, max_similarity)
    # Each text is cut into pieces once, though it stands in many pairs.
    pieces = {rationale: tokenizer.piece_set(rationale) for rationale in winning + losing}
    ranked = []
    for chosen in winning:
        for rejected in losing:
            similarity = jaccard(pieces[chosen], pieces[rejected])
            ranked.append((similarity, PreferencePair(problem.question, chosen, rejected)))
    ranked.sort(key=lambda item: item[0])
    return [pair for _, pair in ranked[:n_pairs]]


def make_pseudo_labels(
    problems: Sequence[Problem],
    samples: Samples,
    tokenizer: Tokenizer,
    max_similarity: float = MAX_SIMILARITY,
    percentile: float = PERCENTILE,
) -> list[Problem]:
    """S_a: correct rationales as training problems; samples[i] are those of problems[i].

    The gold rationale, where there is one, is kept before any sample, and left out at the end: L
    has it. The number kept per question is capped at a percentile of that number over the questions
    that have any. Source: section 3.1; the cap and gold: authors' code, make_rft_data.py.
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
    most = int(np.percentile(counts, percentile))
    labels = []
    for problem, rationales in zip(problems, kept):
        for rationale in rationales[:most]:
            if rationale != problem.rationale:
                labels.append(replace(problem, rationale=rationale))
    return labels


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """The chance that k of n samples hold one of the n_correct right ones. Chen et al. (2021)."""
    return 1 - math.comb(n - n_correct, k) / math.comb(n, k)


# ------------------------------------------------------------------------------ Algorithms 1 and 2


def self_train(
    method: str,
    labeled: Sequence[Problem],
    unlabeled: Sequence[Problem],
    tests: dict[str, Sequence[Problem]],
    config: argparse.Namespace,
    stages: "Stages",
) -> Path:
    """Run Algorithm 1 (method "st") or Algorithm 2 ("dpo-st"); return the folder of the last model.

    labeled is L, with formatted rationales. unlabeled is U: its questions and answers are used, not
    its rationales. config: the flags of run.py. stages: does the work.
    """
    # In the paper U is L without its rationales. Here U may have other questions; gold is what L
    # has for the same question and answer, never what U itself has.
    same_question: dict[str, list[Problem]] = {}
    for problem in labeled:
        same_question.setdefault(problem.question, []).append(problem)
    unlabeled = [
        with_gold(problem, same_question.get(problem.question, [])) for problem in unlabeled
    ]
    # Samples of all rounds so far, question by question (authors' code).
    drawn_for_pairs: list[list[str]] = [[] for _ in unlabeled]  # by f'
    drawn_for_labels: list[list[str]] = [[] for _ in unlabeled]  # by f' (ST) or f_d (DPO-ST)
    model = stages.sft("warm-up/sft", labeled)  # f' = SFT(f, L)
    stages.evaluate("warm-up/evaluation.jsonl", model, tests)
    for number in range(1, config.rounds + 1):
        here = f"{method}/round-{number}"
        sampler = model
        n_samples = config.st_samples
        if method == "dpo-st":
            # DPO step: f_d = DPO(policy f', reference f', D)
            name = f"{here}/samples-for-pairs.jsonl"
            new = stages.sample(name, model, unlabeled, config.dpo_samples)
            drawn_for_pairs = add_samples(drawn_for_pairs, new)
            pairs = stages.pairs(f"{here}/preference-pairs.jsonl", unlabeled, drawn_for_pairs)
            sampler = stages.dpo(f"{here}/dpo", model, pairs)
            n_samples = config.sft_samples
        # SFT step: f' = SFT(f, L + S_a), from the original weights f, never from the last round's
        new = stages.sample(f"{here}/samples-for-labels.jsonl", sampler, unlabeled, n_samples)
        drawn_for_labels = add_samples(drawn_for_labels, new)
        labels = stages.pseudo_labels(f"{here}/pseudo-labels.jsonl", unlabeled, drawn_for_labels)
        model = stages.sft(f"{here}/sft", [*labeled, *labels])
        stages.evaluate(f"{here}/evaluation.jsonl", model, tests)
    return model


def with_gold(problem: Problem, labeled: Sequence[Problem]) -> Problem:
    """A problem of U with the gold rationale of L's problem with this question and answer, if any.

    labeled: L's problems with this question.
    """
    for other in labeled:
        if same_answer(other.answer, problem.answer):
            return other
    return replace(problem, rationale=None)


def add_samples(drawn: list[list[str]], new: list[list[str]]) -> list[list[str]]:
    """Every question's samples so far and its new ones."""
    return [old + more for old, more in zip(drawn, new, strict=True)]


# ------------------------------------------------------------------------------------------ stages


class Stages:
    """The steps of the algorithms. Each makes one file or folder, of its name, in the run's folder.

    What is there is not made again, so the same command continues a run that was stopped. A model
    is passed as the folder of its checkpoint. Under torchrun every process goes through all stages.
    """

    def __init__(
        self,
        base: Path,
        tokenizer: Tokenizer,
        config: argparse.Namespace,
        folder: Path,
        log: Callable[[dict], None],
    ):
        self.base = base  # the checkpoint with the original weights
        self.tokenizer = tokenizer
        self.config = config  # the flags of run.py
        self.folder = folder  # of this run
        self.log = log

    def sft(self, name: str, problems: Sequence[Problem]) -> Path:
        """Supervised fine-tuning, always from the original weights."""
        c = self.config
        path = self.folder / name
        if not finished(path):
            model = load_flan_t5(self.base, device=c.device)
            examples = make_examples(problems, self.tokenizer)
            schedule = self.schedule(c.sft_learning_rate, c.sft_batch_size)
            model = train_sft(model, examples, c.sft_epochs, schedule, name, self.log)
            finish(path, partial(self.write_model, model))
        return path

    def dpo(self, name: str, policy: Path, pairs: Sequence[PreferencePair]) -> Path:
        """DPO, starting from `policy`, which stays as it is. Without pairs it is skipped."""
        c = self.config
        path = self.folder / name
        if not pairs:
            reason = "no question has both a correct and an incorrect rationale"
            self.log({"stage": name, "skipped_because": reason})
            return policy
        if not finished(path):
            model = load_flan_t5(policy, device=c.device)
            examples = make_pair_examples(pairs, self.tokenizer)
            schedule = self.schedule(c.dpo_learning_rate, c.dpo_batch_size)
            model = train_dpo(model, examples, c.dpo_steps, c.beta, schedule, name, self.log)
            finish(path, partial(self.write_model, model))
        return path

    def sample(
        self, name: str, model: Path, problems: Sequence[Problem], n_samples: int
    ) -> list[list[str]]:
        """Draw n_samples rationales per problem, different ones in every stage."""
        c = self.config
        path = self.folder / name
        if not finished(path):
            rows = self.write_rationales(
                self.load_writer(model),
                name,
                problems,
                n_samples=n_samples,
                temperature=c.temperature,
                top_k=c.top_k,
                calculator=c.calculator,
                seed=f"{c.seed}/{name}",
            )
            record = {"stage": name, "rationales": n_samples * len(rows)}
            for k in (1, n_samples):
                chances = [pass_at_k(n_samples, sum(row["correct"]), k) for row in rows]
                record[f"pass@{k}"] = 100 * float(np.mean(chances))
            self.log(record)
            finish(path, partial(write_jsonl, rows))
        rows = read_jsonl(path)
        read = [(row.get("question"), len(row.get("rationales", ()))) for row in rows]
        if read != [(problem.question, n_samples) for problem in problems]:
            raise ValueError(f"{path} is damaged: delete it, and the same command makes it again")
        return [row["rationales"] for row in rows]

    def pairs(
        self, name: str, problems: Sequence[Problem], samples: Samples
    ) -> list[PreferencePair]:
        """D, from all samples drawn for it so far."""
        c = self.config
        pairs = []
        for problem, rationales in zip(problems, samples, strict=True):
            pairs += make_pairs(problem, rationales, self.tokenizer, c.max_similarity, c.n_pairs)
        self.keep(name, pairs)
        return pairs

    def pseudo_labels(
        self, name: str, problems: Sequence[Problem], samples: Samples
    ) -> list[Problem]:
        """S_a, from all samples drawn for it so far."""
        c = self.config
        labels = make_pseudo_labels(
            problems, samples, self.tokenizer, c.max_similarity, c.percentile
        )
        self.keep(name, labels)
        return labels

    def keep(self, name: str, items: Sequence) -> None:
        """Write pairs or labels for people to read; training takes them from memory."""
        path = self.folder / name
        if not finished(path):
            questions = {item.question for item in items}
            self.log({"stage": name, "kept": len(items), "questions": len(questions)})
            finish(path, partial(write_jsonl, map(asdict, items)))

    def evaluate(self, name: str, model: Path, tests: dict[str, Sequence[Problem]]) -> None:
        """Greedy rationales on every test set; on the one named dev also without calculator."""
        path = self.folder / name
        if not finished(path):
            writer = self.load_writer(model)
            rows = []
            for test in tests:
                rows += self.answer(writer, test, tests[test], calculator=True)
            if "dev" in tests:  # figure 7
                rows += self.answer(writer, "dev", tests["dev"], calculator=False)
            self.log({"stage": name} | accuracies(rows))
            finish(path, partial(write_jsonl, rows))

    def answer(
        self, writer: T5, test: str, problems: Sequence[Problem], calculator: bool
    ) -> list[dict]:
        """One greedy rationale for each problem of a test set."""
        rows = self.write_rationales(writer, test, problems, calculator=calculator)
        return [{"test": test, "calculator": calculator} | row for row in rows]

    def load_writer(self, model: Path) -> T5:
        """A model that only writes.

        DIFFERS: with --bf16 its weights are bf16, too; the authors keep fp32 weights and autocast.
        """
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        return load_flan_t5(model, dtype, self.config.device)

    def write_rationales(
        self, writer: T5, title: str, problems: Sequence[Problem], **options
    ) -> list[dict]:
        """A row for each problem, written by all processes. options: of decode.generate."""
        options["max_new_tokens"] = self.config.max_new_tokens
        options["batch_size"] = self.config.decode_batch_size
        options["title"] = title if rank_and_count()[0] == 0 else None

        def write(share: Sequence[Problem]) -> list[dict]:
            questions = [problem.question for problem in share]
            written = generate(writer, self.tokenizer, questions, **options)
            rows = []
            for problem, samples in zip(share, written, strict=True):
                row = {"question": problem.question, "answer": problem.answer}
                row |= {"rationales": [], "correct": [], "finished": []}
                for sample in samples:
                    row["rationales"].append(sample.text)
                    row["correct"].append(is_correct(sample.text, problem.answer))
                    row["finished"].append(sample.finished)
                rows.append(row)
            return rows

        return share_work(problems, write)

    def schedule(self, learning_rate: float, batch_size: int) -> Schedule:
        c = self.config
        return Schedule(
            learning_rate=learning_rate,
            batch_size=batch_size,
            warmup_ratio=c.warmup_ratio,
            final_ratio=c.final_ratio,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            micro_batch_tokens=c.micro_batch_tokens,
            bf16=c.bf16,
            log_every=c.log_every,
            seed=c.seed,
        )

    def write_model(self, model: T5, path: Path) -> None:
        """A checkpoint with the vocabulary, so that it stands on its own."""
        save_flan_t5(model, path)
        (path / "spiece.model").write_bytes((self.base / "spiece.model").read_bytes())


def accuracies(rows: Sequence[dict]) -> dict[str, float]:
    """Percentage of problems solved by their first rationale, by test."""
    solved: dict[str, list[bool]] = {}
    for row in rows:
        name = row["test"]
        if not row["calculator"]:
            name += " without calculator"
        solved.setdefault(name, []).append(row["correct"][0])
    return {name: 100 * sum(right) / len(right) for name, right in solved.items()}


def finished(path: Path) -> bool:
    """Whether a stage's result has its final name: then it is finished. Process 0 looks for all."""
    return from_process_0(path.exists)


def finish(path: Path, write: Callable[[Path], None]) -> None:
    """Let process 0 write a stage's result beside its place and rename it when it is whole.

    A run that is killed before that makes the stage again; one that is killed later finds it.
    """

    from_process_0(partial(write_beside, path, write))
    from_process_0(partial(remove_leftovers, path))


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # « and » are not in every encoding
    torch.set_num_threads(1)  # two are slower at this size
    folder = Path(__file__).parent / "data" / "tiny"
    tokenizer = Tokenizer(folder)
    labeled = []
    for problem in make_problems(64, seed=0, steps=(2, 3)):
        labeled.append(replace(problem, rationale=format_rationale(problem.rationale)))
    schedule = Schedule(
        learning_rate=1e-3,
        batch_size=8,
        warmup_ratio=0.1,
        final_ratio=0.1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        micro_batch_tokens=2048,
        bf16=False,
        log_every=10,
        seed=0,
    )
    examples = make_examples(labeled, tokenizer)
    model = train_sft(load_flan_t5(folder), examples, 3, schedule, "f' = SFT(f, L)", print)

    question = (
        "Felix bakes 74 cookies on Monday and 44 on Friday. The dog eats 16 cookies. "
        "How many cookies does Felix end up with?"
    )
    problem = Problem(question, answer=102.0)
    [samples] = generate(
        model, tokenizer, [question], n_samples=6, temperature=0.7, max_new_tokens=100, seed=1
    )
    print(f"\n{question}\nSix samples; what the calculator wrote stands between « and »:")
    rationales = [sample.text for sample in samples]
    for sample in samples:
        verdict = "correct:  " if is_correct(sample.text, problem.answer) else "incorrect:"
        print(f"  {verdict} {mark_forced(tokenizer, sample)}")
    print("Preference pairs, the least similar:")
    for pair in make_pairs(problem, rationales, tokenizer):
        print(f"  chosen:   {pair.chosen}\n  rejected: {pair.rejected}")
    print("Pseudo-labels:")
    for label in make_pseudo_labels([problem], [rationales], tokenizer):
        print(f"  {label.rationale}")


if __name__ == "__main__":
    main()
