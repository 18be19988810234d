"""The peers of tests.bench.decode: the authors' calculator, transformers, CTranslate2.

This file also makes both sides write given rationales, so that they do the same work.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor

import decode
from calculator import calculate
from data.problems import Problem
from decode import RowState, Sample
from tokenizer import EOS_ID, MAX_QUESTION, MAX_RATIONALE, Tokenizer, format_rationale

try:
    import ctranslate2
    import google.protobuf  # noqa: F401 (its converter needs this to read the vocabulary)
except ModuleNotFoundError:
    ctranslate2 = None


class ReReadingCalculator:
    """A calculator like the authors': it re-reads the complete text of every row at every step."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.queues: dict[int, list[int]] = {}  # by row: ids still to be written

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(input_ids[:, 1:].tolist()):
            if EOS_ID in ids:
                continue
            if not self.queues.get(row):
                text = "".join(self.tokenizer.piece(i) for i in ids)
                found = re.search(r"\[([^\[\]=]*)=$", text)
                result = calculate(found[1]) if found else None
                if result is not None:
                    self.queues[row] = self.tokenizer.encode(f"{result}]")[:-1]  # without EOS
            if self.queues.get(row):
                scores[row] = -torch.inf
                scores[row, self.queues[row].pop(0)] = 0
        return scores


class Script:
    """For transformers: the next id of each row's script gets the largest score."""

    def __init__(self, scripts: list[list[int]]):
        self.scripts = scripts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        n_written = input_ids.shape[1] - 1
        for row, script in enumerate(self.scripts):
            scores[row, script[n_written] if n_written < len(script) else EOS_ID] = torch.inf
        return scores


@contextmanager
def scripted(scripts: dict[str, list[int]]):
    """For ours: the noise at a position encodes the id that the question's script has there.

    The model's own choice is still computed, so that its time counts, and then discarded.
    """
    real_choice = decode.sample_next_token

    def noise(seed: int, question: str, number: int, n: int) -> list[float]:
        script = (scripts[question] + [EOS_ID] * n)[:n]
        return [i / 2**15 for i in script]  # exact in fp32, and below 1

    def choose(logits: Tensor, temperature: float, top_k: int, noise: Tensor) -> Tensor:
        real_choice(logits, temperature, top_k, noise)
        return (noise * 2**15).long()

    with mock.patch.multiple(decode, uniform_noise=noise, sample_next_token=choose):
        yield


def gold_scripts(problems: list[Problem], tokenizer: Tokenizer, n: int) -> dict[str, list[int]]:
    """The ids of n gold rationales that the calculator would not change, by question."""
    scripts: dict[str, list[int]] = {}
    for problem in problems:
        ids = tokenizer.encode(format_rationale(problem.rationale), MAX_RATIONALE)
        row = RowState(tokenizer, True, Sample(), [])
        for i in ids:
            row.take(i)
        if row.sample.ids == ids[:-1] and len(scripts) < n:
            scripts[problem.question] = ids
    return scripts


def load_peer(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """Load the checkpoint into transformers."""
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    return model.to(device, dtype).eval()


def load_ctranslate2(folder: Path, tokenizer: Tokenizer, n_threads: int) -> Callable:
    """Load the checkpoint into CTranslate2; return a function that writes n_tokens per question."""
    converted = f"{folder}-converted"
    pieces = transformers.T5Tokenizer(str(folder / "spiece.model"), legacy=True)
    pieces.save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(converted)
    translator = ctranslate2.Translator(
        converted, inter_threads=1, intra_threads=n_threads, compute_type="float32"
    )

    def write(questions: list[str], n_tokens: int) -> list[Sample]:
        ids = [tokenizer.encode(question, MAX_QUESTION) for question in questions]
        source = [pieces.convert_ids_to_tokens(row) for row in ids]
        lengths = {"min_decoding_length": n_tokens, "max_decoding_length": n_tokens}
        samples = []
        for result in translator.translate_batch(source, beam_size=1, **lengths):
            row = pieces.convert_tokens_to_ids(result.hypotheses[0])
            samples.append(Sample(tokenizer.decode(row), row))
        return samples

    return write
