"""A second device, written in Python: what would go wrong on a GPU because a tensor lies on the wrong side goes wrong here.

Its tensors are CPU tensors in a wrapper. An operator that is given tensors of both devices is refused, as CUDA does, and every
crossing is noted: `up` to the device, `down` from it, `asked` for a number. Run alone, for a process can have no other device
beside it, nor get rid of it, it writes and trains with the bundled model on both devices and prints the results as JSON:

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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import decode
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
    """Carry an operator out on the CPU, if all its tensors lie on one device or it is there to copy."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    theirs = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, There)}
    wanted = kwargs.get("device") and torch.device(kwargs["device"]).type
    to_second = wanted == "second" if wanted else bool(theirs)
    if operator.name() in ("aten::_to_copy", "aten::copy_"):
        source = args[operator.name() == "aten::copy_"]
        to_second = isinstance(args[0], There) if operator.name() == "aten::copy_" else to_second
        crossings["up" if to_second else "down"] += to_second != isinstance(source, There)
    elif theirs and any(tensor.dim() and not isinstance(tensor, There) for tensor in tensors):
        raise RuntimeError(f"{operator}: expected all tensors to be on the same device")
    crossings["asked"] += operator.name() in ("aten::_local_scalar_dense", "aten::nonzero") and bool(theirs)
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
        if function is torch.tensor and kwargs.get("device"):
            return torch.tensor(*args).to(kwargs["device"])
        if function is torch.Tensor.__getitem__ and isinstance(args[0], There):
            move = lambda index: torch.tensor(index).to(args[0].device) if isinstance(index, list) else index
            args = args[0], tuple(map(move, args[1])) if isinstance(args[1], tuple) else move(args[1])
        return function(*args, **kwargs)


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


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
    """Three steps of SFT, stopped before the second and gone on with from what was saved, and two steps of DPO."""
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
    train_dpo(model, pairs[:9], pairs[9:], 2, 0.1, schedule, log=logs.append)
    return logs


def refused(spoil: Callable) -> bool:
    """Whether a fault that CUDA would refuse is refused here."""
    try:
        spoil()
    except RuntimeError as error:
        return "same device" in str(error)
    return False


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend("second", backend_module=Backend())
    decode.record = lambda model, cache: partial(model.step, cache=cache)
    tasks = {
        "greedy": partial(write, graph=True), "samples": partial(write, graph=True, n_samples=3, temperature=0.7, seed=1),
        "eager": partial(write, graph=False, n_samples=3, temperature=0.7, seed=1),
        "training": learn, "training, checkpointed": partial(learn, gradient_checkpointing=True),
    }  # fmt: skip
    results = {name: {"cpu": task("cpu")} for name, task in tasks.items()}
    with Operators(), Functions():
        for name, task in tasks.items():
            results[name]["second"] = task("second")
        there, here = torch.zeros(3, device="second"), torch.zeros(3, dtype=torch.long)
        faults = (lambda: there + here, lambda: there[here], lambda: torch.where(here > 0, there, there), lambda: torch.stack([there, here]))
        results["faults"] = [refused(fault) for fault in faults]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
