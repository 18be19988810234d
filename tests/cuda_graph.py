"""A CUDA graph played on the CPU, so that `decode.record` runs and is held to the rules of a recording where there is no GPU.

Like the real one it knows operators and addresses only: what Python computes between them (a number, a branch, a clock) is
frozen into the recording, and operators that ask for a tensor's content, or bring a number to the GPU, are refused. Unlike it,
it computes while recording, and does not see `.cpu()` and `.numpy()`: a step on meta tensors, which have no content, does.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("lift_fresh", "aten.item", "_local_scalar_dense", "nonzero", "aten.equal", "masked_select", "unique")


def waits(operator, args: tuple) -> bool:
    """Whether Python would have to wait for the GPU, to learn a number or how many there are, or brings it one."""
    indices = args[1] if str(operator).startswith(("aten.index.", "aten.index_put")) else ()
    by_mask = any(index is not None and index.dtype == torch.bool for index in indices)  # counts its True first
    return by_mask or any(word in str(operator) for word in WAITS)


class Graph:
    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self) -> None:
        """Carry the recorded operators out again, each result to where it was when recorded."""
        self.replays += 1
        for function, args, kwargs, recorded in self.calls:
            for old, new in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (recorded, function(*args, **kwargs)))):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Note every operator on its way to the CPU."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result


def play(monkeypatch) -> list[Graph]:
    """Put these in the place of torch.cuda's; return the graphs that are made from then on."""
    graphs: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    return graphs
