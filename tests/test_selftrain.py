"""Self-training: the text rules against a slow transcription of the paper's, and the order of steps in Algorithms 1 and 2."""

import hashlib
import inspect
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import combinations
from math import floor, inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

import calculator
import decode
import run
import selftrain
from data.problems import Problem, join_gold, load_problems, read_jsonl
from data.results import accuracies
from dpo import PreferencePair
from model import T5, T5Config, load_flan_t5, save_flan_t5
from run import parse_args
from selftrain import (
    Experiment,
    extract_answer,
    is_correct,
    jaccard,
    join_rounds,
    pass_at_k,
    self_train,
    split_samples,
)
from sft import make_examples, train_sft
from tests.bench import page
from tokenizer import Tokenizer, format_rationale

# The rules with the numbers of the paper and of the authors' code.
deduplicate = partial(selftrain.deduplicate, max_similarity=0.7)
make_pairs = partial(selftrain.make_pairs, max_similarity=0.7, n_pairs=3)
make_pseudo_labels = partial(selftrain.make_pseudo_labels, max_similarity=0.7, percentile=90)

WORDS = SimpleNamespace(
    piece_set=lambda text: frozenset(text.split())
)  # a tokenizer whose pieces are words


PLAIN = SimpleNamespace(sentencepiece=SimpleNamespace(normalize=str))  # for keys of questions


def pairs_of(problems, samples, tokenizer=WORDS) -> list[PreferencePair]:
    """The pairs of all questions."""
    found = []
    for problem, rationales in zip(problems, samples, strict=True):
        found += make_pairs(problem, rationales, tokenizer)
    return found


# ----------------------------------------------------------------------- the authors' rules, slow and literal


def literal_answer(text: str) -> float | None:
    """The last `#+ NUMBER` as a float: an optional minus, then digits, points and commas; the commas are removed."""
    found = None
    for at in range(len(text)):
        if text[at : at + 2] == "# ":
            end = at + 2 + (text[at + 2 : at + 3] == "-")
            start = end
            while end < len(text) and text[end] in "0123456789.,":
                end += 1
            if end > start:
                found = text[at + 2 : end]
    try:
        return (
            None
            if found is None or abs(float(found.replace(",", ""))) == inf
            else float(found.replace(",", ""))
        )
    except ValueError:
        return None


def literal_similarity(a: str, b: str, pieces) -> Fraction:
    return Fraction(len(pieces(a) & pieces(b)), len(pieces(a) | pieces(b)))


def literal_deduplication(rationales: list[str], pieces) -> list[str]:
    kept = []
    for rationale in rationales:
        mine, too_similar = pieces(rationale), False
        for other in map(pieces, kept):
            too_similar |= 10 * len(mine & other) > 7 * len(
                mine | other
            )  # in integers, so exact at 0.7
        if not too_similar:
            kept.append(rationale)
    return kept


def literal_sides(problem: Problem, samples: list[str], pieces) -> tuple[list[str], list[str]]:
    """Winning and losing rationales of one question, deduplicated."""
    winning, losing, distinct = [], [], []
    for sample in samples:
        if sample not in distinct:
            distinct.append(sample)
    while distinct:  # from the smallest string to the largest
        smallest = distinct[0]
        for sample in distinct:
            if sample < smallest:
                smallest = sample
        distinct.remove(smallest)
        found = literal_answer(smallest)
        right = found is not None and abs(found - problem.answer) < 1e-4
        (winning if right else losing).append(smallest)
    if problem.rationale:
        winning.insert(0, problem.rationale)
    return literal_deduplication(winning, pieces), literal_deduplication(losing, pieces)


def literal_percentile(counts: list[int]) -> int:
    """The 90th percentile, interpolated linearly and rounded down, in exact arithmetic."""
    counts, place = sorted(counts), Fraction(9, 10) * (len(counts) - 1)
    below, above = counts[floor(place)], counts[min(floor(place) + 1, len(counts) - 1)]
    return floor(below + (above - below) * (place - floor(place)))


def literal_pseudo_labels(
    problems: list[Problem], samples: list[list[str]], pieces
) -> list[tuple[str, str]]:
    kept = [(p.question, literal_sides(p, row, pieces)[0]) for p, row in zip(problems, samples)]
    most = literal_percentile([len(row) for _, row in kept if row] or [0])
    labels = [(question, rationale) for question, row in kept for rationale in row[:most]]
    gold = [(p.question, p.rationale) for p in problems]
    return [label for label in labels if label not in gold]  # L already has the gold ones


def check_against_the_rules(
    problems: list[Problem], samples: list[list[str]], tokenizer, pieces
) -> Counter:
    """Compare pairs and pseudo-labels with the literal rules; count how often each case occurred."""
    seen = Counter()
    pairs = pairs_of(problems, samples, tokenizer)
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    by_question = {problem.question: [] for problem in problems}
    for pair in pairs:
        by_question[pair.question].append((pair.chosen, pair.rejected))
    assert [pair.question for pair in pairs] == [
        q for q, found in by_question.items() for _ in found
    ]
    for problem, row in zip(problems, samples, strict=True):
        winning, losing = literal_sides(problem, row, pieces)
        possible = [(chosen, rejected) for chosen in winning for rejected in losing]
        found = by_question[problem.question]
        assert set(found) <= set(possible) and len(set(found)) == len(found)
        # Equally similar pairs are interchangeable, so only their similarities must match.
        similarity = {pair: literal_similarity(*pair, pieces) for pair in possible}
        assert sorted(similarity[pair] for pair in found) == sorted(similarity.values())[:3]
        ranked = sorted(possible, key=lambda pair: similarity[pair])  # ties keep their order
        seen["the very same pairs"] += found == ranked[:3]
        seen["more pairs than three"] += len(possible) > 3
        seen["no pair"] += not possible
        seen["gold chosen"] += any(w == problem.rationale for w, _ in found)
        seen["a sample chosen"] += any(w != problem.rationale for w, _ in found)
    labels = make_pseudo_labels(problems, samples, tokenizer)
    assert [(label.question, label.rationale) for label in labels] == literal_pseudo_labels(
        problems, samples, pieces
    )
    answers = {problem.question: problem.answer for problem in problems}
    assert all(
        isinstance(label, Problem) and label.answer == answers[label.question] for label in labels
    )
    seen["capped"] += len(labels) < sum(
        len(literal_sides(p, row, pieces)[0]) for p, row in zip(problems, samples)
    )
    return seen


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 + 12 = [ 6 + 12 = 18] 18 pens. #### 18", 18.0),
        ("#### 18.0", 18.0),
        ("#### 1,800", 1800.0),
        ("#### -3", -3.0),
        ("#### 18.", 18.0),  # a full stop after the number
        ("#### .5", 0.5),
        ("# 7", 7.0),  # any number of #
        ("#### 5 #### 6", 6.0),  # a model that continues after its answer: the last one counts
        ("#### 18 pens", 18.0),
        ("The answer is 18.", None),
        ("", None),
        ("####", None),
        ("####18", None),  # the format has a space, as does every training rationale
        ("#### $18", None),
        ("#### .", None),
        ("#### ,", None),
        ("#### -", None),
        ("#### 1.2.3", None),
        ("#### ٣", None),  # a digit in Python, but not in the paper
        (
            "#### " + "9" * 400,
            None,
        ),  # infinite as a float: no answer, and no crash in the comparison
    ],
)
def test_answers_are_found_where_the_format_puts_them(text, answer):
    """No model output is an error: one odd sample in 60,000 must not stop a run or count as solved."""
    assert extract_answer(text) == answer


def test_extraction_follows_the_rule_on_random_text():
    """A regular expression is easily right on clean text only; this test uses 10,000 messy strings."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(10_000):
        text = "".join(rng.choice(list("## ## 017-.,a"), rng.integers(1, 14)))
        assert extract_answer(text) == literal_answer(text), text
        found += extract_answer(text) is not None
    assert found > 500


def test_an_answer_is_correct_within_a_ten_thousandth():
    """A model may write 1/3 as 0.33333 or as 0.3333333, but no integer may count as its neighbour."""
    assert (
        is_correct("#### 18", 18.0)
        and is_correct("#### 18.00009", 18.0)
        and is_correct("#### 17.99991", 18.0)
    )
    assert not is_correct("#### 18.00011", 18.0) and not is_correct("#### 17.99989", 18.0)
    assert is_correct("#### 1,800.0", 1800.0) and not is_correct("#### -18", 18.0)
    assert not is_correct("no number", 0.0) and not is_correct("#### .", 0.0)


def test_a_text_is_correct_up_to_case_and_a_final_stop():
    """The answer may be yes, a letter or a name. Only differences in how it is written are ignored."""
    assert (
        is_correct("Ana is taller. #### Ana", "ana")
        and is_correct("#### Yes.", "yes")
        and is_correct("#### B ", "b.")
    )
    assert (
        not is_correct("#### Ana Maria", "Ana")
        and not is_correct("Ana", "Ben")
        and not is_correct("#### ", "yes")
    )
    assert is_correct(
        format_rationale("It fits.\n####T-shirt"), "t-shirt"
    )  # as in the training text
    assert not is_correct("Ana", "Ana") and not is_correct("# Ana", "Ana")  # no ####, no answer
    assert not is_correct("#### 6", "six") and not is_correct("#### six", 6.0)


def test_another_check_or_tool_has_one_place(monkeypatch):
    """data/README.md: who replaces is_correct, to ask for right reasons too, or the tool, changes one function. A second
    definition would let pairs, labels and accuracies disagree."""
    assert run.is_correct is selftrain.is_correct
    assert decode.calculate is run.calculate is page.calculate is calculator.calculate
    monkeypatch.setattr(selftrain, "is_correct", lambda rationale, answer: "because" in rationale)
    problem = Problem("q", 5.0)
    reasoned, lucky = "5 because 2 + 3 #### 5", "a guess, without reasons #### 5"
    assert split_samples([lucky, reasoned], 5.0) == ([reasoned], [lucky])
    assert make_pairs(problem, [lucky, reasoned], WORDS) == [PreferencePair("q", reasoned, lucky)]
    [label] = make_pseudo_labels([problem], [[lucky, reasoned]], WORDS)
    assert label.rationale == reasoned
    row = selftrain.to_row(problem, [decode.Sample(lucky), decode.Sample(reasoned)])
    assert row["correct"] == [False, True]


@pytest.mark.parametrize(
    "n, n_correct, k", [(5, 2, 3), (5, 0, 1), (5, 5, 2), (8, 1, 8), (4, 3, 2), (3, 1, 1)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n, n_correct, k):
    """Checked on all subsets. The tempting formula 1 - (1 - c/n)^k is biased: 0.78 instead of 0.9 for n = 5, c = 2, k = 3."""
    draws = list(combinations([True] * n_correct + [False] * (n - n_correct), k))
    assert pass_at_k(n, n_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_samples_are_split_once_each_and_sorted():
    """Exact duplicates are frequent at temperature 0.7 and would fill the pairs. The samples are sorted as
    strings, as the authors do: the order decides which of two similar ones is kept."""
    right, also_right, wrong, none = "b #### 5", "a #### 5.0", "c #### 6", "B"
    rationales = [wrong, right, none, right, also_right, wrong, none, wrong]
    assert split_samples(rationales, 5.0) == ([also_right, right], [none, wrong])
    assert split_samples([], 5.0) == ([], [])


def test_the_first_of_two_similar_samples_in_the_order_of_strings_stays():
    """The same samples in a different order must give the same pairs and labels. Without sorting,
    15 to 37 % of the pair sets would differ from the authors'."""
    problem = Problem("q", 5.0)
    first, second = "a b c d e f g h i #### 5", "a b c d e f g h j #### 5"
    for samples in ([first, second, "no"], [second, first, "no"]):
        assert [label.rationale for label in make_pseudo_labels([problem], [samples], WORDS)] == [
            first
        ]
        assert make_pairs(problem, samples, WORDS) == [PreferencePair("q", first, "no")]


def test_accuracy_is_in_percent_of_the_problems():
    """The paper's tables are in percent, so ours is too; with and without calculator are separate results."""
    rows = [
        {"test": "a", "calculator": True, "correct": [True]},
        {"test": "a", "calculator": True, "correct": [False]},
        {"test": "b", "calculator": True, "correct": [True, False]},
        {"test": "a", "calculator": False, "correct": [False]},
    ]
    assert accuracies(rows) == {"a": 50.0, "b": 100.0, "a without calculator": 0.0}


# ------------------------------------------------------------------------------------------- pairs and pseudo-labels


def test_jaccard_by_hand():
    """Shared pieces over all pieces, as sets: {a b c} and {b c d e} share 2 of 5."""
    assert jaccard(frozenset("abc"), frozenset("bcde")) == pytest.approx(0.4)
    assert jaccard(frozenset("bcde"), frozenset("abc")) == pytest.approx(0.4)
    assert (
        jaccard(frozenset("ab"), frozenset("ab")) == 1
        and jaccard(frozenset("ab"), frozenset("cd")) == 0
    )
    assert jaccard(frozenset(), frozenset("a")) == 0
    assert jaccard(frozenset(), frozenset()) == 1  # two empty rationales are the same rationale


def test_a_rationale_as_similar_as_the_threshold_is_kept():
    """At most 0.7 is kept: 7 words of 10 are exactly 0.7, 8 of 11 are more. With < our results would differ from the authors'."""
    first = "a b c d e f g h"
    border = "a b c d e f g i j"  # 7 shared words of 10
    beyond = "a b c d e f g h i j k"  # 8 shared words of 11
    assert jaccard(*map(WORDS.piece_set, (first, border))) == 0.7
    assert deduplicate([first, border], WORDS) == [first, border]
    assert deduplicate([first, beyond], WORDS) == [first]


def test_deduplication_compares_with_every_kept_one_and_no_dropped_one():
    """A rationale similar to any kept one is dropped. A dropped one no longer counts. The first is always kept."""
    a, near_a, near_that, other = "a b c d e f", "a b c d e g", "a b c d h g", "x y"
    similarity = [
        jaccard(*map(WORDS.piece_set, pair))
        for pair in ((a, near_a), (near_a, near_that), (a, near_that))
    ]
    assert similarity[0] > 0.7 and similarity[1] > 0.7 and similarity[2] < 0.7
    assert deduplicate([a, other, near_a, near_that, other], WORDS) == [a, other, near_that]
    assert deduplicate([near_a, a, near_that], WORDS) == [near_a]
    assert deduplicate([], WORDS) == []


def test_similarity_counts_each_piece_once():
    """Similarity compares SETS of pieces: a rationale that repeats itself is still the same rationale."""
    assert deduplicate(["a b #### 5", "a a b b a b #### 5"], WORDS) == ["a b #### 5"]


def test_the_gold_rationale_outlives_its_copies():
    """Whatever the model samples, the human rationale comes first, so that L is never diluted by paraphrases of itself.
    It is not a pseudo-label, because L already has it."""
    problem = Problem("q", 5.0, "one two three four five #### 5")
    copies = ["one two three four also #### 5", problem.rationale, "other words #### 5"]
    labels = make_pseudo_labels([problem], [copies], WORDS)
    assert [label.rationale for label in labels] == ["other words #### 5"]
    pairs = make_pairs(problem, [*copies, "no"], WORDS)
    assert {pair.chosen for pair in pairs} == {problem.rationale, "other words #### 5"}


def test_the_three_least_similar_pairs_are_kept():
    """Pairs that differ most teach most. Two winning and two losing rationales give four pairs; the most similar is dropped."""
    problem = Problem("q", 5.0, "a b c #### 5")
    winning, losing = "d e f #### 5", ["a b c #### 6", "x y z #### 6"]
    pairs = make_pairs(problem, [winning, *losing], WORDS)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        (problem.rationale, losing[1]), (winning, losing[0]), (winning, losing[1])
    }  # fmt: skip
    assert len(pairs) == 3 and {pair.question for pair in pairs} == {"q"}


def test_as_many_pairs_are_kept_as_asked_the_least_similar_first():
    """--n-pairs and the order are the caller's: a fixed 3 would ignore the flag. Equally similar pairs keep their order."""
    problem = Problem("q", 5.0, "a b c #### 5")
    losing = ["a b x #### 6", "p q r #### 6", "a y z #### 6"]
    pairs = make_pairs(problem, losing, WORDS, n_pairs=2)
    assert [pair.rejected for pair in pairs] == [losing[1], losing[2]]
    assert len(make_pairs(problem, losing, WORDS, n_pairs=1)) == 1
    tied = ["d e f #### 6", "g h i #### 6"]
    assert [pair.rejected for pair in make_pairs(problem, tied, WORDS)] == tied


def test_both_sides_of_the_pairs_are_deduplicated():
    """Near copies of one mistake, or of one solution, would fill the three places of a question; max_similarity is the
    caller's."""
    problem = Problem("q", 5.0)
    right = ["a b c d e f #### 5", "a b c d e g #### 5"]
    wrong = ["p q r s t u #### 6", "p q r s t v #### 6"]
    [pair] = make_pairs(problem, [*right, *wrong], WORDS)
    assert (pair.chosen, pair.rejected) == (right[0], wrong[0])
    assert len(make_pairs(problem, [*right, *wrong], WORDS, max_similarity=1.0, n_pairs=9)) == 4


def test_pairs_are_ranked_by_the_tokenizers_pieces():
    """Section 4.2 compares pieces, not words: as words, `abcd` and `dcba` would have nothing in common."""
    letters = SimpleNamespace(piece_set=frozenset)
    problem = Problem("q", 7.0)
    near, far = "dcba #### 8", "abcd efghijklmno #### 8"
    pairs = make_pairs(problem, ["abcd #### 7", near, far], letters)
    assert [pair.rejected for pair in pairs] == [far, near]


def test_questions_without_both_sides_give_no_pair():
    """Without a losing sample the question is solved; without a winning or human one there is nothing to prefer. Neither is an error."""
    solved = Problem("solved", 5.0, "gold #### 5")
    unsolved = Problem("unsolved", 5.0)
    assert make_pairs(solved, ["a b #### 5"], WORDS) == []
    assert make_pairs(unsolved, ["c #### 6", "d #### 7"], WORDS) == []
    assert make_pairs(solved, ["c #### 6"], WORDS) == [
        PreferencePair("solved", "gold #### 5", "c #### 6")
    ]
    assert make_pairs(unsolved, ["c #### 6", "a #### 5"], WORDS) == [
        PreferencePair("unsolved", "a #### 5", "c #### 6")
    ]
    assert make_pairs(unsolved, [], WORDS) == []


def test_pseudo_labels_are_capped_at_the_ninetieth_percentile():
    """Nine questions with one rationale and one with nine: the percentile is 1.8, rounded down to 1. Without a cap, easy
    questions would crowd out the rest. Unsolved questions are not counted: they could lower the cap to 0."""
    problems = [Problem(f"q{i}", 5.0) for i in range(10)]
    samples = [["only #### 5"]] * 9 + [[f"a{i} b{i} c{i} #### 5" for i in range(9)]]
    assert [label.question for label in make_pseudo_labels(problems, samples, WORDS)] == [
        p.question for p in problems
    ]
    unsolved = [Problem(f"u{i}", 5.0) for i in range(200)]
    samples += [["wrong #### 6"]] * 200
    assert [
        label.question for label in make_pseudo_labels(problems + unsolved, samples, WORDS)
    ] == [problem.question for problem in problems]
    many = [[f"{i} {k} x{k} y{k} #### 5" for k in range(4)] for i in range(10)]
    assert (
        len(make_pseudo_labels(problems, many, WORDS)) == 40
    )  # equal counts: the cap removes nothing
    assert make_pseudo_labels(problems, [[]] * 10, WORDS) == []


def test_where_few_questions_are_solved_the_cap_leaves_nothing():
    """A trap in the authors' rule: where U has gold rationales, a model that solves fewer than one question in ten adds no
    pseudo-labels, and every round's SFT repeats the warm-up. Seen on a small checkpoint; see tests/README.md."""
    problems = [Problem(f"q{i}", 5.0, "gold #### 5") for i in range(100)]
    for solved, found in ((9, 0), (20, 20)):
        samples = [["another way #### 5"]] * solved + [["wrong #### 6"]] * (100 - solved)
        assert len(make_pseudo_labels(problems, samples, WORDS)) == found
    samples = [["another way #### 5"]] * 9 + [["wrong #### 6"]] * 91
    assert len(make_pseudo_labels(problems, samples, WORDS, percentile=100)) == 9


def random_world(rng) -> tuple[list[Problem], list[list[str]]]:
    """Questions with and without a gold rationale, and samples of few words, so that near duplicates are frequent."""
    richness = int(rng.integers(3, 13))

    def rationale(answer: int) -> str:
        words = rng.choice(list("abcdefghijkl")[:richness], rng.integers(1, 12))
        return " ".join(words) + rng.choice(
            [f" #### {answer}", f" #### {answer}.0", "", " ####"], p=[0.7, 0.1, 0.1, 0.1]
        )

    problems, samples = [], []
    for i in range(rng.integers(1, 14)):
        answer = int(rng.integers(0, 3))
        gold = f"gold {rationale(answer)} #### {answer}" if rng.random() < 0.6 else None
        problems.append(Problem(f"q{i}", float(answer), gold))
        samples.append([rationale(int(rng.integers(0, 3))) for _ in range(rng.integers(0, 16))])
        if gold and rng.random() < 0.3:
            samples[-1].append(gold)
    return problems, samples


def test_pairs_and_pseudo_labels_follow_the_rules_on_random_samples():
    """Three hundred random data sets against the transcription: all rules together, in the order of the authors' code."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(300):
        seen += check_against_the_rules(*random_world(rng), WORDS, WORDS.piece_set)
    assert (
        min(
            seen[case]
            for case in (
                "more pairs than three",
                "no pair",
                "gold chosen",
                "a sample chosen",
                "capped",
            )
        )
        > 40
    )


def test_pairs_and_pseudo_labels_follow_the_rules_on_real_rationales(datasets, vocabulary):
    """The same with 500 GSM8K questions, T5's vocabulary, and eight rationales each: paraphrases of the gold one, wrong
    answers, other solutions."""
    rng, pieces_of = np.random.default_rng(0), {}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "spiece.model"))

    def pieces(text: str) -> set[str]:
        if text not in pieces_of:
            pieces_of[text] = set(processor.encode(text, out_type=str))
        return pieces_of[text]

    problems = load_problems(datasets / "gsm8k" / "train.jsonl")[:500]
    problems = [replace(p, rationale=format_rationale(p.rationale)) for p in problems]
    assert all(is_correct(problem.rationale, problem.answer) for problem in problems)
    samples = []
    for problem in problems:
        row, words, sure = (
            [],
            problem.rationale.split(" "),
            rng.random() < 0.1,
        )  # a tenth of the questions are easy
        for _ in range(8):
            kind, other = rng.integers(3 if sure else 5), problems[rng.integers(len(problems))]
            end = problem.answer if sure or rng.random() < 0.6 else problem.answer + 1
            body, _, _ = (other.rationale if kind == 0 else problem.rationale).rpartition("####")
            if kind == 1:  # its first words
                body = " ".join(words[: rng.integers(1, len(words))]) + " "
            if kind == 2:  # a paraphrase
                body = body.replace(" the ", " these ").replace(words[0], "Then")
            row.append(body if kind == 3 else f"{body}#### {end:g}")
        samples.append(row)
    problems = [replace(p, rationale=None) if rng.random() < 0.3 else p for p in problems]
    seen = check_against_the_rules(problems, samples, Tokenizer(vocabulary), pieces)
    assert min(seen[case] for case in ("no pair", "gold chosen", "a sample chosen")) > 10
    assert seen["the very same pairs"] >= 0.98 * len(problems)


# ------------------------------------------------------------------------------------------------ Algorithms 1 and 2


class Notebook:
    """An experiment that does no work and only records its calls. A model is a name that says how it was made."""

    def __init__(self, labeled, unlabeled, rounds):
        self.calls, self.names, self.given = [], [], []
        self.L, self.U = labeled, join_gold(unlabeled, labeled, PLAIN)
        self.config = SimpleNamespace(rounds=rounds, dpo_samples=5, sft_samples=3, st_samples=8)

    def note(self, name: str, *call, given=None) -> None:
        self.calls.append(call)
        self.names.append(name)
        self.given.append(given)

    def of(self, stage: str) -> list:
        """The input of each call of a stage, in order."""
        return [given for call, given in zip(self.calls, self.given) if call[0] == stage]

    def sft(self, name, problems):
        self.note(name, "sft", given=list(problems))
        return f"sft {len(self.of('sft')) - 1}"

    def dpo(self, name, policy, pairs, round_number):
        self.note(name, "dpo", policy, round_number, given=pairs)
        return f"dpo of {policy}"

    def sample(self, name, model, k):
        self.note(name, "sample", model, k)
        return [
            [f"{model}, {p.question}, {n} #### {p.answer + n % 2:g}" for n in range(k)]
            for p in self.U
        ]

    def pairs(self, name, rounds):
        samples = join_rounds(rounds)
        self.note(name, "pairs", given=samples)
        return pairs_of(self.U, samples)

    def pseudo_labels(self, name, rounds):
        samples = join_rounds(rounds)
        self.note(name, "pseudo-labels", given=samples)
        return make_pseudo_labels(self.U, samples, WORDS)

    def evaluate(self, name, model):
        self.note(name, "evaluate", model)


L = [Problem(f"l{i}", float(i), f"a human writes about l{i} #### {i}") for i in range(4)]
U = [Problem(f"u{i}", float(i), f"secret rationale of u{i} #### {i}") for i in range(3)]
L_AS_U = [replace(problem, rationale=f"secret rationale of {problem.question}") for problem in L]


def notes_of(method: str, labeled=L, unlabeled=L_AS_U, rounds: int = 2) -> Notebook:
    notebook = Notebook(labeled, unlabeled, rounds)
    self_train(notebook, method)
    return notebook


def test_algorithm_2_takes_its_steps_in_the_papers_order():
    """Line by line: pairs come from f', five samples per question; labels from f_d, three; DPO and each round start from
    the newest f'."""
    assert notes_of("dpo-st").calls == [
        ("sft",), ("evaluate", "sft 0"),
        ("sample", "sft 0", 5), ("pairs",), ("dpo", "sft 0", 1),
        ("sample", "dpo of sft 0", 3), ("pseudo-labels",), ("sft",), ("evaluate", "sft 1"),
        ("sample", "sft 1", 5), ("pairs",), ("dpo", "sft 1", 2),
        ("sample", "dpo of sft 1", 3), ("pseudo-labels",), ("sft",), ("evaluate", "sft 2"),
    ]  # fmt: skip


def test_algorithm_1_takes_its_steps_in_the_papers_order():
    """Plain self-training is the baseline: the same loop, without preferences."""
    assert notes_of("st").calls == [
        ("sft",), ("evaluate", "sft 0"),
        ("sample", "sft 0", 8), ("pseudo-labels",), ("sft",), ("evaluate", "sft 1"),
        ("sample", "sft 1", 8), ("pseudo-labels",), ("sft",), ("evaluate", "sft 2"),
    ]  # fmt: skip
    assert (
        notes_of("st", rounds=0).calls
        == notes_of("dpo-st", rounds=0).calls
        == [("sft",), ("evaluate", "sft 0")]
    )


def test_samples_add_up_over_the_rounds_each_kind_by_itself():
    """Pairs use the samples of all SFT models, labels those of all DPO models. Mixing them would be a different algorithm."""
    notebook = notes_of("dpo-st", rounds=3)
    for stage, model, n in (("pairs", "sft {}", 5), ("pseudo-labels", "dpo of sft {}", 3)):
        for past, samples in enumerate(notebook.of(stage), start=1):
            for problem, row in zip(notebook.U, samples, strict=True):
                sources = [model.format(number) for number in range(past) for _ in range(n)]
                assert [rationale.split(", ")[:2] for rationale in row] == [
                    [source, problem.question] for source in sources
                ]
    for past, samples in enumerate(notes_of("st", rounds=3).of("pseudo-labels"), start=1):
        assert all(len(row) == 8 * past for row in samples)


def test_dpo_and_sft_are_given_all_that_was_made_for_them():
    """The warm-up trains on L alone, every later SFT also on its round's pseudo-labels, and DPO on its round's pairs."""
    notebook = notes_of("dpo-st")
    warm_up, *later = notebook.of("sft")
    assert warm_up == L
    for given, samples in zip(later, notebook.of("pseudo-labels"), strict=True):
        assert Counter(given) == Counter([*L, *make_pseudo_labels(notebook.U, samples, WORDS)])
    for given, samples in zip(notebook.of("dpo"), notebook.of("pairs"), strict=True):
        assert given == pairs_of(notebook.U, samples) and given


@pytest.mark.parametrize("method", ["st", "dpo-st"])
@pytest.mark.parametrize(
    "unlabeled", [L_AS_U, U, L_AS_U[2:] + U, []], ids=["U is L", "apart", "overlapping", "empty"]
)
def test_sft_always_sees_all_of_l(method, unlabeled):
    """f' = SFT(f, L + S_a) for any U: labeled problems that are not in U must not be lost after the warm-up."""
    for given in notes_of(method, unlabeled=unlabeled).of("sft"):
        counts = Counter((problem.question, problem.rationale) for problem in given)
        assert all(counts[problem.question, problem.rationale] == 1 for problem in L)


def test_two_human_rationales_of_one_question_both_stay():
    """Your own data may solve a question twice. Both rationales belong to L, and every SFT set contains L, the warm-up's included."""
    labeled = [*L, replace(L[0], rationale="quite another way of thinking #### 0")]
    for unlabeled in (L_AS_U, U):
        for given in notes_of("st", labeled, unlabeled).of("sft"):
            assert {(p.question, p.rationale) for p in labeled} <= {
                (p.question, p.rationale) for p in given
            }


@pytest.mark.parametrize("method", ["st", "dpo-st"])
def test_rationales_of_the_unlabeled_set_are_never_used(method):
    """U is only questions and answers. In the tiny run its rationales are known, so a leak would mean training on them.
    A question of U that is also in L has L's rationale, in L's spelling."""
    notebook = notes_of(method, unlabeled=L_AS_U[2:] + U)
    assert "secret" not in repr(notebook.given)
    assert [problem.question for problem in notebook.U] == ["l2", "l3", "u0", "u1", "u2"]
    gold = [problem.rationale for problem in notebook.U]
    assert gold == [L[2].rationale, L[3].rationale, None, None, None]


def test_a_question_with_another_answer_in_u_is_not_joined_with_l():
    """L says 0 and U says 9 for the same question. If joined, L's rationale would come first among U's
    correct ones and be trained on as one that reaches 9."""
    other = replace(L[0], answer=9.0, rationale=None)
    assert join_gold([other, *U], L, PLAIN)[0] == other


def test_l_and_u_are_joined_by_the_same_answer_however_it_is_spelled():
    """There is one definition of equal answers: 0.33333 in U equals L's 0.3333, so L's rationale is gold."""
    ours = Problem("a third?", 0.3333, "It is 0.3333. #### 0.3333")
    assert join_gold([Problem("a third?", 0.33333), *U], [*L, ours], PLAIN)[0] == ours


def test_stages_have_the_names_that_reports_look_for():
    """A result under another name is made, paid for, and then missing from every table and picture."""
    names = "samples-for-pairs.jsonl preference-pairs.jsonl dpo samples-for-labels.jsonl pseudo-labels.jsonl sft evaluation.jsonl"
    expected = ["warm-up/sft", "warm-up/evaluation.jsonl"]
    for number in (1, 2):
        expected += [f"dpo-st/round-{number}/{name}" for name in names.split()]
    assert notes_of("dpo-st").names == expected


def test_stages_have_names_of_their_own_and_the_methods_share_the_warm_up():
    """A result is stored under its stage's name. Of two stages with the same name, the second would read the first's result."""
    st, dpo_st = notes_of("st").names, notes_of("dpo-st").names
    assert len(set(st)) == len(st) and len(set(dpo_st)) == len(dpo_st)
    assert set(st) & set(dpo_st) == set(st[:2]) == set(dpo_st[:2])


# ---------------------------------------------------------------------------------------------------------- the stages

SUMS = [
    Problem(
        f"How many are {a} + {b}?",
        float(a + b),
        f"{a} + {b} = [ {a} + {b} = {a + b}] {a + b}. #### {a + b}",
    )
    for a, b in [(1, 2), (5, 1), (2, 6), (4, 3), (7, 2), (3, 3), (6, 1), (1, 8), (2, 2), (4, 5)]
]
CONFIG = parse_args(
    "--rounds 1 --dpo-samples 3 --sft-samples 2 --st-samples 3 --max-new-tokens 32 --sft-epochs 8 "
    "--sft-learning-rate 1e-2 --sft-batch-size 6 --dpo-steps 3 --dpo-learning-rate 1e-4 "
    "--dpo-batch-size 4 --decode-batch-size 16 --log-every 1 --device cpu".split()
)


def changed(**numbers) -> SimpleNamespace:
    return SimpleNamespace(**vars(CONFIG) | numbers)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint folder: a random two-layer T5 and a vocabulary of about forty pieces."""
    folder = tmp_path_factory.mktemp("base")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{p.question} {p.rationale}" for p in SUMS), model_prefix=str(folder / "spiece"), vocab_size=45,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    vocab_size = Tokenizer(folder).vocab_size
    config = T5Config(
        d_model=32, d_ff=48, n_heads=2, n_layers=2, d_kv=16, vocab_size=vocab_size, dropout=0.0
    )
    save_flan_t5(T5(config), folder)
    return folder


class Shelf:
    """A run folder, the Experiment that uses it, and its log."""

    def __init__(self, base: Path, path: Path, config=CONFIG, L=SUMS[:6], U=SUMS, tests=None):
        self.logs = []
        self.folder = path
        self.stages = Experiment(
            config,
            L,
            join_gold(U, L, PLAIN),
            tests or {},
            base,
            Tokenizer(base),
            path,
            self.logs.append,
        )

    def rows(self, name: str) -> list[dict]:
        return read_jsonl(self.folder / f"{name}.jsonl")


def weights(folder: Path) -> list[torch.Tensor]:
    return list(load_flan_t5(folder).state_dict().values())


def same_bytes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_whole_round_of_both_methods_on_ten_sums(base, tmp_path):
    """Six labeled sums, four without a rationale: every stage runs and produces what the next one reads, the losses fall,
    and the base weights on disk do not change."""
    before = hashlib.sha256((base / "pytorch_model.bin").read_bytes()).hexdigest()
    shelf = Shelf(base, tmp_path, tests={"seen": SUMS[:6], "dev": SUMS[6:]})
    for method in ("st", "dpo-st"):
        self_train(shelf.stages, method)
    assert hashlib.sha256((base / "pytorch_model.bin").read_bytes()).hexdigest() == before
    evaluations = [read_jsonl(path) for path in tmp_path.rglob("evaluation.jsonl")]
    assert len(evaluations) == 3
    for made in evaluations:  # dev a second time without the calculator
        kinds = [("seen", True)] * 6 + [("dev", True)] * 4 + [("dev", False)] * 4
        assert [(row["test"], row["calculator"]) for row in made] == kinds
        assert [row["question"] for row in made] == [p.question for p in [*SUMS, *SUMS[6:]]]
    folders = [path.parent for path in tmp_path.glob("*/**/config.json")]
    assert len(folders) == 4  # the shared warm-up, ST's round, and DPO-ST's two
    warm_up, after_dpo = (
        weights(next(f for f in folders if key in str(f)))
        for key in ("warm-up", "dpo-st/round-1/dpo")
    )
    assert not same_bytes(warm_up, weights(base)) and not same_bytes(after_dpo, warm_up)
    labels = shelf.rows("dpo-st/round-1/pseudo-labels")
    assert not {p.rationale for p in SUMS[:6]} & {row["rationale"] for row in labels}
    pairs = shelf.rows("dpo-st/round-1/preference-pairs")
    assert pairs and all(set(row) == {"question", "chosen", "rejected"} for row in pairs)
    for stage in {log["stage"] for log in shelf.logs if str(log["stage"]).endswith("sft")}:
        losses = [log["loss"] for log in shelf.logs if log["stage"] == stage]
        assert len(losses) >= 8 and losses[-1] < 0.7 * losses[0]
    dpo = [log for log in shelf.logs if "reward_margin" in log]
    assert len(dpo) == 3 and dpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_sft_starts_from_the_base_weights_every_time(base, tmp_path):
    """Algorithms 1 and 2: f' = SFT(f, L + S_a). The same data must give the same weights in round 1 and in round 3, whatever
    ran in between. Continuing from the last round's model would be a different method (and train L for 8 more epochs each time)."""
    config = changed(sft_epochs=2)
    shelf = Shelf(base, tmp_path, config)
    first = shelf.stages.sft("first", SUMS[:6])
    shelf.stages.sft("between", SUMS[3:])
    shelf.stages.dpo(
        "dpo", first, [PreferencePair(p.question, p.rationale, "no") for p in SUMS[:3]], 1
    )
    again = shelf.stages.sft("again", SUMS[:6])
    assert first != again and same_bytes(weights(first), weights(again))
    schedule = shelf.stages.schedule(config.sft_learning_rate, config.sft_batch_size)
    examples = make_examples(SUMS[:6], Tokenizer(base))
    by_hand = train_sft(load_flan_t5(base), examples, 2, schedule, "by hand", lambda record: None)
    assert same_bytes(list(by_hand.state_dict().values()), weights(first))


def test_dpo_starts_from_the_model_it_is_given_and_leaves_it_alone(base, tmp_path):
    """f_d = DPO(f', f', D) starts from f', not from the base weights, and f' is needed again if the run stops here."""
    shelf = Shelf(base, tmp_path, changed(sft_epochs=2, dpo_learning_rate=1e-9))
    policy = shelf.stages.sft("sft", SUMS)
    before = weights(policy)
    trained = shelf.stages.dpo(
        "dpo", policy, [PreferencePair(p.question, p.rationale, "no") for p in SUMS[:5]], 1
    )
    assert trained != policy and same_bytes(weights(policy), before)
    for ours, start in zip(weights(trained), before):
        torch.testing.assert_close(ours, start, atol=1e-6, rtol=1e-6)


def test_dpo_trains_on_all_pairs(base, tmp_path, monkeypatch):
    """As in the paper, no pairs are held out."""
    asked = []

    def fake(policy, pairs, *rest):
        asked.extend(pairs)
        return policy

    monkeypatch.setattr(selftrain, "train_dpo", fake)
    pairs = [PreferencePair(p.question, p.rationale, "no") for p in SUMS]
    Shelf(base, tmp_path).stages.dpo("dpo", base, pairs, 1)
    assert len(asked) == len(pairs)


def test_later_dpo_steps_have_their_own_peak_rate(base, tmp_path):
    """From round 2 on most pairs are of earlier models, and steps as large as the first round's overtrain on them; the
    paper has one rate for all rounds, which is a ratio of 1."""
    pairs = [PreferencePair(p.question, p.rationale, "no") for p in SUMS]
    for ratio in (1, 0.3):
        shelf = Shelf(base, tmp_path / str(ratio), changed(later_ratio=ratio, warmup_ratio=0))
        for round_number in (1, 2, 3):
            shelf.stages.dpo(f"dpo-{round_number}", base, pairs, round_number)
        peaks = [log["learning_rate"] for log in shelf.logs if log["step"] == 1]
        assert peaks == pytest.approx([1e-4, 1e-4 * ratio, 1e-4 * ratio])


def test_without_pairs_the_dpo_step_is_skipped_and_says_so(base, tmp_path):
    """Early models may solve nothing, late ones everything. The round then continues with f' itself. A run that
    is continued does not say it a second time."""
    shelf = Shelf(base, tmp_path)
    for _ in range(2):
        pairs = shelf.stages.pairs("pairs.jsonl", [[[]] * len(SUMS)])
        assert shelf.stages.dpo("dpo", base, pairs, 1) == base
    [record] = shelf.logs
    assert record["kept"] == 0 and "DPO step is skipped" in record["note"]


def test_sampling_and_evaluation_decode_as_the_paper_says(base, tmp_path, monkeypatch):
    """Samples: temperature 0.7, top-k 50, calculator on, and a different seed in every stage; otherwise round 2 would
    repeat round 1's samples. Evaluation: greedy, one rationale each, and dev a second time without the calculator."""
    calls = []

    def fake(*args, **named):
        bound = inspect.signature(decode.generate).bind(*args, **named)
        bound.apply_defaults()
        calls.append(SimpleNamespace(**bound.arguments))
        return [
            [SimpleNamespace(text="#### 3", finished=True) for _ in range(calls[-1].n_samples)]
            for _ in calls[-1].questions
        ]

    monkeypatch.setattr(selftrain, "generate", fake)
    shelf = Shelf(base, tmp_path)
    for name in ("a", "b", "a"):  # the second "a" is already on disk
        samples = shelf.stages.sample(f"{name}.jsonl", base, 4)
    assert samples == [["#### 3"] * 4] * 10 and len(calls) == 2 and calls[0].seed != calls[1].seed
    for call in calls:
        assert (call.temperature, call.top_k, call.n_samples, call.calculator) == (0.7, 50, 4, True)
        assert (
            call.questions == [problem.question for problem in SUMS] and call.max_new_tokens == 32
        )
    other_seed = Shelf(base, tmp_path / "other", changed(seed=43))
    other_seed.stages.sample("a.jsonl", base, 4)
    assert calls[2].seed != calls[0].seed
    Shelf(base, tmp_path / "bf16", changed(bf16=True)).stages.sample("a.jsonl", base, 4)
    assert [call.model.shared.weight.dtype for call in calls[2:]] == [torch.float32, torch.bfloat16]
    calls.clear()
    shelf.stages.tests = {"two": SUMS, "dev": SUMS[:3]}
    shelf.stages.evaluate("evaluation.jsonl", base)
    assert [(len(call.questions), call.calculator) for call in calls] == [
        (10, True),
        (3, True),
        (3, False),
    ]
    assert all(
        (call.temperature, call.n_samples, call.max_new_tokens) == (0, 1, 32) for call in calls
    )
    assert accuracies(shelf.rows("evaluation"))["two"] == 10.0  # of the ten sums only 1 + 2 is 3


def test_what_has_its_final_name_is_not_made_again_and_what_has_not_is(base, tmp_path, monkeypatch):
    """How a restart works: a stage that fails leaves nothing under its final name, not even half a file, and runs again;
    a finished one is read from disk."""
    stages = Shelf(base, tmp_path, changed(sft_epochs=1)).stages
    save = selftrain.save_flan_t5

    def die_halfway(model, path):
        save(model, path)
        (path / "pytorch_model.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(selftrain, "save_flan_t5", die_halfway)
    with pytest.raises(KeyboardInterrupt):
        stages.sft("warm-up/sft", SUMS[:3])
    assert list((tmp_path / "warm-up").iterdir()) == []
    monkeypatch.setattr(selftrain, "save_flan_t5", save)
    path = stages.sft("warm-up/sft", SUMS[:3])
    monkeypatch.setattr(selftrain, "train_sft", partial(pytest.fail, "trained again"))
    assert stages.sft("warm-up/sft", SUMS[:3]) == path and load_flan_t5(path)


def test_read_only_files_of_a_base_do_not_make_the_run_read_only(base, tmp_path):
    """A checkpoint on a shared disk is often read-only. Its vocabulary is copied into every model of the
    run, but its permissions must not be."""
    stages = Shelf(base, tmp_path, changed(sft_epochs=1)).stages
    vocabulary = base / "spiece.model"
    mode = vocabulary.stat().st_mode
    vocabulary.chmod(0o444)
    try:
        path = stages.sft("sft", SUMS[:3])
    finally:
        vocabulary.chmod(mode)
    assert (path / "spiece.model").stat().st_mode & 0o200
