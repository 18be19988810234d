"""Direct preference optimisation (Rafailov et al., 2023; paper, section 2, eq. 5), written by hand.

Left out: how pairs are made (selftrain.py), other preference losses, label smoothing, and held-out
pairs for evaluation.

    python dpo.py        # a few DPO steps on one pair of the tiny model
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import T5, load_flan_t5
from sft import IGNORE, Log, Schedule, token_logps, train
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
    n_terms: int = 1  # eq. 5 is a mean over pairs

    def __len__(self) -> int:
        # Both rationales are in one batch, the shorter one padded.
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

    It is a SUM over the rationale's tokens, EOS included and padding excluded: the log-probability
    of the complete text. No shift here; token_logps does it. Each question is encoded once for both
    of its rationales.
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
    """Losses, chosen rewards and rejected rewards from four log-probabilities of each pair, (B,).

        r(y|x) = beta * (log pi(y|x) - log pi_ref(y|x))
        loss = -log sigmoid(r(y_w|x) - r(y_l|x))

    beta says how strongly the policy is tied to the reference: the smaller it is, the farther the
    policy must move from the reference to reach the same loss. The loss widens the margin between
    the two; the chosen rationale itself may become less probable. A model trained with it should
    solve more questions when it samples pseudo-labels. Source: paper, section 2, eq. 5.

    >>> logps = [torch.tensor([value]) for value in (-11.0, -14.0, -12.0, -13.0)]
    >>> losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, beta=0.1)
    >>> chosen_rewards, rejected_rewards  # 0.1 * (-11 + 12), 0.1 * (-14 + 13)
    (tensor([0.1000]), tensor([-0.1000]))
    >>> losses  # -log sigmoid(0.2); before training it is log 2 = 0.6931
    tensor([0.5981])
    """
    chosen_rewards = beta * (chosen_logps - reference_chosen)
    rejected_rewards = beta * (rejected_logps - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def pair_loss(
    policy: T5, pairs: Sequence[PairExample], reference: T5, beta: float
) -> dict[str, Tensor]:
    """Eq. 5 with both of its models, each term summed over the pairs.

    The terms: loss, chosen_rewards, rejected_rewards, reward_margin (of chosen over rejected), and
    reward_accuracy, which counts pairs whose chosen reward is higher; a tie, as before training,
    does not count. train_dpo makes the reference.
    """
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
    log: Log,
) -> T5:
    """Train the policy for n_steps optimiser steps against a frozen copy of itself, the reference.

    Dropout is off (the default of the authors' DPO trainer), so policy and reference agree at first
    and the first loss is log 2. The copy costs 4 bytes per parameter.
    """
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    loss_of = partial(pair_loss, reference=reference, beta=beta)
    return train(policy, pairs, n_steps, loss_of, schedule, name, log, dropout=False)


def main() -> None:
    torch.set_num_threads(1)  # two threads are slower at this size
    folder = Path(__file__).parent / "data" / "tiny"
    policy, tokenizer = load_flan_t5(folder), Tokenizer(folder)
    pair = PreferencePair(
        question="Carl buys 2 chairs for 22 dollars each. How many dollars does Carl pay?",
        chosen="The chairs cost 2 * 22 = [ 2 * 22 = 44] 44 dollars. #### 44",
        rejected="The chairs cost 2 * 52 = [ 2 * 52 = 104] 104 dollars. #### 104",
    )
    [example] = make_pair_examples([pair], tokenizer)
    reference = copy.deepcopy(policy)
    print(f"question: {pair.question}\nchosen:   {pair.chosen}\nrejected: {pair.rejected}\n")

    schedule = Schedule(peak_rate=1e-4, batch_size=1)
    for n_steps in (0, 10):
        train_dpo(policy, [example], n_steps, 0.1, schedule, "DPO", log=lambda record: None)
        with torch.no_grad():
            chosen, rejected = sequence_logps(policy, [example])
            terms = pair_loss(policy, [example], reference, beta=0.1)
        print(f"After {n_steps} steps:")
        print(f"  log pi of chosen {chosen.item():.4f}, of rejected {rejected.item():.4f}")
        print(f"  reward margin {terms['reward_margin']:.4f}, loss (eq. 5) {terms['loss']:.4f}")
    print("The margin has grown because the rejected rationale has become less probable; so has,")
    print("slightly, the chosen one. Eq. 5 asks only for a margin.")


if __name__ == "__main__":
    main()
