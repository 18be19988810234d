"""What differs on a GPU: the recorded step, bf16, sizes from free memory. Played on the CPU where that says something."""

import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decode
import run
import selftrain
from conftest import ROOT
from cuda_graph import play
from data.problems import read_jsonl
from decode import KVCache, generate
from dpo import PairExample, pair_loss
from model import SIZES, T5
from sft import Example, Loss, sft_loss
from test_decode import QUESTIONS, model, tokenizer  # noqa: F401 (fixtures)
from tokenizer import EOS_ID

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


def counted(self, steps=itertools.count()) -> None:
    self.place = torch.full((1,), next(steps) % self.size)


def asked(self) -> None:
    self.place = torch.full((1,), int(self.place))


def by_mask(self) -> None:
    self.place = self.positions[: self.size][self.positions[: self.size] == self.place]


def brought(self) -> None:
    self.place = self.place + torch.tensor([0])


@pytest.mark.parametrize("spoil", [counted, asked, by_mask, brought])
def test_the_player_catches_what_a_recording_cannot_hold(model, tokenizer, monkeypatch, spoil):  # noqa: F811
    """The test above can fail: a place counted in Python is frozen, so that every step is written there; asking a tensor for its
    content and bringing a number to the GPU are refused, as CUDA does."""
    advance = KVCache.advance

    def spoiled(self):
        biases = advance(self)
        spoil(self)
        return biases

    expected = generate(model, tokenizer, QUESTIONS, max_new_tokens=40)
    play(monkeypatch)
    monkeypatch.setattr(KVCache, "advance", spoiled)
    if spoil is counted:
        assert generate(model, tokenizer, QUESTIONS, graph=True, max_new_tokens=40) != expected
    else:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            generate(model, tokenizer, QUESTIONS, graph=True, max_new_tokens=40)


def test_a_step_never_looks_at_a_number():
    """On meta tensors, which have shapes but no content, all of a step goes through: nothing in it is fetched from the GPU."""
    with torch.device("meta"), torch.inference_mode():
        net = T5(SIZES["base"]).eval()
        cache = KVCache(net, 5, 40, 17, fixed=True)
        assert net.step(torch.zeros(5, dtype=torch.long), cache).shape == (5, SIZES["base"].vocab_size)
        assert len(cache.ring) == 12 and cache.ring[0].is_meta and cache.ring[0].shape == (2, 5, 12, 64, 64)


def test_a_recorded_steps_masks_need_no_copy(monkeypatch):
    """Attention on a GPU reads masks whose rows begin at multiples of 8 numbers; it pads others first, so copies them, in every
    layer (preprocess_mask in torch's attention.cpp). Questions of 17 tokens are given 24 places."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention
    note = lambda *args, **options: masks.append(args[3]) or attention(*args, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with torch.device("meta"), torch.inference_mode():
        net = T5(SIZES["tiny"]).eval().bfloat16()
        net.step(torch.zeros(5, dtype=torch.long), KVCache(net, 5, 40, 17, fixed=True))
    assert [mask.shape[-1] for mask in masks] == [64, 24] * 2 and {mask.dtype for mask in masks} == {torch.bfloat16}


class Launches(TorchDispatchMode):
    """Count the operators that would each start a kernel."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view
        return function(*args, **(kwargs or {}))


def test_admitting_a_rationale_launches_as_little_in_a_deep_model_as_in_a_flat_one():
    """Between two replays the GPU waits while a finished slot is handed on, and a kernel for each layer there would add up. Where
    no size changes all layers are one tensor, and one operator writes a slot of it."""

    def launched(n_layers: int, fixed: bool, mate: int | None = None) -> int:
        net = T5(replace(SIZES["tiny"], n_layers=n_layers)).eval()
        with torch.inference_mode():
            cache = KVCache(net, 3, 40, 17, fixed)
            with Launches() as launches:
                cache.admit(1, torch.randn(n_layers, 2, 5, 4, 9, 32), row=4, source_length=7, mate=mate)
        return launches.n

    assert launched(2, fixed=True) == launched(12, fixed=True) < 10
    assert launched(12, fixed=False) > launched(2, fixed=False) + 10
    assert launched(12, fixed=False, mate=0) < launched(12, fixed=False)  # what a mate reads is there already


def test_a_part_of_the_sampling_keeps_a_gpus_slots_busy(model, tokenizer, monkeypatch):  # noqa: F811
    """A recorded step has one size: at the end of a part, idle slots are computed like the others. Of rationales as unlike in length
    as GSM8K's, twice as many as slots leave four slots of ten idle on average, eight times as many (2,048 for 256) fewer than two."""
    monkeypatch.setattr(decode, "record", lambda model, cache: partial(model.step, cache=cache))

    def busy(n: int, n_slots: int = 32) -> float:
        lengths, live = np.random.default_rng(0).lognormal(3.2, 0.45, n).astype(int).clip(5, 75), []

        def script(logits, rows):
            ends = [row is not None and len(row.sample.ids) + 1 >= lengths[int(questions[row.question])] for row in rows]
            live.append(sum(row is not None for row in rows) / n_slots)
            logits[:, EOS_ID] = torch.where(torch.tensor(ends), 1e9, -1e9)
            return logits

        questions = [str(i) for i in range(n)]
        generate(model, tokenizer, questions, batch_size=n_slots, max_new_tokens=75, graph=True, calculator=False, process=script)
        return sum(live) / len(live)

    assert busy(2 * 32) < 0.65 and busy(8 * 32) > 0.8
    rationales = run.batch_sizes(run.Config(device="cuda"), SIZES["base"], 80e9)[1]
    assert selftrain.PART["cuda"] >= 8 * rationales


def test_cudnns_attention_is_off():
    """torch 2.11 and later choose it on an H100 where a mask needs no gradient: in cross-attention, in scoring, in decoding. It plans
    each new shape anew, for 0.02 to 0.55 s by others' reports, and every piece of a training has a shape of its own; and its
    gradients may be NaN (pytorch #196678)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture(scope="module")
def second() -> dict:
    """What the bundled model writes and learns on the CPU and on `tests/second_device.py`, in a process of its own."""
    command = [sys.executable, str(ROOT / "tests/second_device.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # two devices are enough
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("task", ["greedy", "samples", "eager"])
def test_on_a_device_of_its_own_a_model_writes_the_same(second, task):
    """Ids, masks and noise begin on the CPU, and the calculator works there: one forgotten `.to` ends the first run on a GPU."""
    assert second[task]["second"]["rows"] == second[task]["cpu"]["rows"] and second[task]["cpu"]["steps"] > 20


def test_a_step_sends_ids_up_and_fetches_ids_and_needs_noise_where_one_samples(second):
    """Each copy makes Python wait for the GPU, and afterwards the GPU wait for Python. Beyond these, two groups of questions go up,
    with their masks, and three things are asked about them: are all masks 1 (twice), and where not (once)."""
    for task, up in (("greedy", 1), ("samples", 2)):
        steps, crossings = second[task]["second"]["steps"], second[task]["second"]["crossings"]
        assert crossings == {"up": up * steps + 2 * 2, "down": steps, "asked": 3}


@pytest.mark.parametrize("task", ["fp32", "bf16", "checkpointed"])
def test_on_a_device_of_its_own_a_model_learns_the_same(second, task):
    """SFT, its restart from a file, the reference's scores and DPO, loss by loss and margin by margin; in fp32, and as on a GPU in
    bf16, where each side rounds other sums: losses to a fiftieth, rewards and gradients to a tenth."""
    there, here = second[task]["second"], second[task]["cpu"]
    assert [record["step"] for record in there] == [1, 2, 2, 3, 1, 2]
    assert there[1] == there[2]  # once before the stop, once after it
    for found, expected in zip(there, here):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"stage", "reward_accuracy"}:  # the accuracy of a first step counts roundings of 0
            coarse = {"rel": 0.02, "abs": 0} if "loss" in key else {"rel": 0.1, "abs": 0.05}
            assert found[key] == pytest.approx(expected[key], **({"rel": 1e-3, "abs": 1e-4} if task == "fp32" else coarse)), key


def test_the_trainings_in_bf16_are_in_bf16(second):
    """An autocast that does nothing would make the test above easy."""
    for device in ("cpu", "second"):
        assert all(a["loss"] != b["loss"] for a, b in zip(second["fp32"][device][:4], second["bf16"][device][:4]))


def test_gradient_checkpointing_changes_nothing_in_bf16_either(second):
    """What runs again on the way back must run in the same autocast."""
    assert second["checkpointed"]["second"] == second["bf16"]["second"]


def test_the_second_device_refuses_tensors_of_two_devices(second):
    """The tests above can fail. CUDA would refuse all of these but the index, which it would fetch and wait for."""
    assert second["faults"] and all(second["faults"].values())


def tighten(monkeypatch, name: str, size_of, most: int) -> list[int]:
    """Let a function of selftrain run out of memory above a size; return the sizes that are tried."""
    original, tried = getattr(selftrain, name), []

    def run(*args, **options):
        tried.append(size_of(options))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return original(*args, **options)

    monkeypatch.setattr(selftrain, name, run)
    return tried


def test_too_little_memory_is_answered_by_less_at_a_time(tmp_path, monkeypatch, capsys):
    """A batch of rationales, and the micro-batch of a training, are halved until they fit, and stay so for the rest of the run.
    Rationales of the same model do not depend on it; dropout's draw, in training, does."""
    flags = "--limit 4 --rounds 0 --method st --sft-epochs 1".split()
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--out", str(tmp_path / "roomy")])
    run.main()
    texts = lambda name: [row["rationales"] for row in read_jsonl(tmp_path / name / "warm-up" / "evaluation.jsonl")]
    with monkeypatch.context() as patch:
        tried = tighten(patch, "generate", lambda options: options["batch_size"], 64)
        monkeypatch.setattr("sys.argv", ["run.py", *flags, "--out", str(tmp_path / "tight")])
        run.main()
    assert tried[:3] == [256, 128, 64] and set(tried[3:]) == {64} and texts("tight") == texts("roomy")
    assert capsys.readouterr().out.count("Out of memory (CUDA out of memory.): again with decode_batch_size") == 2
    tried = tighten(monkeypatch, "train_sft", lambda options: options["schedule"].micro_batch_tokens, 600)
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--out", str(tmp_path / "tighter")])
    run.main()
    assert tried == [2048, 1024, 512] and len(texts("tighter")) == len(texts("roomy"))


def test_a_cache_that_does_not_fit_is_halved_too(model, tokenizer, monkeypatch):  # noqa: F811
    """KVCache refuses a batch before any work; in a run that is no end either."""
    config, c = run.Config(decode_batch_size=64), model.config
    place = 2 * c.n_layers * c.n_heads * c.d_kv * 4 * 128  # a slot of 64 positions and a short question takes half of it
    monkeypatch.setattr(decode, "free_memory", lambda device: 12 * place)
    written = selftrain.fitting(lambda size: generate(model, tokenizer, ["Ann."] * 64, batch_size=size, max_new_tokens=64), config, "decode_batch_size")
    assert len(written) == 64 and config.decode_batch_size == 16


def test_one_of_several_processes_does_not_try_again_alone(monkeypatch):
    """The others would wait for it, in a training of other pieces: the run ends, and says which number to lower."""
    monkeypatch.setattr(selftrain, "place", lambda: (0, 2))
    config = run.Config(decode_batch_size=8)
    with pytest.raises(torch.OutOfMemoryError):
        selftrain.fitting(lambda size: (_ for _ in ()).throw(torch.OutOfMemoryError()), config, "decode_batch_size")
    assert config.decode_batch_size == 8


@pytest.mark.parametrize("size, gigabytes, processes, expected", [
    ("base", 80, 1, (16384, 256)), ("base", 80, 8, (2048, 256)), ("large", 80, 1, (8192, 256)), ("large", 24, 1, (2048, 128)),
    ("xl", 80, 1, (2048, 256)), ("xxl", 1, 1, (1, 2)),
])  # fmt: skip
def test_batch_sizes_follow_the_free_memory(monkeypatch, size, gigabytes, processes, expected):
    """What the formulas of README's "One GPU" need is free; all processes together take no more tokens than one batch of 96
    has; and a part of the sampling has eight rationales for each place, which is handed on that often. Powers of two, so that
    a restart with a few bytes less free goes on with the same numbers."""
    monkeypatch.setattr(run, "place", lambda: (0, processes))
    c, config = SIZES[size], run.Config(size=size, device="cuda")
    tokens, rationales = run.batch_sizes(config, c, gigabytes * 1e9)
    assert (tokens, rationales) == expected
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in T5(c).parameters())
    if gigabytes > 1:
        assert 16 * n_parameters + tokens * (8 * c.vocab_size + 160 * c.n_layers * c.d_model) < gigabytes * 1e9
        assert 2 * 2 * c.n_layers * c.n_heads * c.d_kv * (300 + 200) * rationales < gigabytes * 1e9 / 2
    assert run.batch_sizes(replace(config, decode_batch_size=7), c, gigabytes * 1e9) == (tokens, 7)
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
def test_gpu_recorded_steps_write_what_eager_ones_write(on_gpu, tokenizer, monkeypatch, options):  # noqa: F811
    """In fp32 the recording runs the kernels that the same step runs by itself: not a letter may differ. The usual eager path
    has other shapes, as its ring grows: there a near-tie may."""
    write = lambda graph: generate(on_gpu, tokenizer, QUESTIONS, graph=graph, max_new_tokens=40, batch_size=4, **options)
    recorded, eager = write(True), write(False)
    assert sum(a == b for a, b in zip(recorded, eager)) >= len(QUESTIONS) - 1
    monkeypatch.setattr(decode, "record", lambda model, cache: partial(model.step, cache=cache))
    assert write(True) == recorded


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
        there = Loss(on_gpu, loss, bf16=True)(items)["loss"].item()
        assert there == pytest.approx(loss(copy.deepcopy(on_gpu).cpu(), items)["loss"].item(), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [5, 64, 192])
def test_gpu_gradients_are_those_of_the_cpu(on_gpu, length):
    """Attention's kernels differ in what they can do: cuDNN's knows no gradient of the position bias and gave NaN at lengths of 64
    and 192 (pytorch #196678), others pad to multiples of 8. fp32 to rounding, bf16 to some percent of a matrix's norm."""
    ids = [*range(2, length + 1), EOS_ID]
    examples = [Example(ids, ids[::-1][: length // 2] + [EOS_ID]), Example(ids[length // 2 :], ids)]

    def gradients(net: T5, bf16: bool) -> dict[str, torch.Tensor]:
        net.zero_grad()
        Loss(net, sft_loss, bf16)(examples)["loss"].backward()
        return {name: parameter.grad.cpu() for name, parameter in net.named_parameters()}

    expected = gradients(copy.deepcopy(on_gpu).cpu(), bf16=False)
    for bf16, tolerance in ((False, 1e-3), (True, 0.1)):
        for name, found in gradients(on_gpu, bf16).items():
            assert (found - expected[name]).norm() <= tolerance * expected[name].norm(), (name, bf16)
    on_gpu.zero_grad()


@pytest.mark.gpu
def test_gpu_a_whole_run(on_gpu, tmp_path, monkeypatch, capsys):
    """Every stage of both methods on the GPU, with the sizes that its memory allows."""
    flags = "--limit 24 --rounds 1 --sft-epochs 1 --dpo-steps 2 --micro-batch-tokens 0 --decode-batch-size 0".split()
    monkeypatch.setattr("sys.argv", ["run.py", *flags, "--device", "cuda", "--out", str(tmp_path / "run")])
    run.main()
    assert "on 1 x cuda" in capsys.readouterr().out and (tmp_path / "run" / "results.md").exists()
