"""The synthetic stories and the checkpoint bundled for them. A wrong label here would be learned silently."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import run
from calculator import calculate
from data.problems import load_problems, write_jsonl
from data.synthetic import FAMILIES, IN_DOMAIN, OUT_OF_DOMAIN, make_problems
from decode import generate
from model import load_flan_t5
from selftrain import is_correct
from tests.bench import make_tiny
from tokenizer import UNKNOWN_ID, Tokenizer, format_rationale

TINY = Path(__file__).parent.parent / "data" / "tiny"
ALL_STEPS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def problems():
    return make_problems(1500, seed=7, steps=ALL_STEPS, families=tuple(FAMILIES))


def steps_of(problem) -> int:
    return problem.rationale.count("<<")


def test_the_same_seed_tells_the_same_stories():
    """Runs are compared across machines and days; their data must not differ."""
    assert make_problems(50, seed=3) == make_problems(50, seed=3)
    assert not {p.question for p in make_problems(50, seed=3)} & {
        p.question for p in make_problems(50, seed=4)
    }


def test_a_story_depends_on_no_global_state():
    """Names are drawn from ordered lists, never from a set, whose order changes between Python processes."""
    import os
    import subprocess
    import sys

    code = "from data.synthetic import make_problems; print(make_problems(3, seed=5))"
    root = Path(__file__).parent.parent
    outputs = {
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                       env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_every_annotation_evaluates_to_what_it_says(problems):
    """The calculator overrules the model in each bracket; if it disagreed with a gold rationale, no model could
    write that rationale."""
    for problem in problems:
        for before, expression, result, after in re.findall(
            r"(.*) = <<(.*)=(.*)>>(\d+)", problem.rationale
        ):
            assert calculate(expression) == result == after, problem
            assert before.endswith(re.sub(r"([-+*/])", r" \1 ", expression)), problem


def test_the_last_result_is_the_answer(problems):
    """Unlabeled questions keep only the answer, so it must be the rationale's last result."""
    for problem in problems:
        *lines, last = problem.rationale.split("\n")
        assert last == f"#### {problem.answer:.0f}"
        assert lines[-1].split(">>")[1].split()[0] == f"{problem.answer:.0f}"


def test_each_line_uses_only_numbers_known_by_then(problems):
    """A story is solvable from its question: each operand is given there or is the result of an earlier line."""
    for problem in problems:
        known = set(re.findall(r"\d+", problem.question)) | (
            {"2"} if re.search("[Hh]alf|twice", problem.question) else set()
        )
        for expression, result in re.findall(r"<<(.*?)=(.*?)>>", problem.rationale):
            assert set(re.findall(r"\d+", expression)) <= known, problem
            known.add(result)


def test_stories_have_the_number_of_steps_asked_for(problems):
    """Accuracy is reported by number of steps, and the test set has no one-step problems."""
    counts = [steps_of(problem) for problem in problems]
    assert {counts.count(steps) for steps in ALL_STEPS} == {len(problems) // len(ALL_STEPS)}
    assert {steps_of(problem) for problem in make_problems(200, seed=1, steps=(3,))} == {3}


def test_splits_do_not_overlap():
    """A test question seen in training would measure memory."""
    train = make_problems(3000, seed=0)
    seen = {problem.question for problem in train}
    assert len(seen) == 3000
    # the same seed would make the same stories again, so only `exclude` can separate them
    assert not seen & {problem.question for problem in make_problems(300, seed=0, exclude=seen)}


def test_numbers_are_positive_whole_and_sensible(problems):
    """A tiny model cannot write fractions, and without a calculator it makes mistakes in three-digit sums."""
    results = [int(result) for p in problems for result in re.findall(r"=(\d+)>>", p.rationale)]
    assert min(results) >= 2 and max(results) < 1000
    assert sum(result > 99 for result in results) > len(results) / 2


def test_stories_are_varied():
    """All four operations, all names and all families occur; no template is so common that learning it alone
    would pay."""
    problems = make_problems(3000, seed=0)
    text = " ".join(problem.question + problem.rationale for problem in problems)
    counts = [len(re.findall(rf"<<\d+\{sign}", text)) for sign in "+-*/"]
    assert min(counts) > sum(counts) / 20
    templates = [re.sub(r"\d+|[A-Z][a-z]+", "_", problem.question) for problem in problems]
    assert len(set(templates)) > 2000
    assert (
        sum(
            bool(re.search("degrees|minutes to|years old|number \\d|children|minutes", p.question))
            for p in problems
        )
        > 300
    )


def test_two_families_are_kept_for_out_of_domain_tests():
    """With the default arguments, their stories must not leak into training."""
    assert len(OUT_OF_DOMAIN) == 2 and not set(OUT_OF_DOMAIN) & set(IN_DOMAIN)
    text = " ".join(problem.question for problem in make_problems(1000, seed=0))
    assert "library" not in text and "trees" not in text


def test_stories_survive_the_disk(problems, tmp_path):
    """They are ordinary problems in GSM8K's format: written and read like any other dataset."""
    write_jsonl(map(asdict, problems[:100]), tmp_path / "problems.jsonl")
    assert load_problems(tmp_path / "problems.jsonl") == problems[:100]


def test_the_bundled_checkpoint_is_small_and_loads():
    """`python run.py` starts from it in a fresh clone; a repository should carry at most five megabytes."""
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 5_000_000
    assert sorted(file.name for file in TINY.iterdir()) == [
        "config.json",
        "pytorch_model.bin",
        "spiece.model",
    ]
    model, tokenizer = load_flan_t5(TINY), Tokenizer(TINY)
    assert model.config.vocab_size == tokenizer.vocab_size


def test_its_vocabulary_spells_every_story(problems):
    """An unknown id in a question hides a word; in a rationale the model would learn to write it."""
    tokenizer = Tokenizer(TINY)
    for problem in problems:
        for text in (problem.question, format_rationale(problem.rationale)):
            ids = tokenizer.encode(text)
            assert UNKNOWN_ID not in ids and tokenizer.decode(ids) == text


def test_its_digits_stand_alone():
    """The calculator forces digits one by one, and the model can copy 57 digit by digit into places where it
    has never seen it."""
    tokenizer = Tokenizer(TINY)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.n_pieces)]
    assert all(len(piece.strip()) == 1 for piece in pieces if re.search(r"\d", piece))
    assert len(tokenizer.encode("Tom has 857 cards.")) == len("Tom has 8 5 7 cards .".split()) + 1


@pytest.fixture(scope="module")
def read_by_the_base():
    """The multi-step questions that data/tiny was pre-trained on."""
    return {problem.question for problem in make_tiny.make_many_steps()}


@pytest.mark.parametrize("seed", [0, 1, 2, 42])
def test_no_run_trains_or_tests_on_what_the_bundled_base_has_read(seed, read_by_the_base):
    """The base was pre-trained on 60,000 multi-step stories. A seed that drew the same ones as L, U or tests
    would measure memory."""
    labeled, unlabeled, tests = run.load_data(
        run.parse_args(["--seed", str(seed), "--n-test", "2000", "--device", "cpu"])
    )
    train = {problem.question for problem in [*labeled, *unlabeled]}
    assert len(train) == 1250 and not train & read_by_the_base
    assert [(name, len(problems)) for name, problems in tests.items()] == [
        ("held-out", 2000), ("library", 500), ("orchard", 500), ("dev", 500),
    ]  # fmt: skip
    seen = set(train)
    for problems in tests.values():
        questions = {problem.question for problem in problems}
        assert len(questions) == len(problems) and not questions & (seen | read_by_the_base)
        seen |= questions


def test_the_base_answers_questions_of_one_step_and_chains_none():
    """It represents a model that has read text and learned single steps. If it solved longer problems, there would be
    nothing to learn from L; if it could not add, only the calculator would do arithmetic."""
    model, tokenizer = load_flan_t5(TINY), Tokenizer(TINY)
    for steps, low, high in ((1, 0.85, 1), (2, 0, 0.05), (3, 0, 0.05)):
        asked = make_problems(70, "base", (steps,), families=tuple(FAMILIES))
        written = generate(
            model, tokenizer, [problem.question for problem in asked],
            max_new_tokens=100, batch_size=70, calculator=False,
        )  # fmt: skip
        n_right = sum(
            is_correct(samples[0].text, problem.answer) for samples, problem in zip(written, asked)
        )
        assert low <= n_right / len(asked) <= high, (steps, n_right)
