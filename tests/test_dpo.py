"""DPO: every number against the equation in float64, a reference that must not change, and no training without pairs."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpo import (
    PairExample,
    PreferencePair,
    dpo_loss,
    make_pair_examples,
    pair_loss,
    sequence_logps,
    train_dpo,
)
from model import T5, T5Config
from tests.conftest import schedule
from tokenizer import EOS_ID

CONFIG = T5Config(d_model=32, d_ff=48, n_heads=2, n_layers=2, d_kv=16, vocab_size=48)
NUMBERS = {"loss", "chosen_rewards", "rejected_rewards", "reward_margin", "reward_accuracy"}
BETA = 0.1


def random_model(seed: int = 0, **changes) -> T5:
    torch.manual_seed(seed)
    return T5(replace(CONFIG, **changes)).eval()


def random_pairs(seed: int = 0) -> list[PairExample]:
    """Seven pairs of unequal lengths for three questions; those of one question are not adjacent."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return rng.integers(3, CONFIG.vocab_size, n).tolist() + [EOS_ID]

    questions = [ids(n) for n in (4, 9, 2)]
    lengths = [(0, 5, 8), (1, 2, 3), (0, 12, 1), (2, 6, 6), (1, 9, 4), (0, 1, 14), (2, 3, 10)]
    return [
        PairExample(questions[q], ids(chosen), ids(rejected)) for q, chosen, rejected in lengths
    ]


def logp(model: T5, question: list[int], rationale: list[int]) -> torch.Tensor:
    """The slow twin: log pi(y|x) of one rationale, without a batch, from the full logits, in float64."""
    source = torch.tensor([question])
    logits = model(source, torch.ones_like(source), torch.tensor([[0, *rationale[:-1]]]))[
        0
    ].double()
    return -F.cross_entropy(logits, torch.tensor(rationale), reduction="sum")


def logps(model: T5, pairs: list[PairExample]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([logp(model, pair.input_ids, pair.chosen) for pair in pairs]),
        torch.stack([logp(model, pair.input_ids, pair.rejected) for pair in pairs]),
    )


def train(policy, pairs, n_steps=1, log=lambda record: None, **changes) -> T5:
    return train_dpo(
        policy, pairs, n_steps, BETA, schedule(**{"log_every": 1} | changes), "DPO", log
    )


def weights(model: T5) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bytes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------- log-probabilities


def test_sequence_logps_are_minus_the_summed_cross_entropy_of_the_full_logits():
    """For each side of each pair, in order: a SUM over the rationale's tokens, with EOS, without padding, shifted
    once."""
    model, pairs = random_model(), random_pairs()
    for found, expected in zip(sequence_logps(model, pairs), logps(model, pairs), strict=True):
        assert found.shape == (len(pairs),) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_sequence_logps_do_not_depend_on_the_company():
    """A pair's log-probabilities are compared across different batches: padding must not affect them."""
    model, pairs = random_model(), random_pairs()
    together = torch.stack(sequence_logps(model, pairs), dim=-1)
    alone = torch.cat([torch.stack(sequence_logps(model, [pair]), dim=-1) for pair in pairs])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    shuffled = [5, 0, 3, 6, 1, 4, 2]
    again = torch.stack(sequence_logps(model, [pairs[i] for i in shuffled]), dim=-1)
    torch.testing.assert_close(again, together[shuffled], atol=2e-5, rtol=0)


def test_each_question_is_encoded_once_for_both_rationales():
    """Encoding it once for the winning and once for the losing one would double the encoder's work."""
    model, rows = random_model(), []
    encode = model.encode
    model.encode = lambda ids, mask: rows.append(len(ids)) or encode(ids, mask)
    sequence_logps(model, random_pairs())
    assert rows == [7]


def test_pairs_are_cut_like_sft_examples_and_keep_their_eos():
    """The policy learned rationales cut at 300 tokens with an EOS; without it, different texts would be
    scored."""
    letters = SimpleNamespace(
        encode=lambda text, most: [ord(letter) for letter in text][: most - 1] + [EOS_ID]
    )
    long, short = make_pair_examples(
        [PreferencePair("q" * 400, "c" * 400, "r" * 400), PreferencePair("q", "cc", "rrr")], letters
    )
    assert long.input_ids == [ord("q")] * 199 + [EOS_ID]
    assert (long.chosen, long.rejected) == (
        [ord("c")] * 299 + [EOS_ID],
        [ord("r")] * 299 + [EOS_ID],
    )
    assert (short.chosen, short.rejected) == ([ord("c")] * 2 + [EOS_ID], [ord("r")] * 3 + [EOS_ID])


# ---------------------------------------------------------------------------------------------------------- the loss


def test_four_numbers_by_hand():
    """Chosen -12 -> -11 and rejected -13 -> -14 at beta 0.1: rewards +0.1 and -0.1, loss log(1 + e^-0.2).
    And reversed."""
    numbers = [
        torch.tensor(n) for n in ([-11.0, -13.0], [-14.0, -12.0], [-12.0, -12.0], [-13.0, -13.0])
    ]
    loss, chosen, rejected = dpo_loss(*numbers, beta=0.1)
    shapes = [tuple(found.shape) for found in (loss, chosen, rejected)]
    assert shapes == [(2,)] * 3, "one number per pair, neither summed nor averaged"
    assert chosen.tolist() == pytest.approx([0.1, -0.1])
    assert rejected.tolist() == pytest.approx([-0.1, 0.1])
    assert loss.tolist() == pytest.approx([0.59813887, 0.79813887])


def test_loss_rewards_and_gradient_equal_the_equation_in_float64():
    """Eq. 5 and its derivative, beta * sigmoid(-margin), written out: a swapped argument or a missing
    beta fails at once."""
    rng = np.random.default_rng(0)
    for beta in (0.05, 0.1, 0.5):
        chosen, rejected, reference_chosen, reference_rejected = rng.normal(-40, 10, (4, 100))
        tensors = [
            torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (chosen, rejected)
        ]
        references = [
            torch.tensor(n, dtype=torch.float64) for n in (reference_chosen, reference_rejected)
        ]
        loss, chosen_rewards, rejected_rewards = dpo_loss(*tensors, *references, beta)
        loss.sum().backward()
        margin = beta * (chosen - reference_chosen) - beta * (rejected - reference_rejected)
        sigmoid = 1 / (1 + np.exp(-margin))
        assert loss.tolist() == pytest.approx(-np.log(sigmoid), abs=1e-9)
        assert chosen_rewards.tolist() == pytest.approx(beta * (chosen - reference_chosen))
        assert rejected_rewards.tolist() == pytest.approx(beta * (rejected - reference_rejected))
        assert tensors[0].grad.tolist() == pytest.approx(-beta * (1 - sigmoid), abs=1e-9)
        assert tensors[1].grad.tolist() == pytest.approx(beta * (1 - sigmoid), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_margins_give_finite_losses_and_gradients(dtype):
    """A naive log(sigmoid(-1000)) is log(0): the loss of a badly wrong pair is the size of its margin, and the
    gradient is beta."""
    chosen = torch.tensor([-1e4, 1e4, -1e6], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(3, dtype=dtype)
    loss, _, _ = dpo_loss(chosen, zeros, zeros, zeros, 0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1e3, 0.0, 1e5])
    assert chosen.grad.tolist() == pytest.approx([-0.1, 0.0, -0.1])


def test_parameter_gradients_equal_the_equation_in_float64():
    """The complete path from weights to loss: one rationale at a time in float64 against the batch in
    float32."""
    policy, reference, pairs = random_model(1), random_model(2), random_pairs()
    terms = pair_loss(policy, pairs, reference, BETA)
    terms["loss"].backward()
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    (chosen, rejected), (reference_chosen, reference_rejected) = (
        logps(exact, pairs),
        logps(reference.double(), pairs),
    )
    chosen_rewards, rejected_rewards = (
        BETA * (chosen - reference_chosen),
        BETA * (rejected - reference_rejected),
    )
    loss = -torch.log(1 / (1 + torch.exp(rejected_rewards - chosen_rewards))).sum()
    loss.backward()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms["chosen_rewards"].item() == pytest.approx(chosen_rewards.sum().item(), rel=1e-5)
    assert terms["rejected_rewards"].item() == pytest.approx(
        rejected_rewards.sum().item(), rel=1e-5
    )
    assert terms["reward_accuracy"].item() == (chosen_rewards > rejected_rewards).sum().item()
    for ours, theirs in zip(policy.parameters(), exact.parameters()):
        difference = (ours.grad - theirs.grad).abs().max().item()
        assert difference <= 1e-4 * theirs.grad.abs().max().item()


def test_the_gradient_raises_chosen_and_lowers_rejected():
    """A sign error trains the opposite of the paper, but looks the same at the start, where both losses
    are log 2."""
    policy, pairs = random_model(), random_pairs()
    before = sequence_logps(policy, pairs)
    pair_loss(policy, pairs, copy.deepcopy(policy), BETA)["loss"].backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-2 * parameter.grad
    after = sequence_logps(policy, pairs)
    assert (after[0] > before[0]).all() and (after[1] < before[1]).all()


def test_the_terms_are_sums_over_pairs_from_sums_of_logps():
    """`train` divides by all pairs of the batch, so pair_loss must not average. A tie is not the right order: at the
    first step all pairs are tied, and a logged accuracy of 1 would look like success."""
    policy, reference, pairs = random_model(1), random_model(2), random_pairs()
    together = pair_loss(policy, pairs, reference, BETA)
    assert set(together) == NUMBERS
    for name, value in together.items():
        parts = [pair_loss(policy, [pair], reference, BETA)[name].item() for pair in pairs]
        assert value.item() == pytest.approx(sum(parts), abs=1e-4), name
    chosen, rejected = together["chosen_rewards"].item(), together["rejected_rewards"].item()
    assert together["reward_margin"].item() == pytest.approx(chosen - rejected, abs=1e-5)
    (chosen, rejected), (old_chosen, old_rejected) = logps(policy, pairs), logps(reference, pairs)
    in_order = (chosen - old_chosen > rejected - old_rejected).sum().item()
    assert 0 < in_order < len(pairs) and together["reward_accuracy"].item() == in_order
    assert pair_loss(policy, pairs, policy, BETA)["reward_accuracy"].item() == 0  # all are tied


# ----------------------------------------------------------------------------------------------------- the reference


def test_the_reference_gets_no_gradient():
    """It is a second model in memory: its gradients would waste 4 bytes per parameter."""
    policy, reference = random_model(1), random_model(2)
    pair_loss(policy, random_pairs(), reference, BETA)["loss"].backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_the_reference_stays_where_training_began():
    """Rewards logged at step t must compare the policy before that step with a frozen copy. A reference
    that follows the policy keeps all rewards at 0 and the loss at log 2, which is easy to miss in the log."""
    policy, pairs, seen = random_model(), random_pairs(), []
    frozen, before = copy.deepcopy(policy), copy.deepcopy(policy)

    def compare(record: dict) -> None:
        with torch.no_grad():
            chosen, rejected = logps(before, pairs)
            reference_chosen, reference_rejected = logps(frozen, pairs)
        chosen = BETA * (chosen - reference_chosen)
        rejected = BETA * (rejected - reference_rejected)
        loss = -F.logsigmoid(chosen - rejected)
        assert record["chosen_rewards"] == pytest.approx(chosen.mean().item(), abs=1e-4)
        assert record["rejected_rewards"] == pytest.approx(rejected.mean().item(), abs=1e-4)
        assert record["loss"] == pytest.approx(loss.mean().item(), abs=1e-4)
        seen.append(abs(record["reward_margin"]))
        before.load_state_dict(policy.state_dict())

    train(policy, pairs, n_steps=4, log=compare)
    assert len(seen) == 4 and seen[-1] > 0.01


# ------------------------------------------------------------------------------------------------------ the training


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_is_log_two(bf16):
    """Policy and reference are the same model at the start, so every margin is 0 and -log sigmoid(0) is
    log 2, even in bf16: both compute alike. Dropout left on, or a mean on one side, would change it."""
    policy, logs = random_model(dropout=0.1).train(), []
    train(policy, random_pairs(), log=logs.append, micro_batch_tokens=60, bf16=bf16)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for key in ("chosen_rewards", "rejected_rewards", "reward_margin"):
        assert logs[0][key] == pytest.approx(0, abs=1e-6)


def test_training_raises_the_margin():
    """This is what DPO is for: after some steps every chosen rationale is more likely than before, relative to its
    rejected one."""
    policy, pairs, logs = random_model(), random_pairs(), []
    frozen = copy.deepcopy(policy)
    assert train(policy, pairs, n_steps=12, log=logs.append, batch_size=4) is policy
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"] and logs[-1]["reward_margin"] > 0.2
    chosen, rejected = (
        after - before for after, before in zip(logps(policy, pairs), logps(frozen, pairs))
    )
    assert (chosen > rejected).all()
    assert not any(module.training for module in policy.modules())


def test_every_line_says_how_training_stands():
    """These numbers show whether DPO works. They are means over the pairs, taken before the step."""
    pairs, logs = random_pairs(), []
    train(random_model(), pairs, n_steps=3, log=logs.append)
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        assert NUMBERS <= set(log)
        margin = log["chosen_rewards"] - log["rejected_rewards"]
        assert log["reward_margin"] == pytest.approx(margin, abs=1e-5)
        assert log["reward_accuracy"] * 7 == pytest.approx(round(log["reward_accuracy"] * 7))


def test_neither_loss_nor_gradient_depends_on_how_memory_cuts_the_batch():
    """The loss is a mean over all PAIRS of the batch, whether a micro-batch holds one of them, a few or all."""
    pairs, first_gradients, second_losses = random_pairs(), [], []
    for budget in (1, 60, 10**6):
        gradients, logs = [], []

        def remember(optimizer, args, kwargs):
            gradients.append(
                [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            )

        handle = register_optimizer_step_pre_hook(remember)
        train(
            random_model(),
            pairs,
            n_steps=2,
            log=logs.append,
            micro_batch_tokens=budget,
            max_grad_norm=1e9,
        )
        handle.remove()
        first_gradients.append(gradients[0])
        second_losses.append(
            logs[1]["loss"]
        )  # by now the policy differs from the reference, and pairs differ in loss
    model = random_model()
    (pair_loss(model, pairs, copy.deepcopy(model), BETA)["loss"] / len(pairs)).backward()
    for gradients in first_gradients:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
    assert (
        second_losses == pytest.approx([second_losses[0]] * 3, abs=1e-3) and second_losses[0] < 0.66
    )


def test_the_same_seed_gives_the_same_weights_to_the_byte():
    """The order of the pairs depends on the seed, not on a global generator; otherwise no stopped run could be
    continued exactly."""
    trained = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        policy = random_model(dropout=0.1)
        torch.manual_seed(noise), np.random.seed(noise)
        trained.append(weights(train(policy, random_pairs(), n_steps=3, batch_size=2, seed=seed)))
    assert same_bytes(trained[0], trained[1]) and not same_bytes(trained[0], trained[2])


def test_nothing_to_train_on_is_refused():
    """A model that solves everything, or nothing, gives no pairs; training on none must not pass for DPO."""
    with pytest.raises(ValueError, match="DPO"):
        train(random_model(), [])
