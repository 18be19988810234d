"""tests/bench/report.py: the paper's tables and figures come from run folders alone, and the numbers are those of the folder."""

import json
import shutil
import sys
from dataclasses import asdict, replace

import pytest

import run
from conftest import ROOT
from data.folder import RunFolder
from data.problems import write_jsonl
from run import Config, load_data
from tests.bench import report, tallest
from tokenizer import format_rationale

CONFIG = Config(rounds=1, n_labeled=4, n_unlabeled=6, n_test=8, dpo_samples=5, sft_samples=3)


@pytest.fixture
def run_folder(tmp_path):
    """A run as run.py leaves it, whose rationales are right exactly where this says: half before DPO, all after it."""
    config = replace(CONFIG, seed=0)
    folder = RunFolder(tmp_path / "run-0")
    folder.open(asdict(config))
    _, unlabeled, tests = load_data(config)

    def write(name, rows):
        folder.write(name, lambda path: write_jsonl(rows, path))

    def evaluation(n_right):  # the first one by the problem's own steps, the other right ones by none
        return [{"test": test, "calculator": on, "question": p.question, "answer": p.answer, "finished": [True],
                 "rationales": [f"so. #### {p.answer if i < n_right else -1:g}" if i else format_rationale(p.rationale)]}
                for test, on in (("held-out", True), ("held-out", False)) for i, p in enumerate(tests["held-out"])]  # fmt: skip

    def samples(n, right):
        texts = lambda p: [f"step {k} [ 1 + {k} = {1 + k}] #### {p.answer if k < right else -1:g}" for k in range(n)]
        return [{"question": p.question, "answer": p.answer, "rationales": texts(p), "finished": [True] * n} for p in unlabeled]

    write("warm-up/evaluation.jsonl", evaluation(2))
    write("dpo-st/round-1/samples-for-pairs.jsonl", samples(5, 1))
    write("dpo-st/round-1/samples-for-labels.jsonl", samples(3, 3))
    folder.write("warm-up/sft", lambda path: shutil.copytree(ROOT / "data" / "tiny", path))
    write("dpo-st/round-1/pseudo-labels.jsonl", [asdict(replace(p, rationale="#### 1")) for p in unlabeled[:2]])
    write("dpo-st/round-1/evaluation.jsonl", evaluation(6))
    folder.log({"stage": "warm-up/sft", "step": 1, "loss": 2.0})
    folder.lock.close()
    return folder.path


def test_measures_are_those_of_the_folder(run_folder):
    """2 of 8, then 6 of 8, of which one has the expected steps; one of five samples right, then three of three; every rationale
    calls the calculator once."""
    found = report.measure(run_folder)
    assert found["warm-up"]["held-out"] == 25.0 and found["dpo-st/round-1"]["held-out"] == 75.0
    assert found["warm-up"][report.EXPECTED] == 50.0
    assert found["dpo-st/round-1"][report.EXPECTED] == pytest.approx(100 / 6)
    stage = found["dpo-st/round-1"]
    assert stage["before: pass@1"] == pytest.approx(20) and stage["before: pass@3"] == pytest.approx(60)
    assert stage["after: pass@1"] == stage["after: pass@3"] == 100 and stage["before: cut at the limit"] == 0
    assert stage["pseudo-labels"] == 2 and stage["before: pseudo-labels of 3 samples"] == 6
    assert stage["before: calculator calls per rationale"] == 1 and stage["before: calls that do not evaluate"] == 0


def test_seeds_are_merged_and_other_kinds_refused(run_folder, tmp_path, monkeypatch, capsys):
    """Means over runs that differ in more than the seed would say nothing. An unfinished run still has its tables."""
    other = tmp_path / "run-1"
    shutil.copytree(run_folder, other)
    change = lambda **what: (other / "config.json").write_text(json.dumps({**json.loads((other / "config.json").read_text()), **what}))
    sums = (other / "sha256sums.txt").read_text().splitlines(keepends=True)
    (other / "sha256sums.txt").write_text("".join(sums[:1]))  # stopped after the warm-up
    change(seed=1)
    monkeypatch.setattr(report, "draw", lambda *_: None)
    twice = f"{other}/../{other.name}"  # the same folder: counted twice it would make the deviation small
    monkeypatch.setattr(sys, "argv", ["report", str(run_folder), str(other), twice, str(tmp_path / "no such run")])
    report.main()
    said = capsys.readouterr()
    assert "over 2 runs" in said.out and "| warm-up | 25.0 ± 0.0 |" in said.out and "| dpo-st/round-1 | 75.0 |" in said.out
    assert "no such run: there is no run" in said.err
    change(decode_batch_size=7, timeout=7, device="cuda")  # limits of memory and time make no other kind
    stored = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({name: value for name, value in stored.items() if name != "rewrite"}))  # an older version
    with pytest.raises(SystemExit) as ended:
        run.parse_args(["--report", str(run_folder), str(other), "--out", str(tmp_path / "pictures")])
    assert ended.value.code is None and "over 2 runs" in capsys.readouterr().out and (tmp_path / "pictures" / "sft-loss.svg").exists()
    for what, back in (({"bf16": True}, {"bf16": False}), ({"beta": 7.0}, {})):  # three digits are another kind
        change(**what)
        with pytest.raises(SystemExit, match="more than the seed"):
            report.main()
        change(**back)


def test_a_run_that_has_only_warmed_up_has_a_report_too(run_folder, monkeypatch, capsys):
    """The longest run is the one whose curves one wants to see before it ends."""
    sums = (run_folder / "sha256sums.txt").read_text().splitlines(keepends=True)
    (run_folder / "sha256sums.txt").write_text("".join(line for line in sums if "warm-up" in line))
    monkeypatch.setattr(sys, "argv", ["report", str(run_folder)])
    report.main()
    assert "| warm-up | 25.0 |" in capsys.readouterr().out and (run_folder / "figures" / "sft-loss.svg").exists()


def test_pictures_are_drawn_or_it_is_said_what_they_need(run_folder, monkeypatch, capsys):
    """matplotlib is optional: tables come without it. The same run gives the same SVG to the byte."""
    monkeypatch.setattr(sys, "argv", ["report", str(run_folder)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main()
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["report", str(run_folder)])
    report.main()
    assert "matplotlib" not in capsys.readouterr().err
    pictures = {path.name: path.read_bytes() for path in (run_folder / "figures").glob("*.svg")}
    names = {"accuracy-per-round", "calculator", "dpo-step", "dpo-curves", "sft-loss"}
    assert set(pictures) == {f"{name}.svg" for name in names} and len(list((run_folder / "figures").glob("*.png"))) == 5
    report.main()
    assert pictures == {path.name: path.read_bytes() for path in (run_folder / "figures").glob("*.svg")}


def test_right_names_by_wrong_steps_are_told_apart(tmp_path, capsys):
    """Four rationales, three with the right name, one of them by the right steps; where one is skipped, the name is luck. A run in
    which no name is right is no error, nor one that is not finished; one of other problems is, for it would count as all wrong."""
    question = "Tom is taller than Ana. Ida is taller than Tom. Ben is shorter than Ida. Who is the tallest?"
    steps = [f"{a} is taller than {b}, so {a} is the tallest." for a, b in (("Tom", "Ana"), ("Ida", "Tom"), ("Ida", "Ben"))]
    texts = [" ".join(part) for part in ([*steps, "#### Ida"], [*steps[1:], "#### Ida"], [*steps[::-1], "#### Ida"], [*steps, "#### Tom"])]

    def write(name: str, **row) -> None:
        rows = [{"question": question, "answer": "Ida", "rationales": texts, "finished": [True, True, True, False], **row}]
        write_jsonl(rows, tmp_path / name)

    write("a/samples-for-pairs.jsonl")
    write("b/samples-for-pairs.jsonl", rationales=texts[3:], finished=[False])
    write("b/st/evaluation.jsonl")
    tallest.compare([tmp_path / "a", tmp_path / "b"])
    assert capsys.readouterr().out.splitlines() == [
        "samples-for-pairs.jsonl", "  cut at the limit: 62.5 % (25.0, 100.0)", "  right name, of those that end: 100.0 % (100.0, none)",
        "  right steps, of those with the right name: 33.3 % (33.3, none)",
        "st/evaluation.jsonl", "  cut at the limit: 25.0 %", "  right name, of those that end: 100.0 %",
        "  right steps, of those with the right name: 33.3 %",
    ]  # fmt: skip
    write("b/st/evaluation.jsonl", question="How many are 2 + 3?", answer=5.0)
    with pytest.raises(ValueError, match="is of other problems: 'How many are"):
        tallest.compare([tmp_path / "b"])
    with pytest.raises(ValueError, match="nothing has neither samples nor an evaluation: name the folders of runs"):
        tallest.compare([tmp_path / "a", tmp_path / "nothing"])
