"""Decoding speed against transformers' `generate` and CTranslate2: same questions, weights, threads; turns taken.

    python -m tests.bench.decode [--quick] [--cases 1 2 ...] [--vocabulary DIR] [--questions FILE] [--checkpoint DIR]
    python -m tests.bench.decode --cases 7 ...      # in bf16 on a CPU, where that has instructions for it
    python -m tests.bench.decode --device cuda [--sizes base large] [--batches 32 96 256 512] ...      # case 9, in bf16

Without files: the vocabulary of data/tiny and synthetic problems. With them: Flan-T5's spiece.model, GSM8K's test.jsonl,
and for case 8 a checkpoint that writes rationales. Weights are random otherwise, for speed does not depend on them.
Figures are medians; in brackets the smallest and largest ratio of two neighbouring runs. A peer that is not installed
is left out, and said so.
"""

import argparse
import itertools
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from calculator import calculate
from data.problems import Problem, load_problems
from data.synthetic import make_problems
from decode import KVCache, RowState, generate
from model import SIZES, T5, Linear, decoding, load_flan_t5, save_flan_t5
from tokenizer import EOS_ID, MAX_QUESTION, Tokenizer, format_rationale, pad_batch

try:
    import transformers
except ModuleNotFoundError:
    transformers = None
try:
    import ctranslate2
    import google.protobuf  # noqa: F401 (its converter reads the vocabulary with this)
except ModuleNotFoundError:
    ctranslate2 = None

PEERS = ("transformers", "CTranslate2")
TINY = Path(__file__).parents[2] / "data" / "tiny"


# ------------------------------------------------------------------------------------------------------------ the peer


class ReReadingCalculator:
    """The calculator as the paper describes it for `generate`: at every step the text of every row is read again."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.queues, self.seconds, self.steps = tokenizer, {}, 0.0, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        for row, ids in enumerate(input_ids[:, 1:].tolist()):
            if not self.queues.get(row):
                text = "".join(map(self.tokenizer.piece, ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids))
                found = re.search(r"\[([^\[\]=]*)=$", text)
                result = calculate(found[1]) if found and EOS_ID not in ids else None
                self.queues[row] = self.tokenizer.encode(f"{result}]")[:-1] if result is not None else []
            if self.queues[row]:
                forced = self.queues[row].pop(0)
                scores[row] = -torch.inf
                scores[row, forced] = 0
        self.seconds += time.perf_counter() - began
        self.steps += 1
        return scores


class Script:
    """Give all the score to the next id of a script, one per row: every system then writes the same text."""

    def __init__(self, scripts: list[list[int]]):
        self.scripts = scripts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - 1
        ids = [script[at] if at < len(script) else EOS_ID for script in self.scripts]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(ids)[:, None], 0.0)


def load_peer(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """The checkpoint in transformers' hands, None where that is not installed."""
    return transformers and transformers.T5ForConditionalGeneration.from_pretrained(folder).to(device, dtype).eval()


# ------------------------------------------------------------------------------------------------------- the measuring


def take_turns(systems: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Run each system once, then again in the same order, repeats times: seconds by system."""
    seconds = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def show(label: str, tokens: int, seconds: dict[str, list[float]], floor: float | None = None, peers: tuple = PEERS) -> None:
    """Print one row of the table: our speed, how many times faster that is than each peer, and the floor's share."""
    cells = [label, f"{tokens / statistics.median(seconds['ours']):,.0f}"]
    for peer in peers:
        ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds.get(peer, []))]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
    if peers is PEERS:
        cells.append(f"{100 * floor / statistics.median(seconds['ours']):.0f} %" if floor else "")
    print(f"| {' | '.join(cells)} |", flush=True)


def ceilings(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[float, float]:
    """This machine's numbers: floating-point operations and bytes read per second, with the threads or the GPU at hand."""
    wide = 1024 if device == "cpu" else 8192
    x, weight = torch.randn(2 * wide, wide, dtype=dtype, device=device), Linear(wide, wide).to(device, dtype)
    memory = torch.randn(2**26 if device == "cpu" else 2**30, dtype=dtype, device=device)
    ready = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    with torch.inference_mode(), decoding(weight):
        operations = statistics.median(take_turns({"": lambda: (weight(x), ready())}, 20)[""])
        reading = statistics.median(take_turns({"": lambda: (memory.sum(), ready())}, 10)[""])
    return 2 * x.numel() * wide / operations, memory.nbytes / reading


class Floor:
    """The least time for some generation: the larger of operations / ceiling and bytes / ceiling, step by step.

    Counted are the products with the weights and with keys and values, and the reading of weights, keys and values
    without padding. One slot's step at age t reads t + S positions of keys and values.
    """

    def __init__(self, model: T5):
        c = model.config
        self.flops, self.bandwidth = ceilings(model.shared.weight.dtype, model.device.type)
        self.itemsize = model.shared.weight.itemsize
        cross = 2 * c.n_layers * c.d_model * c.n_heads * c.d_kv  # the matrices of its keys and values: once per question
        self.decoder = sum(p.numel() for part in (model.decoder, model.lm_head) for p in part.parameters()) - cross
        self.encoder = sum(p.numel() for p in model.encoder.parameters()) + cross
        self.position = 2 * c.n_layers * c.n_heads * c.d_kv  # numbers of keys and values per position

    def seconds(self, sources: list[int], lengths: list[int], slots: int, n_samples: int = 1) -> float:
        """sources: tokens of each question; lengths: of each rationale, n_samples for each question; slots: at a time."""
        steps = max(max(lengths), sum(lengths) / slots)
        positions = sum(length * (length / 2 + source) for source, length in zip(sources * n_samples, lengths, strict=True))
        operations = 2 * (sum(lengths) * self.decoder + positions * self.position)
        numbers = steps * self.decoder + positions * self.position
        return 2 * sum(sources) * self.encoder / self.flops + max(operations / self.flops, self.itemsize * numbers / self.bandwidth)


def build(size: str, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> T5:
    """A checkpoint with random weights that never chooses EOS: a logit of 0 is not the largest of thousands."""
    torch.manual_seed(0)
    model = T5(SIZES[size])
    model.lm_head.weight.data[EOS_ID] = 0
    save_flan_t5(model, folder)
    return load_flan_t5(folder, dtype, device)


def gold(problems: list[Problem], tokenizer: Tokenizer, n: int) -> tuple[list[str], list[list[int]]]:
    """The first n problems whose gold annotations are all what the calculator prints, with their rationales' ids."""
    questions, scripts = [], []
    for problem in problems:
        ids = tokenizer.encode(format_rationale(problem.rationale))
        row = RowState(tokenizer, calculator=True)
        for i in ids:
            row.take(i)
        if row.sample.ids == ids[:-1] and len(questions) < n:
            questions.append(problem.question)
            scripts.append(ids)
    return questions, scripts


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the most (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure_memory(folder: Path, vocabulary: Path, questions: list[str], batch: int, tokens: int, out) -> None:
    """In a process of its own: how much generate adds to the peak of resident memory, and what the formula says."""
    torch.set_flush_denormal(True)
    model, tokenizer = load_flan_t5(folder), Tokenizer(vocabulary)
    options = dict(max_new_tokens=tokens, calculator=False, batch_size=batch)
    generate(model, tokenizer, questions[:1], max_new_tokens=2)  # libraries and threads are up
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident now
    before = resident("VmRSS")
    generate(model, tokenizer, questions, **options)
    grown = resident("VmHWM") - before
    longest = max(len(tokenizer.encode(question, MAX_QUESTION)) for question in questions)
    c, whole = model.config, -(-tokens // KVCache.BLOCK) * KVCache.BLOCK
    slots = min(batch, len(questions)) * 4 * (2 * c.n_layers * c.n_heads * c.d_kv * (whole + longest) + c.vocab_size)
    weights = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, Linear))
    out.send((grown, slots, weights))


# --------------------------------------------------------------------------------------------------------- the cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens, questions and repeats: about three minutes")
    cases = "1 greedy, 2 gold rationales, 3 five samples, 4 the calculator's cost, 5 waste, 6 base, 7 bf16, 8 all questions, 9 one GPU, alone"
    parser.add_argument("--cases", type=int, nargs="*", choices=range(1, 10), default=[1, 2, 3, 4, 5, 6, 8], help=cases)
    parser.add_argument("--vocabulary", type=Path, default=TINY, help="folder with spiece.model")
    parser.add_argument("--questions", type=Path, help="JSONL of problems with rationales; default: synthetic ones")
    parser.add_argument("--checkpoint", type=Path, help="for case 8: a checkpoint that writes rationales")
    parser.add_argument("--repeats", type=int, help="default 5, or 2 with --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: case 9 only, in bf16")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="for case 9: base large, for case 7: small base")
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 96, 256, 512], help="for case 9")
    parser.add_argument("--figure", type=Path, help="only draw speed over batch size into this file (matplotlib)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    torch.set_flush_denormal(True)
    one_gpu = args.device == "cuda" or 9 in args.cases
    quick, repeats = args.quick, args.repeats or (2 if args.quick else 5)
    tokens = 32 if quick else 128
    tokenizer = Tokenizer(args.vocabulary)
    problems = load_problems(args.questions) if args.questions else make_problems(1400, seed=0)
    questions = [problem.question for problem in problems]
    versions = [f"{name} {module.__version__ if module else 'not installed: left out'}"
                for name, module in (("transformers", transformers), ("ctranslate2", ctranslate2))]  # fmt: skip
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, load "
          f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, {', '.join(versions)}, {'bf16' if one_gpu else 'fp32 but for case 7' if 7 in args.cases else 'fp32'}, {repeats} turns")  # fmt: skip
    if transformers:
        transformers.logging.set_verbosity_error()
    if one_gpu:
        return gpu_table(args, tokenizer, questions[: 64 if quick else 1319], 32 if quick else 110, repeats)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        small = build("small", Path(scratch) / "small")
        bench = Bench(small, load_peer(Path(scratch) / "small"), tokenizer, repeats)
        print(f"ceilings measured here: {bench.floor.flops / 1e9:.0f} GFLOP/s, {bench.floor.bandwidth / 1e9:.0f} GB/s\n")
        if args.figure:
            return bench.figure(*gold(problems, tokenizer, 64), args.figure)
        if set(args.cases) - {7}:
            print(f"| case | tokens/s | {' | '.join(f'times as fast as {peer}' for peer in PEERS)} | share of the floor |")
            print("|---|---|---|---|---|")
        for case in args.cases:
            if case == 1:
                folders = (Path(scratch) / "small", args.vocabulary) if ctranslate2 and transformers else None
                bench.forced("1  greedy, batch 32", questions[:32], 32, tokens, folders)
                bench.forced("1  greedy, batch 1", questions[:2], 1, tokens)
            elif case == 2:
                bench.scripted(*gold(problems, tokenizer, 16 if quick else 64), 32)
            elif case == 3:
                bench.samples(questions[: 8 if quick else 32], 5, tokens)
            elif case == 4:
                bench.calculator_cost(*gold(problems, tokenizer, 64))
            elif case == 5:
                bench.waste(*gold(problems, tokenizer, 32 if quick else 64), Path(scratch) / "small", args.vocabulary, tokens)
            elif case == 6 and not quick:
                base = build("base", Path(scratch) / "base")
                Bench(base, load_peer(Path(scratch) / "base"), tokenizer, repeats).forced("6  base, greedy, batch 16", questions[:16], 16, tokens)
            elif case == 7 and not quick:
                bf16_table(args, tokenizer, questions, gold(problems, tokenizer, 64), tokens, repeats)
            elif case == 8 and args.checkpoint:
                model, tokenizer_8 = load_flan_t5(args.checkpoint), Tokenizer(args.checkpoint)
                last = Bench(model, load_peer(args.checkpoint), tokenizer_8, 1)
                last.everything(questions[: 64 if quick else None])
                bench.notes += last.notes
            else:
                bench.notes.append(f"{case}  left out: it needs {'--checkpoint' if case == 8 else 'more time than --quick has'}")
        print(*bench.notes, sep="\n")


def gpu_table(args: argparse.Namespace, tokenizer: Tokenizer, questions: list[str], tokens: int, repeats: int) -> None:
    """Case 9: so many tokens for every question, calculator on, in bf16 on a GPU (or on this CPU, to try the table)."""
    cuda = args.device == "cuda"
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, bf16, {len(questions)} questions, {tokens} tokens each\n\n"
          "| size, batch | tokens/s | ms a step | times the floor | time with / without calculator | "
          "times as fast as transformers re-reading its texts | without calculators |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for size in args.sizes or ("base", "large"):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            model = build(size, Path(folder), torch.bfloat16, args.device)
            bench = Bench(model, load_peer(Path(folder), torch.bfloat16, args.device), tokenizer, repeats)
            print(f"| {size}: ceilings {bench.floor.flops / 1e12:.2f} TFLOP/s, {bench.floor.bandwidth / 1e9:,.0f} GB/s | | | | | | |")
            for batch in args.batches:
                options = dict(max_new_tokens=tokens, do_sample=False)
                systems = {on: lambda on=on: bench.ours(questions, batch, max_new_tokens=tokens, calculator=on) for on in (True, False)}
                if bench.peer and batch == 96:  # one turn of it is minutes; fewer questions are as good for its speed
                    few = questions[: 2 * batch]
                    systems["re-reading"] = lambda: bench.theirs(few, batch, lambda at: [ReReadingCalculator(tokenizer)], **options)
                    systems["plain"] = lambda: bench.theirs(few, batch, **options)
                bench.ours(questions[:batch], batch, max_new_tokens=4)  # warm
                seconds = {name: statistics.median(spent) for name, spent in take_turns(systems, repeats).items()}
                steps, floor = tokens * max(1, len(questions) / batch), bench.floor.seconds(bench.sources(questions), [tokens] * len(questions), batch)
                ratios = [f"{seconds[peer] / len(few) / (seconds[on] / len(questions)):.1f}" if peer in seconds else ""
                          for peer, on in (("re-reading", True), ("plain", False))]  # fmt: skip
                print(f"| {size}, {batch} | {tokens * len(questions) / seconds[True]:,.0f} | {1000 * seconds[True] / steps:.2f} | "
                      f"{seconds[True] / floor:.1f} | {seconds[True] / seconds[False]:.3f} | {' | '.join(ratios)} |", flush=True)  # fmt: skip
    if args.checkpoint:
        agreement(args.checkpoint, args.device, questions)


def agreement(checkpoint: Path, device: str, questions: list[str]) -> None:
    """How alike the greedy ids are in bf16 and fp32, in batches of 96 and 32, and on a GPU recorded and eager."""
    written, cuda = {}, device == "cuda"
    for dtype, batch in ((torch.float32, 96), (torch.bfloat16, 96), (torch.bfloat16, 32)):
        model = load_flan_t5(checkpoint, dtype, device)
        for graph in (True, False)[not cuda :]:
            rows = generate(model, Tokenizer(checkpoint), questions, batch_size=batch, graph=graph)
            written[dtype, batch, graph] = [[*row[0].ids, EOS_ID] for row in rows]

    def alike(a: tuple, b: tuple) -> str:
        pairs = list(zip(written[a], written[b], strict=True))
        before = sum(len(list(itertools.takewhile(lambda ids: ids[0] == ids[1], zip(x, y)))) for x, y in pairs)
        return f"{100 * statistics.mean(x == y for x, y in pairs):.1f} % of texts, {100 * before / sum(len(x) for x, _ in pairs):.1f} % of ids"

    fp32, bf16, small = ((torch.float32, 96, cuda), (torch.bfloat16, 96, cuda), (torch.bfloat16, 32, cuda))
    print(f"\nEqual up to the first other id: bf16 and fp32 {alike(fp32, bf16)}; bf16 at batch 96 and 32 {alike(bf16, small)}"
          + (f"; recorded and eager in fp32 {alike(fp32, (*fp32[:2], False))}" if cuda else ""))  # fmt: skip


def bf16_table(args: argparse.Namespace, tokenizer: Tokenizer, questions: list[str], golden: tuple, tokens: int, repeats: int) -> None:
    """Case 7: in bf16 on a CPU, against our own fp32 and against transformers in both."""
    peers = ("ours in fp32", "transformers in fp32", "transformers in bf16")
    print(f"\n| in bf16 | tokens/s | {' | '.join(f'times as fast as {peer}' for peer in peers)} |\n|---|---|---|---|---|")
    for size in args.sizes or ("small", "base"):
        with tempfile.TemporaryDirectory() as folder:
            both = []
            for dtype in (torch.float32, torch.bfloat16):
                both.append(Bench(build(size, Path(folder), dtype), load_peer(Path(folder), dtype), tokenizer, repeats))
            greedy, (asked, scripts) = dict(max_new_tokens=tokens, do_sample=False), golden
            drawn = dict(max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=50, num_return_sequences=5)
            script = lambda at: [Script(scripts[at : at + 32]), ReReadingCalculator(tokenizer)]
            batch = 32 if size == "small" else 16
            jobs = [
                (f"{size}, batch {batch}, {tokens} tokens each, calculator off", batch * tokens,
                 lambda bench: bench.ours(questions[:batch], batch, max_new_tokens=tokens, calculator=False),
                 lambda bench: bench.theirs(questions[:batch], batch, **greedy)),
                (f"{size}, batch 1, {tokens} tokens, calculator off", 2 * tokens,
                 lambda bench: bench.ours(questions[:2], 1, max_new_tokens=tokens, calculator=False),
                 lambda bench: bench.theirs(questions[:2], 1, **greedy)),
                (f"{size}, {len(asked)} gold rationales, calculator on, batch 32", sum(map(len, scripts)),
                 lambda bench: bench.ours(asked, 32, process=bench.follow(scripts)),
                 lambda bench: bench.theirs(asked, 32, script, max_new_tokens=300, do_sample=False)),
                (f"{size}, 5 samples of 32 questions", 160 * tokens,
                 lambda bench: bench.ours(questions[:32], 160, n_samples=5, temperature=0.7, max_new_tokens=tokens),
                 lambda bench: bench.theirs(questions[:32], 32, **drawn)),
            ]  # fmt: skip
            for label, total, ours, theirs in jobs if size == "small" else jobs[:1]:
                systems = {"ours": lambda: ours(both[1]), peers[0]: lambda: ours(both[0])}
                if transformers:
                    systems |= {peers[1]: lambda: theirs(both[0]), peers[2]: lambda: theirs(both[1])}
                take_turns(systems, 1)  # warm
                show(label, total, take_turns(systems, min(repeats, 3)), peers=peers)
    if args.checkpoint:
        agreement(args.checkpoint, "cpu", questions)


class Bench:
    """One model in our hands and in the peer's, and the cases that are measured on it."""

    def __init__(self, model: T5, peer, tokenizer: Tokenizer, repeats: int):
        self.model, self.peer, self.tokenizer, self.repeats = model, peer, tokenizer, repeats
        self.floor = Floor(model)
        self.notes: list[str] = []  # what does not fit into the table

    def ours(self, questions: list[str], batch: int, **options) -> list[list]:
        return generate(self.model, self.tokenizer, questions, batch_size=batch, **options)

    def theirs(self, questions: list[str], batch: int, processors=None, **options) -> list[list[int]]:
        """transformers' generate, batch by batch; processors(at) gives the logits processors for questions[at:]."""
        rows = []
        for at in range(0, len(questions), batch):
            ids, mask = pad_batch([self.tokenizer.encode(question, MAX_QUESTION) for question in questions[at : at + batch]])
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            chosen = transformers.LogitsProcessorList(processors(at) if processors else [])
            out = self.peer.generate(input_ids=ids, attention_mask=mask, num_beams=1, logits_processor=chosen, **options)
            rows += [row[1 : row.index(EOS_ID) if EOS_ID in row else None] for row in out.tolist()]
        return rows

    def sources(self, questions: list[str]) -> list[int]:
        return [len(self.tokenizer.encode(question, MAX_QUESTION)) for question in questions]

    def forced(self, label: str, questions: list[str], batch: int, tokens: int, ctranslate2_folders=None) -> None:
        """Greedy, every rationale exactly `tokens` long, no calculator."""
        systems = {"ours": lambda: self.ours(questions, batch, max_new_tokens=tokens, calculator=False)}
        if self.peer:
            systems["transformers"] = lambda: self.theirs(questions, batch, max_new_tokens=tokens, do_sample=False)
        if ctranslate2_folders:
            context = get_context("spawn")
            pipe, theirs = context.Pipe()
            pieces = [[*self.tokenizer.pieces.encode(q, out_type=str)[: MAX_QUESTION - 1], "</s>"] for q in questions]
            options = dict(beam_size=1, min_decoding_length=tokens, max_decoding_length=tokens, max_batch_size=batch)
            arguments = (*ctranslate2_folders, pieces, options, torch.get_num_threads(), theirs)
            context.Process(target=serve_ctranslate2, args=arguments, daemon=True).start()
            theirs.close()  # so that recv ends should the process die
            systems["CTranslate2"] = lambda: pipe.send(True) or pipe.recv()
        for name, run in systems.items():  # once to warm up, and to see that all write as much
            written = run()
            total = written if name == "CTranslate2" else sum(len(row if name != "ours" else row[0].ids) for row in written)
            assert total == tokens * len(questions), (name, total)
        floor = self.floor.seconds(self.sources(questions), [tokens] * len(questions), batch)
        show(f"{label}, {tokens} tokens", tokens * len(questions), take_turns(systems, self.repeats), floor)
        if ctranslate2_folders:
            pipe.send(False)

    def follow(self, scripts: list[list[int]], count: list[int] | None = None) -> Callable:
        """Our counterpart of Script: the same scores, for whichever rows sit in the slots."""

        def process(logits: torch.Tensor, rows: list) -> torch.Tensor:
            ids = [EOS_ID] * len(rows)
            for slot, row in enumerate(rows):
                if row and len(row.sample.ids) < len(scripts[row.question]):
                    ids[slot] = scripts[row.question][len(row.sample.ids)]
            if count is not None:
                count.append(len(rows))
            return torch.full_like(logits, -torch.inf).scatter_(1, torch.tensor(ids)[:, None], 0.0)

        return process

    def scripted(self, questions: list[str], scripts: list[list[int]], batch: int) -> None:
        """Real lengths with the calculator: every system writes the gold rationales."""
        written = {}

        def ours() -> None:
            rows = self.ours(questions, batch, process=self.follow(scripts))
            written["ours"] = [[*row[0].ids, EOS_ID] for row in rows]

        def theirs() -> None:
            rows = self.theirs(
                questions, batch, lambda at: [Script(scripts[at : at + batch]), ReReadingCalculator(self.tokenizer)],
                max_new_tokens=300, do_sample=False,
            )  # fmt: skip
            written["transformers"] = [[*row, EOS_ID] for row in rows]

        systems = {"ours": ours, **({"transformers": theirs} if self.peer else {})}
        take_turns(systems, 1)  # warm
        seconds = take_turns(systems, self.repeats)
        assert all(rows == scripts for rows in written.values()), "a system left the script"
        lengths = [len(script) for script in scripts]
        show(f"2  gold rationales, calculator, {len(questions)} questions, batch {batch}", sum(lengths), seconds,
             self.floor.seconds(self.sources(questions), lengths, batch))  # fmt: skip

    def samples(self, questions: list[str], n: int, tokens: int) -> None:
        """K samples of every question at temperature 0.7, top-k 50."""
        options = dict(max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=50)

        def authors() -> None:
            for _ in range(n):
                self.theirs(questions, 32, lambda at: [ReReadingCalculator(self.tokenizer)], **options)

        systems = {"ours": lambda: self.ours(questions, n * len(questions), n_samples=n, temperature=0.7, max_new_tokens=tokens)}
        if self.peer:
            systems["passes"] = authors
            systems["transformers"] = lambda: self.theirs(questions, 32, num_return_sequences=n, **options)
        floor = self.floor.seconds(self.sources(questions), [tokens] * len(questions) * n, n * len(questions), n)
        seconds, label = take_turns(systems, min(self.repeats, 3)), f"3  {n} samples of {len(questions)} questions at once"
        show(f"{label}, peer: num_return_sequences", n * tokens * len(questions), seconds, floor)
        if self.peer:
            seconds["transformers"] = seconds["passes"]
            show(f"{label}, peer: {n} passes of 32, with calculator", n * tokens * len(questions), seconds, floor)

    def calculator_cost(self, questions: list[str], scripts: list[list[int]]) -> None:
        """Milliseconds per step of 32 rows that the calculator takes: measured alone, and as with against without."""
        rows = [RowState(self.tokenizer, on) for on in (True, False) for _ in range(32)]
        spent = {True: 0.0, False: 0.0}
        for step in range(100):
            for on in (True, False):
                began = time.perf_counter()
                for row, script in zip(rows[: 32] if on else rows[32:], scripts):
                    row.take(script[step] if step < len(script) else EOS_ID + 5)
                spent[on] += time.perf_counter() - began
        self.notes.append(f"4  the calculator takes {(spent[True] - spent[False]) * 10:.3f} ms a step of 32 rows")
        if self.peer:
            reader = ReReadingCalculator(self.tokenizer)
            self.theirs(questions[:32], 32, lambda at: [Script(scripts[:32]), reader], max_new_tokens=100, do_sample=False)
            self.notes[-1] += f", re-reading the text {1000 * reader.seconds / reader.steps:.3f} ms"
        systems = {on: lambda on=on: self.ours(questions[:32], 32, process=self.follow(scripts), calculator=on) for on in (True, False)}
        seconds = take_turns(systems, self.repeats)
        self.notes[-1] += f"; time with / without it {statistics.median(a / b for a, b in zip(*seconds.values())):.3f}"

    def waste(self, questions: list[str], scripts: list[list[int]], folder: Path, vocabulary: Path, tokens: int) -> None:
        """Steps against the least possible, and memory against its formula."""
        for slots in (32, 16):
            count, total = [], sum(map(len, scripts))
            self.ours(questions, slots, process=self.follow(scripts, count))
            self.notes.append(f"5  {slots} slots: {len(count)} steps for {total} tokens, {len(count) / (total / slots):.2f} times "
                              f"tokens / slots; rows computed per token {sum(count) / total:.2f}")  # fmt: skip
        if not Path("/proc/self/clear_refs").exists():
            return
        context = get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=measure_memory, args=(folder, vocabulary, questions[:32], 32, tokens, send))
        process.start()
        send.close()  # so that recv ends should the process die
        grown, slots, weights = receive.recv()
        process.join()
        self.notes.append(f"5  32 slots, {tokens} tokens: peak memory grows by {grown / 2**20:.0f} MiB, {grown / (slots + weights):.2f} "
                          f"of the formula ({slots / 2**20:.0f} for slots, {weights / 2**20:.0f} for packed weights)")  # fmt: skip

    def everything(self, questions: list[str]) -> None:
        """Greedy, calculator on, at most 300 tokens, from text to text; the rows in which the texts differ."""
        texts = {}

        def ours() -> None:
            texts["ours"] = [row[0].text for row in self.ours(questions, 32)]

        def theirs() -> None:
            rows = self.theirs(questions, 32, lambda at: [ReReadingCalculator(self.tokenizer)], max_new_tokens=300, do_sample=False)
            texts["transformers"] = [self.tokenizer.decode(row) for row in rows]

        seconds = take_turns({"ours": ours, **({"transformers": theirs} if self.peer else {})}, self.repeats)
        tokens = sum(len(self.tokenizer.encode(text)) for text in texts["ours"])
        show(f"8  {len(questions)} questions, text to text, batch 32", tokens, seconds)
        if self.peer:
            different = [i for i, (a, b) in enumerate(zip(texts["ours"], texts["transformers"])) if a != b]
            self.notes.append(f"8  texts that differ: {len(different)}")
            for i in different:
                start = max(len(os.path.commonprefix([found[i] for found in texts.values()])) - 40, 0)
                self.notes += [f"   question {i}, {name}: {found[i][start : start + 80]!r}" for name, found in texts.items()]

    def figure(self, questions: list[str], scripts: list[list[int]], path: Path) -> None:
        """Speed over batch size on the gold rationales, with and without calculator (compare the paper's figure 4)."""
        from matplotlib import pyplot

        sizes, curves = [1, 2, 4, 8, 16, 32], {}
        for batch in sizes:
            n = max(4, 2 * batch)
            some, total = questions[:n], sum(map(len, scripts[:n]))
            for on in (True, False):
                systems = {f"ours, {'with' if on else 'without'} calculator": lambda: self.ours(some, batch, calculator=on, process=self.follow(scripts))}
                if self.peer:
                    tools = [ReReadingCalculator] if on else []
                    systems[f"transformers, {'with' if on else 'without'} calculator"] = lambda: self.theirs(
                        some, batch, lambda at: [Script(scripts[at : at + batch]), *(tool(self.tokenizer) for tool in tools)],
                        max_new_tokens=300, do_sample=False,
                    )  # fmt: skip
                for name, seconds in take_turns(systems, 1).items():
                    curves.setdefault(name, []).append(total / statistics.median(seconds))
                    print(f"{name}, batch {batch}: {curves[name][-1]:,.0f} tokens/s", flush=True)
        axes = pyplot.figure(figsize=(6.4, 4)).subplots()
        for name, speeds in curves.items():
            own, dashed = name.startswith("ours"), "without" in name
            axes.plot(sizes, speeds, "o--" if dashed else "o-", color="#0072B2" if own else "#D55E00", label=name, mfc="white" if dashed else None)
        axes.set(xscale="log", yscale="log", xlabel="batch size (rationales at a time)", ylabel="speed (tokens per second)", xticks=sizes, xticklabels=sizes)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.legend(frameon=False, loc="lower right")
        axes.grid(alpha=0.3)
        axes.figure.savefig(path, bbox_inches="tight", dpi=160)


def serve_ctranslate2(folder: Path, vocabulary: Path, pieces: list[list[str]], options: dict, threads: int, pipe) -> None:
    """In a process of its own, so that its threads do not disturb ours: translate whenever asked."""
    source = folder.parent / "for-ctranslate2"
    shutil.copytree(folder, source)
    shutil.copy(vocabulary / "spiece.model", source)
    transformers.logging.set_verbosity_error()
    transformers.T5Tokenizer(str(source / "spiece.model"), legacy=True).save_pretrained(source)
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder.parent / "ct2"), force=True)
    translator = ctranslate2.Translator(
        str(folder.parent / "ct2"), inter_threads=1, intra_threads=threads, compute_type="float32"
    )
    while pipe.recv():
        pipe.send(sum(len(result.hypotheses[0]) for result in translator.translate_batch(pieces, **options)))


if __name__ == "__main__":
    main()
