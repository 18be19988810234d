"""A second device, written in Python: what would go wrong on a GPU because a tensor lies on the wrong side goes wrong here.

Its tensors are CPU tensors in a wrapper. An operator that is given tensors of both devices is refused, as CUDA does (which would
fetch an index, and wait: here that is refused too), and every crossing is noted: `up` to the device, `down` from it, `asked` for
what Python must know. Run alone, because torch has room for one such device in a process and never forgets it, this writes and
trains with the bundled model on both devices and prints the results as JSON:

    python tests/second_device.py
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.library import Library, fallthrough_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import decode
from cuda_graph import waits
from data.folder import RunFolder
from data.synthetic import make_problems
from dpo import PreferencePair, make_pair_examples, train_dpo
from model import load_flan_t5
from sft import Progress, Schedule, make_examples, train_sft
from tokenizer import Tokenizer, format_rationale

crossings: Counter = Counter()


class There(torch.Tensor):
    """A tensor of the second device; `here` is what a CPU holds in its place."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        layout = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        wrapper = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=torch.device("second", 0), **layout)
        wrapper.here = here
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


def dispatch(operator, args: tuple, kwargs: dict):
    """Carry an operator out on the CPU, if it copies, or if all its tensors lie on one device. Element-wise operators also accept
    single numbers from the CPU, but may not write to one."""
    name, tensors = operator.name(), [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    theirs = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}
    wanted = kwargs.get("device") and torch.device(kwargs["device"]).type
    to_second = wanted == "second" if wanted else bool(theirs)
    if name in ("aten::_to_copy", "aten::copy_"):
        source = args[0]
        if name == "aten::copy_":
            to_second, source = isinstance(args[0], There), args[1]
        crossings["up" if to_second else "down"] += to_second != isinstance(source, There) and source.numel() > 0
    elif theirs:
        here_written = operator._schema.is_mutable and not isinstance(kwargs.get("out", args[0]), There)
        numbers_too = torch.Tag.pointwise in operator.tags and not here_written
        if any(not isinstance(tensor, There) and (tensor.dim() or not numbers_too) for tensor in tensors):
            raise RuntimeError(f"{operator}: expected all tensors to be on the same device")
        crossings["asked"] += waits(operator, args)
    if wanted == "second":
        kwargs = kwargs | {"device": "cpu"}
    result = operator(*pytree.tree_map_only(There, lambda tensor: tensor.here, args),
                      **pytree.tree_map_only(There, lambda tensor: tensor.here, kwargs))  # fmt: skip
    if not to_second:
        return result
    return pytree.tree_map_only(torch.Tensor, lambda tensor: theirs[id(tensor)] if id(tensor) in theirs else There(tensor), result)


class Operators(TorchDispatchMode):
    """Operators without a tensor, such as torch.zeros, know their device only from an argument."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return dispatch(operator, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch does in C++, without an operator, on its way from Python's lists to tensors and back."""

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist:
            return function(args[0].cpu())
        if function is torch.tensor and (device := kwargs.pop("device", None)):
            return torch.tensor(*args, **kwargs).to(device)
        if function is torch.Tensor.__getitem__ and isinstance(args[0], There):
            move = lambda index: torch.tensor(index).to(args[0].device) if isinstance(index, list) else index
            args = args[0], tuple(map(move, args[1])) if isinstance(args[1], tuple) else move(args[1])
        return function(*args, **kwargs)


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> list[Library]:
    """Make the second device known, and its autocast for the operators that T5 needs: bf16 for products, fp32 for norms. What is
    returned must live as long as they shall."""
    backend_registration._setup_privateuseone_for_python_backend("second", backend_module=Backend())
    key, others, aten = "AutocastPrivateUse1", Library("_", "IMPL"), Library("aten", "IMPL")
    within = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def casting(operator, dtype: torch.dtype) -> Callable:
        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(within):
                cast = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
                return operator(*pytree.tree_map_only(torch.Tensor, cast, args), **pytree.tree_map_only(torch.Tensor, cast, kwargs))

        return run

    others.fallback(fallthrough_kernel, key)
    for name in ("linear", "matmul", "scaled_dot_product_attention", "rms_norm"):
        dtype = torch.float32 if name == "rms_norm" else torch.bfloat16
        aten.impl(name, casting(getattr(torch.ops.aten, name).default, dtype), key)
    return [others, aten]


def write(device: str, **options) -> dict:
    """Sample and answer with the bundled model; the steps, and the crossings, beside the texts."""
    model, tokenizer = load_flan_t5(ROOT / "data/tiny", device=device), Tokenizer(ROOT / "data/tiny")
    questions, steps = [problem.question for problem in make_problems(9, seed=5)], []
    crossings.clear()
    with torch.no_grad():  # wrappers have no version, which inference mode asks for
        rows = decode.generate.__wrapped__(
            model, tokenizer, questions, batch_size=5, max_new_tokens=60,
            process=lambda logits, rows: steps.append(1) or logits, **options,
        )  # fmt: skip
    return {"rows": [[asdict(sample) for sample in row] for row in rows], "steps": len(steps), "crossings": dict(crossings)}


def learn(device: str, **options) -> list[dict]:
    """Three steps of SFT, stopped after the second, which is not saved yet, and gone on with from the first; two steps of DPO."""
    tokenizer, problems, logs = Tokenizer(ROOT / "data/tiny"), make_problems(13, seed=6), []
    problems = [replace(problem, rationale=format_rationale(problem.rationale)) for problem in problems]
    pairs = make_pair_examples([PreferencePair(p.question, p.rationale, q.rationale) for p, q in zip(problems, problems[1:])], tokenizer)
    schedule = Schedule(1e-3, batch_size=5, micro_batch_tokens=200, log_every=1, **options)

    def log(record: dict) -> None:
        if record["step"] == 2 and len(logs) == 1:
            logs.append(record)
            raise InterruptedError
        logs.append(record)

    with TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.open({})
        for _ in range(2):
            model = load_flan_t5(ROOT / "data/tiny", device=device)
            with suppress(InterruptedError):
                train_sft(model, make_examples(problems, tokenizer), 1, schedule, log=log, progress=Progress(folder, "sft", 0))
    train_dpo(model, pairs[:9], pairs[9:], 2, 0.1, replace(schedule, learning_rate=1e-4), log=logs.append)
    return logs


def refused(spoil: Callable) -> bool:
    """Whether a fault that CUDA would refuse is refused here."""
    try:
        spoil()
    except RuntimeError as error:
        return "same device" in str(error)
    return False


def main() -> None:
    _libraries = register()  # before any gradient is computed: torch counts its devices then
    decode.record = lambda model, cache: partial(model.step, cache=cache)
    tasks = {
        "greedy": partial(write, graph=True), "samples": partial(write, graph=True, n_samples=3, temperature=0.7, seed=1),
        "eager": partial(write, graph=False, n_samples=3, temperature=0.7, seed=1),
        "fp32": learn, "bf16": partial(learn, bf16=True), "checkpointed": partial(learn, bf16=True, gradient_checkpointing=True),
    }  # fmt: skip
    results = {name: {"cpu": task("cpu")} for name, task in tasks.items()}
    with Operators(), Functions():
        for name, task in tasks.items():
            results[name]["second"] = task("second")
        there, here = torch.zeros(3, device="second"), torch.zeros(3, dtype=torch.long)
        faults = {
            "a sum": lambda: there + here, "a choice": lambda: torch.where(here > 0, there, there), "an index": lambda: there[here],
            "a stack of numbers": lambda: torch.stack([there[0], here[0]]), "a number to select by": lambda: there.index_select(0, here[0]),
            "a number here that is added to": lambda: torch.zeros(()).add_(there[0]),
        }  # fmt: skip
        results["faults"] = {name: refused(fault) for name, fault in faults.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
