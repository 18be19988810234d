"""One page about one run, to look at: RUN/report.html, one file without network or script.

The closing words, the tables of report.py, the pictures, and questions followed through all rounds:
every sample, which were dropped as duplicates of which, the pairs and pseudo-labels made of them,
and the answers to test questions after each round. Everything that comes from a run's files is
escaped.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from calculator import calculate
from data.problems import read_jsonl
from data.results import closing_words, make_table, mark_results, read_evaluations, rounds_with
from selftrain import jaccard, split_samples
from tokenizer import Tokenizer

PER_KIND = 3  # questions of each kind
KINDS = {  # a question is solved in a round if one of its samples for labels is correct
    "turned right": "not solved in the first round of the last method, solved in its last",
    "turned wrong": "solved in the first round of the last method, not in its last",
    "solved only by DPO-ST": "never by ST",
    "never solved": "in no round of either method",
    "solved twice": "in the first round and in the last",
}
CAPTIONS = {
    "accuracy-per-round": "Accuracy per round, as in the paper's figure 5",
    "calculator": "With and without the calculator, as in figure 7",
    "dpo-curves": "DPO in round 1: loss, rewards, and pairs in the right order",
    "sft-loss": "Loss of SFT",
}
CSS = """
:root { color-scheme: light dark; --line: #8884; --right: #0072b2; --wrong: #b34700; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
th { vertical-align: bottom; } td { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 5rem; max-width: 9rem; }
@media (prefers-color-scheme: dark) { :root { --right: #56b4e9; --wrong: #f0a070; } }
@media (max-width: 40rem) { .broad { overflow-x: auto; } .broad svg { width: 50rem; } }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: .5rem; background: white; color: black; } figure svg { width: 100%; height: auto; }
.broad { grid-column: 1 / -1; } figcaption { padding: 0 .5rem; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem; }
summary { cursor: pointer; } li { overflow-wrap: anywhere; } mark { background: #f0e44266; color: inherit; }
.right::before { content: "✓ "; color: var(--right); } .wrong::before { content: "✗ "; color: var(--wrong); }
.note { opacity: .75; font-size: .9em; }
"""


def text_of(rationale: str) -> str:
    """An escaped rationale with the calculator's results marked."""
    return marked(mark_results(rationale, calculate)) or "(nothing)"


def marked(text: str) -> str:
    """Escape a text, and highlight what is between « and »."""
    return re.sub("«(.*?)»", r"<mark>\1</mark>", html.escape(text))


def list_of(items: Sequence[tuple[str, str]], tag: str = "ul") -> str:
    """Items as (class, HTML)."""
    rows = "".join(f'<li class="{kind}">{text}</li>' for kind, text in items)
    return f"<{tag}>{rows}</{tag}>" if items else '<p class="note">none</p>'


def to_html(markdown: str) -> str:
    """A block of Markdown as HTML: a table, or lines followed by a list."""
    lines = [line for line in markdown.splitlines() if line]
    if lines[:1] and lines[0].startswith("|"):
        return table_of(lines)
    heads = [html.escape(line) for line in lines if not line.startswith("- ")]
    items = [("", marked(line[2:])) for line in lines if line.startswith("- ")]
    return (f"<p>{'<br>'.join(heads)}</p>" if heads else "") + (list_of(items) if items else "")


def table_of(lines: Sequence[str]) -> str:
    header, _, *body = [line[2:-2].split(" | ") for line in lines]
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    for row in body:
        cells += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="wide"><table><tr>{cells}</table></div>'


# ------------------------------------------------------------------- questions of U, round by round


def read_rounds(folder: Path) -> dict[str, dict]:
    """Of every round that is there: samples (rows of U), pairs and labels by question."""
    rounds = {}
    for stage in rounds_with(folder, "pseudo-labels.jsonl"):
        found = {"pairs": {}, "labels": {}}
        for name, file in (("pairs", "preference-pairs"), ("labels", "pseudo-labels")):
            path = folder / stage / f"{file}.jsonl"
            for row in read_jsonl(path) if path.exists() else ():
                found[name].setdefault(row["question"], []).append(row)
        for name in ("pairs", "labels"):
            path = folder / stage / f"samples-for-{name}.jsonl"
            found[f"samples for {name}"] = read_jsonl(path) if path.exists() else []
        rounds[stage] = found
    return rounds


def choose(rounds: dict[str, dict], n: int) -> dict[str, list[int]]:
    """Numbers of questions of U by what became of them (KINDS); those with pairs come first."""

    def solved(stage: str) -> list[bool]:
        return [any(row["correct"]) for row in rounds[stage]["samples for labels"]]

    methods = {}
    for stage in rounds:
        methods.setdefault(stage.partition("/")[0], []).append(solved(stage))
    last_method = list(methods.values())[-1]
    first, last = last_method[0], last_method[-1]  # of its rounds
    by_st = methods.get("st", [[False] * n])
    by_dpo = methods.get("dpo-st", [[False] * n])
    kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
    paired = {question for found in rounds.values() for question in found["pairs"]}
    rows = next(iter(rounds.values()))["samples for labels"]
    for i in sorted(range(n), key=lambda i: rows[i]["question"] not in paired):
        st_solves = any(rows[i] for rows in by_st)
        dpo_solves = any(rows[i] for rows in by_dpo)
        if not st_solves and not dpo_solves:
            kinds["never solved"].append(i)
        elif len(methods) > 1 and not st_solves:
            kinds["solved only by DPO-ST"].append(i)
        elif last[i] and not first[i]:
            kinds["turned right"].append(i)
        elif first[i] and not last[i]:
            kinds["turned wrong"].append(i)
        elif first[i]:
            kinds["solved twice"].append(i)
    return {kind: numbers[:PER_KIND] for kind, numbers in kinds.items()}


def judged(row: dict, purpose: str, tokenizer: Tokenizer, limit: float) -> str:
    """A question's samples of one stage: right or wrong, and which are too similar to a kept one.

    Wrong samples for labels are not used at all.
    """
    items = []
    kept: dict[bool, list[tuple[int, frozenset]]] = {True: [], False: []}
    seen = {text: row["rationales"].count(text) for text in row["rationales"]}
    for right, texts in zip((True, False), split_samples(list(seen), row["answer"])):
        for text in texts:
            pieces = tokenizer.piece_set(text)
            similar = [(jaccard(pieces, other), number) for number, other in kept[right]]
            closest, number = max(similar, default=(0.0, 0))
            note = f" × {seen[text]}" if seen[text] > 1 else ""
            if purpose == "labels" and not right:
                pass
            elif closest > limit:
                note += f"; dropped: {closest:.2f} similar to number {number}"
                note += " (the same pieces)" if closest == 1 else ""
            else:
                kept[right].append((len(items) + 1, pieces))
            items.append(
                ("right" if right else "wrong", f'{text_of(text)}<span class="note">{note}</span>')
            )
    return list_of(items, "ol")


def follow(i: int, rounds: dict[str, dict], tokenizer: Tokenizer, limit: float) -> str:
    """One question of U through all rounds of both methods."""
    parts = []
    for stage, found in rounds.items():
        for purpose in ("pairs", "labels"):
            rows = found[f"samples for {purpose}"]
            if not rows:
                continue
            row = rows[i]
            parts.append(f"<h4>{stage}: samples for {purpose}</h4>")
            parts.append(judged(row, purpose, tokenizer, limit))
            made = []
            for item in found[purpose].get(row["question"], ()):
                if purpose == "labels":
                    made.append(("right", text_of(item["rationale"])))
                    continue
                pair = [tokenizer.piece_set(item[name]) for name in ("chosen", "rejected")]
                made.append(("", f"similarity {jaccard(*pair):.2f}: {text_of(item['chosen'])} <b>over</b> "
                             f"{text_of(item['rejected'])}"))  # fmt: skip
            title = "preference pairs" if purpose == "pairs" else "pseudo-labels"
            parts.append(f'<p class="note">{title}, from all rounds so far:</p>{list_of(made)}')
    return "".join(parts)


def answers(evaluations: dict[str, list[dict]]) -> str:
    """Test questions whose answers changed, after every stage."""
    stages = list(evaluations)
    parts = []
    for rows in zip(*evaluations.values()):
        verdicts = [row["correct"][0] for row in rows]
        if len(set(verdicts)) == 1 or not rows[0]["calculator"]:
            continue
        items = []
        for stage, row in zip(stages, rows):
            kind = "right" if row["correct"][0] else "wrong"
            items.append((kind, f"{stage}: {text_of(row['rationales'][0])}"))
        title = html.escape(f"{rows[0]['test']}: {rows[0]['question']} ({rows[0]['answer']})")
        parts.append(f"<details><summary>{title}</summary>{list_of(items)}</details>")
        if len(parts) == 4 * PER_KIND:
            break
    return "".join(parts)


# --------------------------------------------------------------------------------------------- page


def write_page(folder: Path, config, blocks: Sequence[str], figures: Path) -> Path:
    """Write RUN/report.html. blocks: of report.main, Markdown. figures: a folder, if there is one."""
    evaluations = read_evaluations(folder)
    rounds = read_rounds(folder)
    tokenizer = Tokenizer(folder / "warm-up" / "sft")
    title = html.escape(f"Flan-T5 {config.size}, seed {config.seed}: {folder.name}")
    words = f"{make_table(evaluations, config)}\n{closing_words(evaluations, calculate)}"
    parts = [f"<h1>{title}</h1>", *map(to_html, words.strip().split("\n\n"))]
    parts += ["<h2>Tables</h2>", *map(to_html, blocks)]
    pictures = ""
    for path in sorted(figures.glob("*.svg")) if figures.is_dir() else ():
        picture = path.read_text(encoding="utf-8").partition("<svg")[2]
        opening, _, rest = picture.partition(">")
        name = html.escape(CAPTIONS.get(path.stem, path.stem))
        kind = "broad" if path.stem == "dpo-curves" else ""
        pictures += f'<figure class="{kind}"><svg{opening} role="img"><title>{name}</title>{rest}'
        pictures += f"<figcaption>{name}</figcaption></figure>"
    if pictures:
        parts.append(f'<h2>Pictures</h2><div class="panels">{pictures}</div>')
    if rounds:
        parts.append("<h2>Questions of U, followed through all rounds</h2>")
        parts.append("<p><mark>Highlighted</mark>: written by the calculator.</p>")
        rows = next(iter(rounds.values()))["samples for labels"]
        for kind, numbers in choose(rounds, len(rows)).items():
            if numbers:
                parts.append(f'<h3>{kind}</h3><p class="note">{KINDS[kind]}</p>')
            for i in numbers:
                summary = html.escape(f"{rows[i]['question']} ({rows[i]['answer']})")
                inner = follow(i, rounds, tokenizer, config.max_similarity)
                parts.append(f"<details><summary>{summary}</summary>{inner}</details>")
        parts.append("<h2>Test questions whose answers changed</h2>" + answers(evaluations))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = f"<!DOCTYPE html><html lang=en><head>{head}<style>{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"
