"""The command line: flags, progress bars, printed lines, signals, and errors in one sentence."""

import argparse
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.processes import leave_processes, rank_and_count

# ----------------------------------------------------------------------------- progress of a run


class Plan:
    """Takes the place of an Experiment in `self_train`, and only notes the names of the stages."""

    def __init__(self, config: argparse.Namespace):
        self.config = config
        self.L: list = []
        self.names: list[str] = []

    def __getattr__(self, step: str) -> Callable:
        def note(name: str, *_) -> list:
            self.names.append(name)
            return []

        return note


class Stages:
    """Which stage of how many a run is in, and how long the rest will take."""

    def __init__(self):
        self.names: list[str] = []  # all, in order; empty: no plan
        self.seconds: dict[str, list[float]] = {}  # of the stages made so far, by kind
        self.current = ""

    def label(self, name: str) -> str:
        """`3/16 ` for the third of sixteen stages; nothing without a plan."""
        name = name if name in self.names else self.current
        return f"{self.names.index(name) + 1}/{len(self.names)} " if name in self.names else ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the making of a stage's result."""
        self.current = name
        began = time.monotonic()
        yield
        self.seconds.setdefault(Path(name).name, []).append(time.monotonic() - began)

    def left(self) -> str:
        """`, 12 min left` after a stage of the second round and later; before, nothing."""
        if self.current not in self.names or len(self.seconds.get("evaluation.jsonl", [])) < 2:
            return ""
        means = {kind: sum(spent) / len(spent) for kind, spent in self.seconds.items()}
        usual = sum(means.values()) / len(means)  # for a kind of stage that has not been made yet
        rest = self.names[self.names.index(self.current) + 1 :]
        seconds = sum(means.get(Path(name).name, usual) for name in rest)
        if not rest:
            return ""
        return f", {seconds / 60:.0f} min left" if seconds >= 60 else f", {seconds:.0f} s left"


STAGES = Stages()


def plan_stages(self_train: Callable, config: argparse.Namespace, methods: Iterable[str]) -> None:
    """Find the names of all stages by going through the algorithms without doing anything."""
    plan = Plan(config)
    for method in methods:
        self_train(plan, method)
    STAGES.names = list(dict.fromkeys(plan.names))


def say_record(record: dict) -> None:
    """Print a record of a log as one line."""
    words = []
    for key, value in record.items():
        words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    left = "" if "step" in record else STAGES.left()  # after a stage's last line
    say(STAGES.label(record["stage"]) + "  ".join(words) + left)


class Lines:
    """For tqdm: where there is no terminal, each refresh of a bar becomes a line on stdout."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        pass


def progress(items: Iterable, title: str | None, unit: str) -> tqdm:
    """A progress bar over sized items in process 0, if it has a title.

    On a terminal it disappears when it is closed or exhausted; in a file it is a line a minute.
    """
    options = {}
    if not sys.stderr.isatty():
        options = {"file": Lines(), "delay": 60, "mininterval": 60, "maxinterval": 60}
    return tqdm(
        items,
        title and STAGES.label(title) + title,
        unit=unit,
        leave=False,
        disable=title is None or rank_and_count()[0] > 0,
        bar_format="{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} [{elapsed}<{remaining}]",
        **options,
    )


def say(line: str) -> None:
    """Print a line in process 0, above an open progress bar."""
    if rank_and_count()[0] == 0:
        tqdm.write(line)
        sys.stdout.flush()


def check_training(loss: float, norm: float, guessing: float, name: str) -> None:
    """Raise FloatingPointError if a training has diverged. guessing: a uniform guess's loss."""
    if not math.isfinite(norm) or loss > 10 * guessing:
        raise FloatingPointError(
            f"{name}: the loss is {loss:.4g} (that of guessing: {guessing:.1f}), the gradient's "
            f"norm {norm:.4g}: lower the learning rate, with another --out"
        )


def between(least: float, most: float, kind: type = float) -> Callable[[str], float]:
    """For argparse: a number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {least} to {most}, not {text}")
        return number

    return read


def named_file(text: str) -> tuple[str, str]:
    """For argparse: NAME=FILE."""
    name, _, file = text.partition("=")
    # Names that the log and the table already use.
    taken = name == "stage" or name.endswith(" without calculator")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, not {text!a:.60}")
    if taken or "|" in name or not name.isprintable():
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, with a name other than {text!a:.60}")
    return name, os.path.expanduser(file)


def check_files(parser: argparse.ArgumentParser, config: argparse.Namespace) -> None:
    """Expand ~ in paths; end the program if the flags for own problems are incomplete."""
    for name in ("out", "weights", "warm_up", "labeled", "unlabeled"):
        setattr(config, name, os.path.expanduser(getattr(config, name)))
    if bool(config.labeled) != bool(config.test) or (config.unlabeled and not config.labeled):
        parser.error("your own data: give both --labeled FILE and --test NAME=FILE")
    if len(dict(config.test)) < len(config.test):
        parser.error("--test NAME=FILE: give each name once")


# What torch says on a CPU, in cuBLAS, and where memory ends while a CUDA graph is recorded.
OUT_OF_MEMORY = re.compile("DefaultCPUAllocator|ALLOC_FAILED|out of memory|error during capture")


def run_command(main: Callable[[], None], then: str = "") -> None:
    """Run main() as a program.

    An error that a user can cause or fix becomes one sentence on stderr, with exit code 2; a fault
    of the program keeps its traceback. A signal ends the process after that sentence, so that a
    shell loop around it stops, too. then: what to add where the same command can continue.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a closed stream discards its output
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # ? for a character that the terminal lacks
    signal.signal(signal.SIGTERM, stop)  # torchrun and schedulers send it
    if not then and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program silently
    code = 0
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # no second message while this one exits
        sentence = explain(error, then)
        if isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # the rest of the output must not raise again
        if sentence is None:
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # erase what it has drawn
        with suppress(OSError):  # stderr may be the pipe that was closed
            say_once(f"{Path(sys.argv[0]).name}: {sentence}")
        code = 2
        if isinstance(error, KeyboardInterrupt):
            code = -(error.args[0] if error.args else signal.SIGINT)
    end(code)


def say_once(sentence: str) -> None:
    """Print on stderr; of several processes only the first that has an error does."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(sentence, file=sys.stderr)
        return
    mark = Path(tempfile.gettempdir()) / f"dpo-st-{os.getppid()}"  # torchrun's own number
    if mark.exists() and time.time() - mark.stat().st_mtime > 60:
        mark.unlink(missing_ok=True)  # of an earlier torchrun with this number
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(sentence, file=sys.stderr, flush=True)


def stop(number: int, _) -> None:
    """A signal handler: end like Ctrl-C, and remember the signal."""
    raise KeyboardInterrupt(number)


def end(code: int) -> None:
    """Exit with a code or, if it is negative, by that signal; without an error, just return."""
    n_processes = rank_and_count()[1]
    if code == 0:
        leave_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook goes on
    if code < 0 and os.name != "nt":
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if n_processes > 1:
        # torch's threads sometimes abort one of several processes that exits in the usual way.
        os._exit(code)
    if code != 0:
        sys.exit(code)


def explain(error: BaseException, then: str = "") -> str | None:
    """One sentence for an error that a user can cause or fix, None for a fault of this program."""
    message = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(message):
        return (
            "out of memory: lower --micro-batch-tokens (training) or --decode-batch-size "
            f"(sampling){then}"
        )
    if isinstance(error, KeyboardInterrupt):
        return f"stopped{then}"
    if isinstance(error, BrokenPipeError):
        return f"the output pipe was closed{then}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return message
    if isinstance(error, dist.DistError) or "gloo" in message:
        return f"another process has ended or hangs ({message:.100}){then}"
    return None
