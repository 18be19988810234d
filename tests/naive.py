"""The slow twin of decode.generate: what it would write if it were written without any thought of speed."""

import itertools

import torch

import decode
from decode import MAX_NEW_TOKENS, TOP_K, RowState, Sample
from model import START_ID, T5, decoding, shift_right
from tokenizer import MAX_QUESTION, Tokenizer


@torch.inference_mode()
def generate_naive(
    model: T5, tokenizer: Tokenizer, questions: list[str], n_samples: int = 1, temperature: float = 0.0,
    top_k: int = TOP_K, max_new_tokens: int = MAX_NEW_TOKENS, calculator: bool = True, seed: int | str = 0,
) -> list[list[Sample]]:  # fmt: skip
    """The slow twin of `generate`: one rationale at a time, the whole sequence again for every token, no cache."""
    rows = [[RowState(tokenizer, calculator, i, k) for k in range(n_samples)] for i in range(len(questions))]
    with decoding(model):
        for row in itertools.chain(*rows):
            question = questions[row.question]
            input_ids = torch.tensor([tokenizer.encode(question, MAX_QUESTION)], device=model.device)
            noise = torch.from_numpy(decode.uniform_noise(seed, question, row.number, max_new_tokens)).to(model.device)
            while not row.sample.finished and (age := len(row.sample.ids)) < max_new_tokens:
                target = torch.tensor([[*row.sample.ids, START_ID]], device=model.device)  # the last is shifted out
                logits = model(input_ids, torch.ones_like(input_ids), shift_right(target))[:, -1]
                row.take(decode.sample_next_token(logits, temperature, top_k, noise[age : age + 1]).item())
            row.sample.text = tokenizer.decode(row.sample.ids)
    return [[row.sample for row in column] for column in rows]
