"""Direct preference optimisation (Rafailov et al., 2023; paper, section 2, eq. 5), written by hand.

Left out: how pairs are made (selftrain.py), other preference losses, label smoothing.

    python dpo.py        # one pair worked by hand"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import T5
from sft import IGNORE, Loss, Schedule, deal, micro_batches, place, token_logps, train
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch

@dataclass(frozen=True)
class PreferencePair:
    """A question, a rationale that reaches its answer, and one that does not."""
    question: str
    chosen: str
    rejected: str

@dataclass(frozen=True)
class PairExample:
    """A preference pair as ids, each ending in EOS, and the reference's log-probabilities of chosen and rejected."""
    input_ids: tuple[int, ...]
    chosen: list[int]
    rejected: list[int]
    reference_logps: tuple[float, float] = (torch.nan, torch.nan)

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.chosen) + len(self.rejected)

def make_pair_examples(pairs: Sequence[PreferencePair], tokenizer: Tokenizer) -> list[PairExample]:
    """Encode preference pairs; their reference log-probabilities come later."""
    encode, most = tokenizer.encode, MAX_RATIONALE
    return [PairExample(tuple(encode(p.question, MAX_QUESTION)), encode(p.chosen, most), encode(p.rejected, most)) for p in pairs]

def sequence_logps(model: T5, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
    """log pi(y|x) of the chosen and of the rejected rationales, each (B,) fp32.
    A SUM over target tokens, EOS included and padding excluded: the loss compares whole rationales, so a mean would favour
    long ones. Nothing is shifted here: the decoder's inputs already are. Every distinct question is encoded once."""
    questions = list(dict.fromkeys(pair.input_ids for pair in pairs))
    input_ids, attention_mask = (t.to(model.device) for t in pad_batch([list(ids) for ids in questions]))
    rows = torch.tensor([questions.index(pair.input_ids) for pair in pairs] * 2, device=model.device)  # (2B,)
    labels, _ = pad_batch([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], IGNORE)
    states = model.encode(input_ids, attention_mask)
    logps = token_logps(model, states[rows], attention_mask[rows], labels.to(model.device)).sum(-1)  # (2B,)
    return logps.chunk(2)

def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, chosen rewards and rejected rewards per pair, from four log-probabilities per pair, all (B,).

        r(y|x) = beta * (log pi(y|x) - log pi_ref(y|x)),    loss = -log sigmoid(r(y_w|x) - r(y_l|x))
    Source: paper, section 2, eq. 5."""
    chosen_rewards = beta * (chosen_logps - reference_chosen)
    rejected_rewards = beta * (rejected_logps - reference_rejected)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards

def pair_loss(model: T5, pairs: Sequence[PairExample], beta: float) -> dict[str, Tensor]:
    """The loss of some pairs and the numbers that explain it, each summed over the pairs."""
    reference = torch.tensor([pair.reference_logps for pair in pairs], device=model.device)  # (B, 2)
    losses, chosen, rejected = dpo_loss(*sequence_logps(model, pairs), *reference.unbind(-1), beta)
    margin, right = chosen - rejected, (chosen > rejected).float()
    rewards = {"chosen_rewards": chosen, "rejected_rewards": rejected, "reward_margin": margin, "reward_accuracy": right}
    return {name: value.sum() for name, value in {"loss": losses, **rewards}.items()}

@torch.no_grad()
def add_reference_logps(reference: T5, pairs: Sequence[PairExample], schedule: Schedule) -> list[PairExample]:
    """Score every pair with the reference once, before training, dropout off: no second model is held afterwards."""
    score_pairs = lambda model, pairs: torch.stack(sequence_logps(model, pairs), -1).tolist()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]), reverse=True)  # that of micro_batches
    pieces = micro_batches([pairs[i] for i in order], schedule.micro_batch_tokens)
    logps = dict(zip(order, sum(deal(pieces, Loss(reference.eval(), score_pairs, schedule.bf16), "reference"), [])))
    return [replace(pair, reference_logps=tuple(logps[i])) for i, pair in enumerate(pairs)]

@torch.no_grad()
def score(loss: nn.Module, pairs: Sequence[PairExample], max_tokens: int) -> dict[str, float]:
    """Mean loss, rewards, margin and accuracy over pairs, without training on them; {} without pairs."""
    pieces = micro_batches(pairs, max_tokens)
    turns = pieces + pieces[:1] * (-len(pieces) % place()[1])  # as many for every process: a sharded model asks for it
    terms = deal(turns, lambda piece: {key: value.item() for key, value in loss(piece).items()})[: len(pieces)]
    return {key: sum(term[key] for term in terms) / len(pairs) for key in terms[0]} if terms else {}

def train_dpo(
    policy: T5, pairs: Sequence[PairExample], held_out: Sequence[PairExample], n_steps: int, beta: float,
    schedule: Schedule, name: str = "DPO", **options,
) -> T5:  # fmt: skip
    """Train the policy for n_steps optimiser steps; it is its own reference at the start. options: see `train`.
    Dropout stays off, so that policy and reference agree (in bf16 to tenths of a nat per rationale) and the first loss is log 2.
    DIFFERS: rewards are also measured on held_out pairs; the authors' code scores pairs it trains on."""
    # Of more pairs than n_steps can visit some are drawn by lot: the others would be scored by the reference in vain.
    lots = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(schedule.seed))[: n_steps * schedule.batch_size]
    pairs = add_reference_logps(policy, [pairs[i] for i in sorted(lots.tolist())], schedule)
    held_out = add_reference_logps(policy, held_out, schedule)
    watch = lambda loss: {f"held_out_{k}": v for k, v in score(loss, held_out, schedule.micro_batch_tokens).items()}
    loss_of = partial(pair_loss, beta=beta)
    return train(policy, pairs, n_steps, loss_of, lambda pair: 1, schedule, name, dropout=False, watch=watch, **options)

if __name__ == "__main__":
    loss, chosen, rejected = dpo_loss(*map(torch.tensor, ([-11.0], [-14.0], [-12.0], [-13.0])), beta=0.1)
    print(f"log pi(chosen) -11, reference -12, beta 0.1: reward 0.1 * (-11 + 12) = {chosen.item():+.2f}")
    print(f"log pi(rejected) -14, reference -13:         reward 0.1 * (-14 + 13) = {rejected.item():+.2f}")
    print(f"loss: -log sigmoid({(chosen - rejected).item():.2f}) = {loss.item():.4f}; before training log 2 = 0.6931")
