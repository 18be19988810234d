"""Self-training, plain and with DPO: Algorithms 1 and 2 of the paper, and the rules on text they rest on (section 3).

Left out: tensors (model, decode, sft, dpo) and files (run.py keeps what each stage makes).

    python selftrain.py        # one question's samples -> preference pairs -> pseudo-labels"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from data.problems import Problem, read_jsonl, same_answer, write_jsonl
from decode import generate
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import T5, load_flan_t5, save_flan_t5
from sft import Progress, Schedule, alone, deal, make_examples, place, train_sft
from tokenizer import Tokenizer

MAX_SIMILARITY, N_PAIRS, PERCENTILE = 0.7, 3, 90  # authors' code
PART = {"cpu": 512, "cuda": 2048}  # rationales dealt out and kept at a time; at its end a GPU computes idle slots, too
ANSWER = re.compile(r"#+ (-?[0-9.,]+)")
Samples = Sequence[Sequence[str]]  # the rationales that were drawn, question by question

def extract_answer(rationale: str) -> float | None:
    """The last `#### NUMBER` as a number, None when there is none. Source: authors' code, eval_sampling.py."""
    try:
        answer = float(ANSWER.findall(rationale)[-1].replace(",", ""))
    except (IndexError, ValueError):
        return None
    return answer if math.isfinite(answer) else None

def is_correct(rationale: str, answer: float | str) -> bool:
    """Whether the rationale reaches the gold answer.  DIFFERS: one tolerance everywhere; the authors use two."""
    predicted = (None, *rationale.split("#### ")[1:])[-1] if isinstance(answer, str) else extract_answer(rationale)
    return predicted is not None and same_answer(predicted, answer)

def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """The chance that k of n samples, n_correct of them right, hold a right one: pass@k, unbiased. Source: Chen et al. (2021)."""
    return 1 - math.comb(n - n_correct, k) / math.comb(n, k)

def split_samples(rationales: Sequence[str], answer: float | str) -> tuple[list[str], list[str]]:
    """Sort one question's samples into correct and incorrect ones, exact duplicates dropped, order kept."""
    distinct = list(dict.fromkeys(rationales))
    correct = [rationale for rationale in distinct if is_correct(rationale, answer)]
    return correct, [rationale for rationale in distinct if rationale not in correct]

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
    problems: Sequence[Problem], samples: Samples, tokenizer: Tokenizer, max_similarity=MAX_SIMILARITY, n_pairs=N_PAIRS
) -> list[PreferencePair]:  # fmt: skip
    """Pair correct with incorrect rationales; samples[i] are all rationales drawn so far for problems[i].
    Of each question's pairs the n_pairs least similar are kept: they teach the most about what separates right from
    wrong. Source: section 4.2; thresholds from the authors' code, make_dpo_data.py."""
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
    problems: Sequence[Problem], samples: Samples, tokenizer: Tokenizer, max_similarity=MAX_SIMILARITY, percentile=PERCENTILE
) -> list[Problem]:  # fmt: skip
    """Turn correct rationales into training problems, the gold rationale first: L + S_a where U and L share questions.
    The number kept per question is capped at a percentile of that number over the questions that have any.
    Source: section 3.1; thresholds from the authors' code, make_rft_data.py."""
    correct = [split_samples(rationales, p.answer)[0] for p, rationales in zip(problems, samples, strict=True)]
    kept = [deduplicate(filter(None, [p.rationale, *right]), tokenizer, max_similarity) for p, right in zip(problems, correct)]
    counts = [len(rationales) for rationales in kept if rationales]
    most = int(np.percentile(counts, percentile)) if counts else 0
    return [replace(p, rationale=rationale) for p, rationales in zip(problems, kept) for rationale in rationales[:most]]

def self_train(method: str, labeled: Sequence[Problem], unlabeled: Sequence[Problem], tests: dict, config, stages) -> Path:
    """Run Algorithm 1 (method "st") or Algorithm 2 (method "dpo-st"); return the last model's folder.
    labeled is L: problems with formatted rationales. unlabeled is U: its questions and answers are used, not its
    rationales. tests: lists of problems by name. config: run.Config. stages: a Stages, which does the work."""
    gold, known = {problem.question: problem.rationale for problem in labeled}, set(labeled)
    unlabeled = [replace(problem, rationale=gold.get(problem.question)) for problem in unlabeled]  # L's, to head the right ones
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
    """The pieces of work in `self_train`, each kept under its name in a data.folder.RunFolder. A model passes as the folder of
    its checkpoint. Under torchrun every process goes through all stages, shares the work in them, and process 0 writes."""
    def __init__(self, base: Path, tokenizer: Tokenizer, config, folder, log: Callable[[dict], None]):
        self.base, self.tokenizer, self.config, self.folder, self.log = base, tokenizer, config, folder, log
        same = {item.name: getattr(config, item.name) for item in fields(Schedule)[2:]}
        self.sft_schedule = Schedule(config.sft_learning_rate, config.sft_batch_size, **same)
        self.dpo_schedule = Schedule(config.dpo_learning_rate, config.dpo_batch_size, **same)

    def keep_model(self, name: str, start: Path, schedule: Schedule, train: Callable[..., T5]) -> Path:
        """Train the checkpoint in `start` unless that is done; return the folder of the result."""
        if not self.folder.find(f"{name}/spiece.model"):  # the last of its files
            how = {"name": name, "log": self.log, "progress": Progress(self.folder, name, self.config.save_every)}
            load = partial(load_flan_t5, start, device=self.config.device)
            attempt = lambda n: train(load(), schedule=replace(schedule, micro_batch_tokens=n), **how)
            model = fitting(attempt, self.config, "micro_batch_tokens")
            save = lambda path: (save_flan_t5(model, path), shutil.copy(self.base / "spiece.model", path))
            alone(lambda: self.folder.write(name, save, replaces=f"{name}.step-"))
        return self.folder.path / name

    def keep_rows(self, name: str, work: Sequence, do: Callable[..., list[dict]], summary: Callable[[list], dict]) -> list[dict]:
        """The rows that do(piece) gives for all pieces of work. Pieces that are done are kept even if the next ones are not."""
        folder, path, n = self.folder, self.folder.path / f"{name}.jsonl", place()[1]
        if not folder.find(f"{name}.jsonl"):
            parts = [f"{name}.parts/{i:04}-of-{len(work):04}.jsonl" for i in range(len(work))]  # a cut of its own for each device
            missing = [i for i, part in enumerate(parts) if not folder.find(part)]
            for turn in (missing[at : at + n] for at in range(0, len(missing), n)):
                done = deal([work[i] for i in turn], do)
                alone(lambda: [folder.write(parts[i], partial(write_jsonl, rows)) for i, rows in zip(turn, done)])
            join = lambda path: write_jsonl((row for part in parts for row in read_jsonl(folder.path / part)), path)
            alone(lambda: folder.write(f"{name}.jsonl", join, replaces=f"{name}.parts"))
            self.log({"stage": name, **summary(read_jsonl(path))})
        return read_jsonl(path)

    def sft(self, name: str, problems: Sequence[Problem]) -> Path:
        """Supervised fine-tuning, always from the original weights."""
        how = {"examples": make_examples(problems, self.tokenizer), "n_epochs": self.config.sft_epochs}
        return self.keep_model(name, self.base, self.sft_schedule, partial(train_sft, **how))

    def dpo(self, name: str, policy: Path, pairs: Sequence[PreferencePair]) -> Path:
        """DPO from `policy`; the pairs of the first few questions are held out, to be scored only."""
        questions = list(dict.fromkeys(pair.question for pair in pairs))
        unseen = set(questions[: int(len(questions) * self.config.held_out)])
        held_out = make_pair_examples([pair for pair in pairs if pair.question in unseen], self.tokenizer)
        examples = make_pair_examples([pair for pair in pairs if pair.question not in unseen], self.tokenizer)
        if not examples:
            self.log({"stage": name, "skipped": "no question has both a correct and an incorrect rationale"})
            return policy
        how = {"pairs": examples, "held_out": held_out, "n_steps": self.config.dpo_steps, "beta": self.config.beta}
        return self.keep_model(name, policy, self.dpo_schedule, partial(train_dpo, **how))

    def write_rationales(self, name: str, model: Path, work: Sequence[tuple], summary: Callable) -> list[dict]:
        """A row of rationales for each problem. A piece of work: what its rows begin with, its problems, options of `generate`.
        The pieces, so the batches, so every byte, are the same on any number of processes and after any stop."""
        c = self.config
        load = cache(lambda: load_flan_t5(model, torch.bfloat16 if c.bf16 else torch.float32, c.device))

        def do(piece: tuple[int, tuple]) -> list[dict]:
            number, (begin, problems, options) = piece
            title = None if place()[0] else f"{name} {number}/{len(work)}"
            options = {**options, "max_new_tokens": c.max_new_tokens, "progress": title}
            write = lambda size: generate(load(), self.tokenizer, [p.question for p in problems], batch_size=size, **options)
            written = fitting(write, c, "decode_batch_size")
            rows = ({"rationales": [s.text for s in row], "finished": [s.finished for s in row]} for row in written)
            return [{**begin, "question": p.question, "answer": p.answer, **row} for p, row in zip(problems, rows)]

        return self.keep_rows(name, [*enumerate(work, 1)], do, summary)

    def sample(self, name: str, model: Path, problems: Sequence[Problem], n_samples: int) -> list[list[str]]:
        """n_samples rationales per problem at the sampling temperature."""
        c, how = self.config, {"n_samples": n_samples, "seed": f"{self.config.seed}/{name}"}
        how |= {name: getattr(c, name) for name in ("temperature", "top_k", "calculator")}
        correct = lambda row: sum(is_correct(text, row["answer"]) for text in row["rationales"])
        share = lambda rows, k: 100 * float(np.mean([pass_at_k(n_samples, correct(row), k) for row in rows]))
        count = lambda rows: {"rationales": n_samples * len(rows), **{f"pass@{k}": share(rows, k) for k in (1, n_samples)}}
        work = [({}, part, how) for part in cut(problems, PART[c.device] // n_samples)]
        return [row["rationales"] for row in self.write_rationales(name, model, work, count)]

    def evaluate(self, name: str, model: Path, tests: dict[str, Sequence[Problem]]) -> None:
        """Greedy rationales on every test set, and on the first one without the calculator too."""
        sets, size = [(test, True) for test in tests] + [(test, False) for test in [*tests][:1]], PART[self.config.device]
        work = [({"test": t, "calculator": on}, part, {"calculator": on}) for t, on in sets for part in cut(tests[t], size)]
        self.write_rationales(name, model, work, lambda rows: {test: found[0] for test, found in accuracies(rows).items()})

    def pairs(self, name: str, problems: Sequence[Problem], samples: Samples) -> list[PreferencePair]:
        return self.keep(name, PreferencePair, make_pairs, problems, samples, self.config.n_pairs)

    def pseudo_labels(self, name: str, problems: Sequence[Problem], samples: Samples) -> list[Problem]:
        return self.keep(name, Problem, make_pseudo_labels, problems, samples, self.config.percentile)

    def keep(self, name: str, kind: type, make: Callable[..., list], problems, samples: Samples, limit: float) -> list:
        made = lambda _: [*map(asdict, make(problems, samples, self.tokenizer, self.config.max_similarity, limit))]
        count = lambda rows: {"kept": len(rows), "questions": len({row["question"] for row in rows})}
        return [kind(**row) for row in self.keep_rows(name, [0], made, count)]

def fitting(do: Callable[[int], object], config, name: str):
    """do(config.NAME), a batch size: halved whenever memory is too small for it, unless other processes would wait for this one."""
    while True:
        try:
            return do(size := getattr(config, name))
        except torch.OutOfMemoryError as error:
            if size <= 1 or place()[1] > 1:
                raise
            print(f"Out of memory ({str(error).splitlines()[0]:.80}): again with {name} {size // 2}")
        setattr(config, name, size // 2)  # here, where the error no longer holds what did not fit

def cut(problems: Sequence, most: int) -> list[Sequence]:
    """Cut problems into parts of about equal size, of at most so many each, or of one."""
    n = max(1, math.ceil(len(problems) / max(1, most)))
    return [problems[len(problems) * i // n : len(problems) * (i + 1) // n] for i in range(n)]

def accuracies(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Percentage of problems solved, by test, and both ends of its 95 % interval."""
    solved: dict[str, list[bool]] = {}
    for row in rows:
        name = row["test"] + ("" if row["calculator"] else " without calculator")
        solved.setdefault(name, []).append(is_correct(row["rationales"][0], row["answer"]))
    return {name: [round(100 * share, 2) for share in wilson(sum(right), len(right))] for name, right in solved.items()}

def wilson(n_right: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """The share n_right / n and its interval, 95 % for this z. Source: Wilson (1927)."""
    share, size = n_right / n, 1 + z * z / n
    middle, half = (share + z * z / 2 / n) / size, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2) / size
    return share, max(0.0, middle - half), min(1.0, middle + half)

if __name__ == "__main__":
    tokenizer = Tokenizer(Path(__file__).parent / "data" / "tiny")
    problem = Problem("Tom has 3 boxes of 4 pens and loses 2. How many pens are left?", 10.0)
    samples = [
        "Tom has 3 * 4 = [ 3 * 4 = 12] 12 pens. He has 12 - 2 = [ 12 - 2 = 10] 10 left. #### 10",
        "Tom has 3 * 4 = [ 3 * 4 = 12] 12 pens. Now 12 - 2 = [ 12 - 2 = 10] 10 are left. #### 10",
        "Tom has 3 + 4 = [ 3 + 4 = 7] 7 pens. He has 7 - 2 = [ 7 - 2 = 5] 5 left. #### 5",
    ]
    print(problem.question, *(f"{'' if is_correct(text, 10) else 'in'}correct: {text}" for text in samples), sep="\n  ")
    pairs, labels = (make([problem], [samples], tokenizer) for make in (make_pairs, make_pseudo_labels))
    print("Preference pairs:", *(f"chosen: {pair.chosen}\n  rejected: {pair.rejected}" for pair in pairs), sep="\n  ")
    print("Pseudo-labels (the second correct one is too like the first):", *(label.rationale for label in labels), sep="\n  ")
