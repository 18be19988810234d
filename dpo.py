"""Direct preference optimisation (Rafailov et al., 2023; paper, section 2, eq. 5), written by hand.

Left out: how pairs are made (selftrain.py), other preference losses, label smoothing, and pairs
that are held out to be scored only.

    python dpo.py        # one pair worked by hand
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import T5
from sft import IGNORE, Schedule, token_logps, train
from tokenizer import MAX_QUESTION, MAX_RATIONALE, Tokenizer, pad_batch


@dataclass(frozen=True)
class PreferencePair:
    """A question x, a rationale that reaches its answer (y_w), and one that does not (y_l)."""

    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairExample:
    """A preference pair as ids, each text ending in EOS."""

    input_ids: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: int = 1  # eq. 5 is a mean over pairs

    def __len__(self) -> int:
        # Both rationales stand in one batch, the shorter one padded.
        return len(self.input_ids) + 2 * max(len(self.chosen), len(self.rejected))


def make_pair_examples(pairs: Sequence[PreferencePair], tokenizer: Tokenizer) -> list[PairExample]:
    """Encode preference pairs."""
    examples = []
    for pair in pairs:
        input_ids = tokenizer.encode(pair.question, MAX_QUESTION)
        chosen = tokenizer.encode(pair.chosen, MAX_RATIONALE)
        rejected = tokenizer.encode(pair.rejected, MAX_RATIONALE)
        examples.append(PairExample(input_ids, chosen, rejected))
    return examples


def sequence_logps(model: T5, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
    """log pi(y|x) of the chosen and of the rejected rationales, each (B,) fp32.

    It is a SUM over a rationale's tokens, EOS included and padding excluded: the log-probability of
    the whole text. Nothing is shifted here: token_logps has shifted. Each question is
    encoded once for both of its rationales.
    """
    input_ids, mask = pad_batch([pair.input_ids for pair in pairs], model.device)
    rationales = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    labels, _ = pad_batch(rationales, model.device, IGNORE)  # (2B, T)
    states = model.encode(input_ids, mask)  # (B, S, D)
    states = torch.cat([states, states])
    mask = torch.cat([mask, mask])
    logps = token_logps(model, states, mask, labels).sum(-1)  # (2B,)
    return logps[: len(pairs)], logps[len(pairs) :]


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen and rejected rewards, from four log-probabilities of each pair, all (B,).

        r(y|x) = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = -log sigmoid(r(y_w|x) - r(y_l|x))

    Source: paper, section 2, eq. 5.
    """
    chosen_rewards = beta * (chosen_logps - reference_chosen)
    rejected_rewards = beta * (rejected_logps - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def pair_loss(
    policy: T5, pairs: Sequence[PairExample], reference: T5, beta: float
) -> dict[str, Tensor]:
    """Eq. 5 with both its models, and the numbers that explain it, each summed over the pairs."""
    with torch.no_grad():
        reference_chosen, reference_rejected = sequence_logps(reference, pairs)
    chosen, rejected = sequence_logps(policy, pairs)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected, beta
    )
    return {
        "loss": losses.sum(),
        "chosen_rewards": chosen_rewards.sum(),
        "rejected_rewards": rejected_rewards.sum(),
        "reward_margin": (chosen_rewards - rejected_rewards).sum(),
        "reward_accuracy": (chosen_rewards > rejected_rewards).float().sum(),
    }


def train_dpo(
    policy: T5,
    pairs: Sequence[PairExample],
    n_steps: int,
    beta: float,
    schedule: Schedule,
    name: str,
    log: Callable[[dict], None],
) -> T5:
    """Train the policy for n_steps optimiser steps against a frozen copy of itself, the reference.

    Dropout stays off, so that both agree at first and the first loss is log 2. The copy costs 4
    bytes per parameter.
    """
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    loss_of = partial(pair_loss, reference=reference, beta=beta)
    return train(policy, pairs, n_steps, loss_of, schedule, name, log, dropout=False)


def main() -> None:
    logps = [torch.tensor([value]) for value in (-11.0, -14.0, -12.0, -13.0)]
    loss, chosen, rejected = dpo_loss(*logps, beta=0.1)
    margin = (chosen - rejected).item()
    print(f"log pi(chosen) -11, reference -12: reward 0.1 * (-11 + 12) = {chosen.item():+.2f}")
    print(f"log pi(rejected) -14, reference -13: reward 0.1 * (-14 + 13) = {rejected.item():+.2f}")
    print(f"loss: -log sigmoid({margin:.2f}) = {loss.item():.4f}; before training log 2 = 0.6931")


if __name__ == "__main__":
    main()
