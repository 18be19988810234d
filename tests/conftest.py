"""Shared by all tests: the repository on the path, a single thread, and the folders of real data where they exist."""

import inspect
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine two threads are slower than one

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Real GSM8K text, the real vocabulary, a small checkpoint: only where provided.
SHARED = ROOT.parent / "shared"

torch.set_flush_denormal(True)


def hear_ctrl_c() -> None:
    """For subprocess's preexec_fn: a shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def schedule(**changes):
    """An sft.Schedule with the paper's numbers, some changed; every batch is one micro-batch."""
    from sft import Schedule

    numbers = dict(peak_rate=1e-3, batch_size=96, micro_batch_tokens=10**6)
    return Schedule(**(numbers | changes))


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` uses a GPU: the other tests compare bytes, which kernels and bf16 would change."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def signals():
    """Commands that a test runs in this process change signal handlers; processes that later tests start would
    inherit what is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Python's own choice


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Below a test that fails, say in words what was wanted: its docstring."""
    report = (yield).get_result()
    words = inspect.getdoc(getattr(item, "function", None)) or ""
    if report.failed and words:
        report.sections.append(("what was wanted", f"{item.name}: {words}"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        action="store_true",
        help="the long forms of some tests too: about half an hour more",
    )


@pytest.fixture(scope="session")
def slow(request) -> bool:
    """Whether to run the long form of a test."""
    return request.config.getoption("--slow")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it are skipped where it does not exist."""
    if not SHARED.exists():
        pytest.skip("needs ../shared, the folder of real data next to this repository")
    return SHARED


@pytest.fixture(scope="session")
def datasets() -> Path:
    """The folder of public datasets that `python -m data.sources SIZE` fills, or ../shared."""
    from data.sources import cache_folder

    for folder in (cache_folder(None) / "datasets", SHARED / "data"):
        if (folder / "gsm8k" / "train.jsonl").exists():
            return folder
    pytest.skip("needs the public datasets: python -m data.sources small")


@pytest.fixture(scope="session")
def public_sets(shared, tmp_path_factory) -> Path:
    """All public datasets, converted from the untouched files in ../shared."""
    from data.problems import write_jsonl
    from data.sources import CONVERSIONS, DATASETS

    folder = tmp_path_factory.mktemp("datasets")
    for name, source in DATASETS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        convert = CONVERSIONS.get(name)
        if convert is None:
            (folder / name).write_bytes((shared / "data" / name).read_bytes())
        else:
            raw = shared / "sources" / source["address"].rpartition("/")[2]
            write_jsonl(convert(raw.read_bytes()), folder / name)
    return folder


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    """The folder of Flan-T5's spiece.model; all sizes have the same."""
    from data.sources import cache_folder

    for folder in (*cache_folder(None).glob("flan-t5-*"), SHARED / "flan-t5"):
        if (folder / "spiece.model").exists():
            return folder
    pytest.skip("needs Flan-T5's vocabulary: python -m data.sources small")
