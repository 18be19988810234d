"""What differs on a GPU: the recorded step, bf16, sizes from free memory. Played on the CPU where that says something."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import run
import selftrain
from cuda_graph import play
from data.problems import read_jsonl
from decode import KVCache, generate
from dpo import PairExample, pair_loss
from model import SIZES
from sft import Example, Loss, sft_loss
from test_decode import QUESTIONS, model, tokenizer  # noqa: F401 (fixtures)

OPTIONS = [dict(), dict(n_samples=3, temperature=0.7, seed=1), dict(calculator=False), dict(n_samples=2, temperature=1.0, top_k=0)]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_recorded_step_writes_what_the_eager_one_writes(model, tokenizer, monkeypatch, options, batch_size):  # noqa: F811
    """A recording repeats operators on addresses. Were the clock, a slot's age or its question's length a number in Python,
    all steps would be the first one; slots are handed on many times here, by one recording."""
    options |= {"batch_size": batch_size, "max_new_tokens": 40}
    expected, graphs = generate(model, tokenizer, QUESTIONS, **options), play(monkeypatch)
    assert generate(model, tokenizer, QUESTIONS, graph=True, **options) == expected
    assert len(graphs) == 1 and graphs[0].replays > 8


def test_the_player_catches_what_a_recording_cannot_hold(model, tokenizer, monkeypatch):  # noqa: F811
    """The test above can fail: a place counted in Python is frozen, so that every step is written there; asking the tensor
    for its number is refused, as CUDA does."""
    expected, advance, steps = generate(model, tokenizer, QUESTIONS, max_new_tokens=40), KVCache.advance, itertools.count()

    def counted(self):
        biases = advance(self)
        self.place = torch.full((1,), next(steps) % self.size)
        return biases

    def asked(self):
        biases = advance(self)
        self.place = torch.full((1,), int(self.place))
        return biases

    play(monkeypatch)
    monkeypatch.setattr(KVCache, "advance", counted)
    assert generate(model, tokenizer, QUESTIONS, graph=True, max_new_tokens=40) != expected
    monkeypatch.setattr(KVCache, "advance", asked)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        generate(model, tokenizer, QUESTIONS, graph=True, max_new_tokens=40)


def test_too_little_memory_is_answered_by_less_at_a_time(tmp_path, monkeypatch, capsys):
    """A batch of rationales and a micro-batch in training are halved until they fit; what is written stays the same."""
    ran = {"generate": [], "train_sft": []}

    def tight(name: str, size_of, most: int):
        original = getattr(selftrain, name)

        def run(*args, **options):
            ran[name].append(size_of(options))
            if size_of(options) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*args, **options)

        monkeypatch.setattr(selftrain, name, run)

    flags = "--limit 4 --rounds 0 --method st --sft-epochs 1".split()
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--out", str(tmp_path / "roomy")])
    run.main()
    tight("generate", lambda options: options["batch_size"], 64)
    tight("train_sft", lambda options: options["schedule"].micro_batch_tokens, 600)
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--out", str(tmp_path / "tight")])
    run.main()
    assert ran["train_sft"] == [2048, 1024, 512] and ran["generate"][:3] == [256, 128, 64]
    assert capsys.readouterr().out.count("Out of memory: again with") > 4
    roomy, tight_ = (read_jsonl(tmp_path / name / "warm-up" / "evaluation.jsonl") for name in ("roomy", "tight"))
    assert [row["question"] for row in roomy] == [row["question"] for row in tight_]


def test_one_of_several_processes_does_not_try_again_alone(monkeypatch):
    """The others would wait for it, in a training of other pieces: the run ends, and says which number to lower."""
    monkeypatch.setattr(selftrain, "place", lambda: (0, 2))
    with pytest.raises(torch.OutOfMemoryError):
        selftrain.fitting(lambda size: (_ for _ in ()).throw(torch.OutOfMemoryError()), 8)


@pytest.mark.parametrize("size, gigabytes, processes, expected", [
    ("base", 80, 1, (16384, 256)), ("base", 80, 8, (2048, 256)), ("large", 80, 1, (9548, 256)), ("large", 24, 1, (2864, 244)),
])  # fmt: skip
def test_batch_sizes_follow_the_free_memory(monkeypatch, size, gigabytes, processes, expected):
    """On a GPU half of what is free is filled; all processes together take no more tokens than one batch of 96 has.
    With as many places as a part of the sampling has rationales, none would ever be handed on, and all wait for the longest."""
    monkeypatch.setattr(run, "place", lambda: (0, processes))
    c, config = SIZES[size], run.Config(size=size, device="cuda")
    assert run.batch_sizes(config, c, gigabytes * 1e9) == expected
    assert run.batch_sizes(replace(config, decode_batch_size=7), c, gigabytes * 1e9) == (expected[0], 7)
    assert run.batch_sizes(replace(config, device="cpu"), c, gigabytes * 1e9) == (2048, 96)


# ------------------------------------------------------------------------------------------------------- with a GPU at hand


@pytest.fixture
def on_gpu(model):  # noqa: F811
    """The small model there, and back afterwards."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    yield model.cuda()
    model.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_recorded_steps_write_what_eager_ones_write(on_gpu, tokenizer, options):  # noqa: F811
    """In fp32 both run the same kernels on the same numbers: not a letter may differ."""
    both = [generate(on_gpu, tokenizer, QUESTIONS, graph=graph, max_new_tokens=40, batch_size=4, **options) for graph in (True, False)]
    assert both[0] == both[1]


@pytest.mark.gpu
def test_gpu_texts_in_bf16_are_mostly_those_of_fp32(on_gpu, tokenizer):  # noqa: F811
    """bf16 flips near-ties only; a mask or bias that bf16 cannot hold would change every text."""
    expected = generate(on_gpu, tokenizer, QUESTIONS, max_new_tokens=40)
    half = copy.deepcopy(on_gpu).bfloat16()
    for batch_size in (1, 4, 32):
        written = generate(half, tokenizer, QUESTIONS, max_new_tokens=40, batch_size=batch_size)
        assert sum(a == b for a, b in zip(written, expected)) >= len(QUESTIONS) // 2


@pytest.mark.gpu
def test_gpu_losses_are_those_of_the_cpu(on_gpu):
    """The same batch in bf16 autocast over fp32 weights: within bf16's three digits."""
    pairs = [PairExample((5, 6, 7, 1), [8, 9, 10, 1], [11, 12, 1], (-9.0, -8.0)), PairExample((5, 1), [8, 1], [9, 9, 9, 1], (-5.0, -9.0))]
    examples = [Example(list(pair.input_ids), pair.chosen) for pair in pairs]
    for loss, items in ((sft_loss, examples), (partial(pair_loss, beta=0.1), pairs)):
        there = Loss(on_gpu, loss)(items)["loss"].item()
        assert there == pytest.approx(loss(copy.deepcopy(on_gpu).cpu(), items)["loss"].item(), rel=0.02)


@pytest.mark.gpu
def test_gpu_a_whole_run(on_gpu, tmp_path, monkeypatch, capsys):
    """Every stage of both methods on the GPU, with the sizes that its memory allows."""
    flags = "--limit 24 --rounds 1 --sft-epochs 1 --dpo-steps 2 --micro-batch-tokens 0 --decode-batch-size 0".split()
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--device", "cuda", "--out", str(tmp_path / "run")])
    run.main()
    assert "on 1 x cuda" in capsys.readouterr().out and (tmp_path / "run" / "results.md").exists()
