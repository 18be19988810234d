"""tests/bench/report.py: tables and figures are made from run folders alone and agree with them."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.folder import open_folder
from data.problems import Problem, read_jsonl, write_jsonl
from data.results import half_width
from run import load_data, parse_args
from tests.bench import dpo_step, page, report
from tests.conftest import ROOT
from tokenizer import Tokenizer, format_rationale

FLAGS = "--rounds 1 --n-labeled 4 --n-unlabeled 6 --n-test 8 --seed 0 --device cpu".split()
PICTURES = {"accuracy-per-round", "calculator", "dpo-curves", "sft-loss"}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(rows, path)


def make_row(problem: Problem, rationales: list[str], n_right: int) -> dict:
    """The row that a run stores for one problem; the first n_right rationales are right."""
    n = len(rationales)
    return {
        "question": problem.question,
        "answer": problem.answer,
        "rationales": rationales,
        "correct": [number < n_right for number in range(n)],
        "finished": [True] * n,
    }


def make_evaluation(problems: list[Problem], n_right: int) -> list[dict]:
    """The first n_right problems are solved: the first with its own steps, the others with none."""
    rows = []
    for test, calculator in (("held-out", True), ("dev", True), ("dev", False)):
        for i, problem in enumerate(problems):
            text = f"so. #### {problem.answer if i < n_right else -1:g}"
            if i == 0:
                text = format_rationale(problem.rationale)
            row = {"test": test, "calculator": calculator}
            rows.append(row | make_row(problem, [text], int(i < n_right)))
    return rows


def make_samples(problems: list[Problem], n: int, n_right: int) -> list[dict]:
    """n rationales for each problem, the first n_right of which are right."""
    rows = []
    for problem in problems:
        rationales = []
        for number in range(n):
            answer = problem.answer if number < n_right else -1
            rationales.append(f"step {number} [ 1 + {number} = {1 + number}] #### {answer:g}")
        rows.append(make_row(problem, rationales, n_right))
    return rows


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run as run.py leaves it: 2 of 8 answers are right after the warm-up, 6 after round 1."""
    folder = tmp_path / "run-0"
    config = parse_args([*FLAGS, "--out", str(folder)])
    problems = load_data(config)
    _, unlabeled, tests = problems
    tiny = ROOT / "data" / "tiny"
    with open_folder(folder, vars(config), problems, tiny):
        pass
    shutil.copytree(tiny, folder / "warm-up" / "sft")
    write(folder / "warm-up" / "evaluation.jsonl", make_evaluation(tests["held-out"], 2))
    first = folder / "dpo-st" / "round-1"
    write(first / "samples-for-pairs.jsonl", make_samples(unlabeled, 5, 1))
    write(first / "samples-for-labels.jsonl", make_samples(unlabeled, 3, 3))
    labels = [asdict(replace(problem, rationale="#### 1")) for problem in unlabeled[:2]]
    write(first / "pseudo-labels.jsonl", labels)
    write(first / "evaluation.jsonl", make_evaluation(tests["held-out"], 6))
    write(folder / "log.jsonl", [{"stage": "warm-up/sft", "step": 1, "loss": 2.0}])
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def test_measures_are_those_of_the_folder(run_folder):
    """2 of 8 answers are right, then 6 of 8; one has the expected steps. One of five samples is right,
    then three of three."""
    found = report.measure(run_folder)
    warm_up = found["warm-up"]
    assert warm_up["accuracy"]["held-out"] == 25
    assert warm_up["problems"]["held-out"] == 8
    assert sum(warm_up["problems"][f"{steps} steps"] for steps in (2, 3, 4)) == 8
    assert warm_up["right answers"][report.EXPECTED] == 50
    last = found["dpo-st/round-1"]
    assert last["accuracy"]["held-out"] == 75
    assert last["right answers"][report.EXPECTED] == pytest.approx(100 / 6)
    assert last["before"]["pass@1"] == pytest.approx(20)
    assert last["before"]["pass@3"] == pytest.approx(60)
    assert last["before"]["pseudo-labels of 3 samples"] == 6
    assert last["before"]["without an answer"] == 0
    assert last["after"]["pass@1"] == last["after"]["pass@3"] == 100


def test_accuracy_by_steps_adds_up_to_accuracy(run_folder):
    """Problems of two, three and four steps together are the held-out set: none may be lost."""
    for groups in report.measure(run_folder).values():
        n_right = 0.0
        for test in ("2 steps", "3 steps", "4 steps"):
            n_right += groups["accuracy"][test] * groups["problems"][test]
        assert n_right == pytest.approx(groups["accuracy"]["held-out"] * 8)


@pytest.mark.parametrize(
    "n_right, n", [(0, 125), (1, 125), (250, 500), (499, 500), (500, 500), (447, 2000)]
)
def test_an_interval_covers_the_truth_as_often_as_it_says(n_right, n):
    """'± 4 on 500 problems' is 95 %: among samples of n problems whose true share is the one found, at least 93 % have an
    interval that covers it. The usual standard error would be 0 if all or none are right, and claim certainty."""
    assert half_width(100 * n_right / n, n) > 0
    truth = n_right / n
    right = np.random.default_rng(0).binomial(n, truth, 4000)
    covered = [abs(100 * k / n - 100 * truth) <= half_width(100 * k / n, n) for k in right]
    assert np.mean(covered) > 0.93


def test_a_single_run_has_the_interval_of_its_problems(run_folder, capsys):
    """Without a second seed, only the number of problems tells how uncertain the result is."""
    report.main([str(run_folder)])
    assert f"| warm-up | 25.0 ± {half_width(25, 8):.1f} |" in capsys.readouterr().out


def test_seeds_are_merged(run_folder, tmp_path, capsys):
    """A run that is named twice counts once; otherwise the deviation would be too small. An
    unfinished run still appears in the tables."""
    other = tmp_path / "run-1"
    shutil.copytree(run_folder, other)
    shutil.rmtree(other / "dpo-st")  # stopped after the warm-up
    change_config(other, seed=1, problems="others, for they are made from the seed")
    twice = f"{other}/../{other.name}"
    report.main([str(run_folder), str(other), twice, str(tmp_path / "no such run")])
    said = capsys.readouterr()
    assert "over 2 runs" in said.out
    assert "| warm-up | 25.0 ± 0.0 |" in said.out
    assert "| dpo-st/round-1 | 75.0 |" in said.out
    assert "no such run: there is no run" in said.err
    shown = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "over 2 runs" in shown and "<td>25.0 ± 0.0</td>" in shown
    assert not (other / "report.html").exists()  # one page for all of them


def test_runs_of_one_kind_are_merged_and_others_compared(run_folder, tmp_path, capsys):
    """Means over runs that differ in more than the seed would say nothing: these are compared, flag by flag and
    problem by problem. Settings that depend on the machine, and file locations, may differ."""
    other = tmp_path / "run-1"
    shutil.copytree(run_folder, other)
    both = [str(run_folder), str(other)]
    change_config(other, seed=1, decode_batch_size=7, device="cuda", weights="elsewhere")
    report.main(both)
    assert "over 2 runs" in capsys.readouterr().out
    for flag, value in (("bf16", True), ("beta", 7.0), ("base_weights", "others")):
        before = json.loads((other / "config.json").read_text())[flag]
        change_config(other, **{flag: value})
        report.main(both)
        said = capsys.readouterr().out
        assert f"| {flag} | {before} | {value} |" in said and "over 2 runs" not in said
        assert "| dpo-st/round-1 | 75.0 | 75.0 |" in said
        assert "warm-up: the same problems" in said and "dpo-st/round-1: the same" in said
        shown = (run_folder / "report.html").read_text(encoding="utf-8")
        assert f"<td>{flag}</td><td>{before}</td><td>{value}</td>" in shown
        assert "dpo-st/round-1: the same problems" in shown
        change_config(other, **{flag: before})


def test_runs_on_other_problems_are_not_compared(run_folder, tmp_path):
    """Gained and lost problems need the same problems; a file may have changed and kept its name."""
    other = tmp_path / "run-1"
    shutil.copytree(run_folder, other)
    change_config(other, beta=7.0)
    for path in other.rglob("evaluation.jsonl"):
        path.write_text(path.read_text().replace('"question": "', '"question": "Other: '))
    with pytest.raises(SystemExit, match="other problems"):
        report.main([str(run_folder), str(other)])


class Tags(HTMLParser):
    """The tags of a page, and whether they close in order."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], Counter(), ""

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        if tag not in ("meta", "br", "li", "tr", "td", "th"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen[tag] += 1

    def handle_endtag(self, tag):
        if tag not in ("li", "tr", "td", "th"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_what_it_must_and_escapes_what_it_is_given(run_folder):
    """A lecturer shows it and a student clicks through it, from one file: no script and no network, whatever the
    question's text says."""
    for path in run_folder.rglob("*.jsonl"):
        if path.name != "log.jsonl":
            evil = '"question": "<script>alert(1)</script><b>'
            path.write_text(path.read_text().replace('"question": "', evil))
    report.main([str(run_folder)])
    written = (run_folder / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(written)
    assert tags.open == [] and not tags.seen["script"] and not tags.seen["link"]
    assert "<script>alert(1)</script>" in tags.text  # as text
    assert not re.search(r"(src|href)=.https?:", written)
    assert tags.seen["svg"] >= 3 and tags.seen["title"] >= 4
    for words in (
        "always the most frequent answer",
        "sign test",
        "solved twice",
        "samples for pairs",
    ):
        assert words in tags.text, words
    assert tags.seen["details"] >= 2 and tags.seen["mark"] >= 1


def test_the_followed_questions_are_what_their_kind_says():
    """Three rounds of one sample each, for four questions: the kinds are judged by the samples for labels."""

    def round_of(*right: int) -> dict:
        rows = [{"question": str(i), "correct": [i in right]} for i in range(5)]
        return {"samples for labels": rows, "pairs": {"2": []}}

    rounds = {"st/round-1": round_of(0), "st/round-2": round_of(0)}
    rounds |= {"dpo-st/round-1": round_of(0, 1), "dpo-st/round-2": round_of(1, 2)}
    assert page.choose(rounds, 5) == {
        "turned right": [],
        "turned wrong": [0],
        "solved only by DPO-ST": [2, 1],  # question 2 has pairs
        "never solved": [3, 4],
        "solved twice": [],
    }
    alone = {name: rounds[name] for name in ("dpo-st/round-1", "dpo-st/round-2")}
    assert page.choose(alone, 5)["turned right"] == [2]


def test_a_run_that_has_only_warmed_up_has_a_report_too(run_folder, capsys):
    """The curves of a long run are most useful before it ends."""
    shutil.rmtree(run_folder / "dpo-st")
    report.main([str(run_folder)])
    assert "| warm-up | 25.0 " in capsys.readouterr().out
    assert (run_folder / "figures" / "sft-loss.svg").exists()


def test_what_is_no_run_yet_is_left_out(run_folder, capsys):
    """A run in its first minute is not an error, but there is nothing to report yet."""
    (run_folder / "warm-up" / "evaluation.jsonl").unlink()
    with pytest.raises(SystemExit, match="nothing to report"):
        report.main([str(run_folder)])
    assert "no evaluation yet" in capsys.readouterr().err


def test_a_copy_of_a_run_is_no_second_seed(run_folder):
    """A copy counted as a second seed would narrow every interval."""
    shutil.copytree(run_folder, run_folder.parent / "copy")
    with pytest.raises(SystemExit, match="one seed"):
        report.main([str(run_folder), str(run_folder.parent / "copy")])


def test_a_killed_runs_log_is_read_up_to_its_last_whole_line(run_folder, capsys):
    """Tables can also be made from unfinished runs."""
    with open(run_folder / "log.jsonl", "a") as file:
        file.write('{"stage": "dpo-st/rou')
    report.main([str(run_folder)])
    assert "| warm-up | 25.0 " in capsys.readouterr().out


def test_pictures_are_drawn_or_it_is_said_what_they_need(run_folder, monkeypatch, capsys):
    """matplotlib is optional: tables do not need it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(run_folder)])
    said = capsys.readouterr()
    assert "| warm-up | 25.0 " in said.out
    assert "pip install matplotlib" in said.err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    out = run_folder.parent / "pictures"
    report.main([str(run_folder), "--out", str(out)])
    assert "matplotlib" not in capsys.readouterr().err
    for ending in ("svg", "png"):
        assert {path.stem for path in out.glob(f"*.{ending}")} == PICTURES


def test_a_dollar_sign_in_the_name_of_a_test_set_begins_no_formula(run_folder):
    """matplotlib reads text between dollar signs as a formula, and most names are not valid formulas."""
    pytest.importorskip("matplotlib")
    for path in run_folder.rglob("evaluation.jsonl"):
        rows = [
            row | {"test": row["test"].replace("held-out", "cash $$_")} for row in read_jsonl(path)
        ]
        write(path, rows)
    report.main([str(run_folder)])
    assert (run_folder / "figures" / "accuracy-per-round.svg").exists()


def test_figure_6_compares_the_models_before_and_after_the_dpo_step(
    run_folder, monkeypatch, capsys
):
    """Both models are the bundled one, so greedy answers agree. One in five samples of U is right before DPO,
    all after it."""
    shutil.copytree(ROOT / "data" / "tiny", run_folder / "dpo-st" / "round-1" / "dpo")
    monkeypatch.setattr(sys, "argv", ["dpo_step", str(run_folder)])
    dpo_step.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip("| "): [cell.strip(" |") for cell in line[1:]] for line in table}
    before, after, difference = cells["greedy Pass@1 (%)"]
    assert before == after and difference == "+0.0"
    assert cells["pseudo-labels"] == ["6", "6", "+0.0"]  # three right ones are too similar


def test_a_dpo_step_seen_closely_adds_up(run_folder):
    """The parts of a text's change must add up to it, and a model that has not changed must show no change; a table of
    changes that were computed on other texts, or with other weights, would look as plausible."""
    first = run_folder / "dpo-st" / "round-1"
    shutil.copytree(ROOT / "data" / "tiny", first / "dpo")
    pairs = []
    for row in read_jsonl(first / "samples-for-pairs.jsonl"):
        chosen, rejected = row["rationales"][:2]
        pairs.append({"question": row["question"], "chosen": chosen, "rejected": rejected})
    write(first / "preference-pairs.jsonl", pairs)
    change_config(run_folder, dpo_steps=3, max_new_tokens=20)
    same, trained = dpo_step.look_closely(run_folder, 1)
    for kind in ("chosen", "rejected", "greedy"):
        assert same.totals()[kind] == 0
    totals, parts = trained.totals(), trained.by_token()
    assert totals["chosen"] - totals["rejected"] > 0.01  # three steps of DPO raise the margin
    for kind in ("chosen", "rejected"):
        assert sum(parts[kind].values()) == pytest.approx(totals[kind], abs=1e-3)
    assert len(trained.pairs) == 3 * len(pairs)  # one right sample, four wrong ones, three kept
    tokenizer = Tokenizer(first / "dpo")
    text = "He has 2 + 3 = [ 2 + 3 = 5] 5 nuts. #### 5"
    forced = dpo_step.written_by_calculator(tokenizer, text)
    written = [tokenizer.piece(i) for i, by in zip(tokenizer.encode(text), forced) if by]
    assert "".join(written) == " 5]" and len(forced) == len(tokenizer.encode(text))


def test_the_same_run_gives_the_same_svg_to_the_byte(run_folder):
    """Figures are kept in the repository, where redrawing one must not look like a change."""
    pytest.importorskip("matplotlib")
    drawn = []
    for _ in range(2):
        report.main([str(run_folder)])
        paths = sorted((run_folder / "figures").glob("*.svg"))
        drawn.append([path.read_bytes() for path in paths])
    assert len(drawn[0]) == len(PICTURES)
    assert drawn[0] == drawn[1]
