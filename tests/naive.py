"""The slow twin of decode.generate: the same function, written without regard to speed."""

import torch

import decode
from decode import MAX_NEW_TOKENS, TOP_K, RowState, Sample
from model import START_ID, T5, shift_right
from tokenizer import MAX_QUESTION, Tokenizer


@torch.inference_mode()
def generate_naive(
    model: T5,
    tokenizer: Tokenizer,
    questions: list[str],
    n_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = TOP_K,
    max_new_tokens: int = MAX_NEW_TOKENS,
    calculator: bool = True,
    seed: int | str = 0,
) -> list[list[Sample]]:
    """One rationale at a time, without a cache: every token recomputes the full sequence."""
    model.eval()
    results = []
    for question in questions:
        input_ids = torch.tensor([tokenizer.encode(question, MAX_QUESTION)], device=model.device)
        samples = []
        for number in range(n_samples):
            noise = decode.uniform_noise(seed, question, number, max_new_tokens)
            row = RowState(tokenizer, calculator, Sample(), noise)
            while not row.done:
                written = row.sample.ids
                target = torch.tensor([[*written, START_ID]], device=model.device)  # shifted out
                logits = model(input_ids, torch.ones_like(input_ids), shift_right(target))[:, -1]
                u = torch.tensor([noise[len(written)]], device=model.device)
                row.take(decode.sample_next_token(logits, temperature, top_k, u).item())
            row.sample.text = tokenizer.decode(row.sample.ids)
            samples.append(row.sample)
        results.append(samples)
    return results
