"""What all fuzzers share: a process that tries cases under limits, the verdict on each, and a table of all.

    table = try_cases(train_one_step, {"optimizer.eps=inf": {...}, ...}, seconds=30)
    print(table)
    table.check()

A spawned process imports what is slow once. Every case then runs in a fork of it: nothing that a case leaves behind reaches the
next one, and a hang, a crash or too much memory ends that case only. A case may end in two ways: the function returns a word for what
it did ("trained"), or it raises a `MegavlmError` whose message says what to do. All else is a failure: another exception, a hang, a
process that died, or more than `GROWTH_BYTES` of memory. Cases that leave nothing behind may share a process (``per_process``).
"""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.errors import MegavlmError

GROWTH_BYTES = 2 << 30
"""More memory than this for one case is a failure."""
LONGEST_MESSAGE = 4000
"""Characters: nobody reads more."""
FAILURES = ("uncaught", "undocumented", "hang", "died", "memory")
PRELOAD = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "transformers.models.qwen3.modeling_qwen3",
    "torch.utils.tensorboard",
    "megavlm.launch.train",
    "megavlm.training.trainer",
    "megavlm.observers.drawings",
    "megavlm.observers.instruments",
    "megavlm.parts.resolve",
)
_POLL_S = 0.01


@dataclass(frozen=True)
class Limits:
    """Of a case, and where its process leaves the result."""

    seconds: float
    growth_bytes: int
    scratch: Path


@dataclass(frozen=True)
class Outcome:
    """How one case ended."""

    name: str
    kind: str
    """`refused` (a documented message), what the function returned, or one of `FAILURES`."""
    detail: str
    """The message, or the traceback."""
    seconds: float
    growth_bytes: int
    """Most memory that the case had beyond what its process began with."""


@dataclass
class Table:
    """All cases of a fuzzer."""

    title: str
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind in FAILURES]

    def __str__(self) -> str:
        counts = Counter(outcome.kind for outcome in self.outcomes)
        slowest = max(self.outcomes, key=lambda outcome: outcome.seconds)
        largest = max(self.outcomes, key=lambda outcome: outcome.growth_bytes)
        lines = [
            f"{self.title}: {len(self.outcomes)} cases in {self.seconds:.0f} s",
            *(f"  {kind:<14}{count:>6}" for kind, count in counts.most_common()),
            f"  longest case  {slowest.seconds:.1f} s  ({slowest.name[:80]})",
            f"  most memory   {largest.growth_bytes / 2**20:.0f} MiB  ({largest.name[:80]})",
        ]
        return "\n".join(lines)

    def check(self, show: int = 20) -> None:
        """Raises an AssertionError with the table and the first failures, if there are any."""
        shown = [f"\n--- {bad.kind}: {bad.name[:400]}\n{bad.detail[-3000:]}" for bad in self.failures[:show]]
        assert not self.failures, f"{self}\n" + "\n".join(shown)


def try_cases(
    function: Callable[..., str],
    cases: Mapping[str, Sequence[Any]],
    *,
    seconds: float,
    growth_bytes: int = GROWTH_BYTES,
    per_process: int = 1,
    title: str = "",
    preload: Sequence[str] = PRELOAD,
    seen: Callable[[Outcome], None] = lambda outcome: None,
) -> Table:
    """Try every case in a process of its own.

    Args:
        function: Called with the arguments of a case; returns a word for what it did. Module-level: it is pickled.
        cases: Name, from which a person can repeat it → the arguments (picklable).
        seconds: A case that takes longer hangs.
        growth_bytes: A case that takes more memory fails.
        per_process: So many cases, one after the other, share a process until one of them fails.
        title: Of the table.
        preload: Modules to import before the first case.
        seen: Called with every outcome as it comes.
    """
    table, begin = Table(title or function.__name__), time.monotonic()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as scratch:
        limits = Limits(seconds, growth_bytes, Path(scratch))
        nursery = context.Process(target=_serve, args=(there, pickle.dumps(function), tuple(preload), limits), daemon=False)
        nursery.start()
        there.close()
        try:
            waiting = [(name, tuple(arguments)) for name, arguments in cases.items()]
            while waiting:
                here.send_bytes(pickle.dumps(waiting[:per_process]))
                outcomes = here.recv()
                for outcome in outcomes:
                    seen(outcome)
                table.outcomes += outcomes
                del waiting[: len(outcomes)]
        finally:
            here.close()
            nursery.join()
    table.seconds = time.monotonic() - begin
    return table


def judge(function: Callable[..., str], arguments: Sequence[Any]) -> tuple[str, str]:
    """Call the function here: the kind of its end, and the message or traceback."""
    try:
        return function(*arguments), ""
    except MegavlmError as error:
        try:
            message = str(error)
            kind = "refused" if is_documented(message) else "undocumented"
            return kind, message if kind == "refused" else message[:2000] + "\n" + traceback.format_exc()[-2000:]
        except Exception:
            return "undocumented", traceback.format_exc()
    except BaseException:
        return "uncaught", traceback.format_exc()


def is_documented(message: str) -> bool:
    """Whether a message says what is wrong and what to do, in a length that is read, and can be printed."""
    message.encode()
    head, _, remedy = message.partition("\n  do:")
    return bool(head.strip() and remedy.strip()) and len(message) < LONGEST_MESSAGE and "Traceback" not in message


def _serve(connection, function: bytes, preload: Sequence[str], limits: Limits) -> None:
    """The spawned process: forks a child for every case that arrives, until the pipe closes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in preload:
        importlib.import_module(module)
    call = pickle.loads(function)
    while True:
        try:
            batch = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send(_watch(batch, call, limits))


def _watch(batch: list[tuple[str, Sequence[Any]]], call: Callable[..., str], limits: Limits) -> list[Outcome]:
    """Fork a child for some cases, and end it where one exceeds the limits: the outcomes of those that were tried."""
    results, output = limits.scratch / "results", limits.scratch / "output"
    results.write_bytes(b"")
    own, largest, failure = _memory(os.getpid(), "RssAnon"), 0, ""
    outcomes: list[Outcome] = []
    child = os.fork()
    if child == 0:
        _run_in_child(batch, call, limits.seconds, results, output)
    begin, status = time.monotonic(), None
    while status is None and not failure:
        done, status_now = os.waitpid(child, os.WNOHANG)
        status = status_now if done else None
        # not the whole resident size: a fork begins without the pages of files that its parent has
        largest = max(largest, _memory(child, "RssAnon") - own)
        for kind, detail, peak in _read_results(results)[len(outcomes) :]:
            growth = max(largest, peak)
            kind = "memory" if growth > limits.growth_bytes else kind
            outcomes.append(Outcome(batch[len(outcomes)][0], kind, detail, time.monotonic() - begin, growth))
            begin, largest = time.monotonic(), 0
        if largest > limits.growth_bytes:
            failure = "memory"
        elif time.monotonic() - begin > limits.seconds:
            failure = "hang"
        elif status is None:
            time.sleep(_POLL_S)
    # also what it started itself
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    if not (outcomes and outcomes[-1].kind in FAILURES) and len(outcomes) < len(batch):
        detail = f"wait status {status}\n{output.read_text(errors='replace')[-4000:]}"
        outcomes.append(Outcome(batch[len(outcomes)][0], failure or "died", detail, time.monotonic() - begin, max(0, largest)))
    return outcomes


def _read_results(path: Path) -> list[tuple[str, str, int]]:
    """The results that a child has written so far."""
    found = []
    with path.open("rb") as file, suppress(EOFError, pickle.UnpicklingError):
        while True:
            found.append(pickle.load(file))
    return found


def _run_in_child(batch: list, call: Callable[..., str], seconds: float, results: Path, output: Path) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    begin = _memory(os.getpid(), "VmRSS")
    for _, arguments in batch:
        # a hang says where
        faulthandler.dump_traceback_later(max(0.5, seconds - 1), file=2)
        result = judge(call, arguments)
        # the peak is one case's only where the process is
        peak = _memory(os.getpid(), "VmHWM") - begin if len(batch) == 1 else 0
        with results.open("ab") as file:
            file.write(pickle.dumps((*result, peak)))
        if result[0] in FAILURES:
            break
    os._exit(0)


def _memory(process: int, what: str) -> int:
    """Bytes of memory that a process has (VmRSS), has beside files (RssAnon), or had at most (VmHWM); 0 of one that is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(what + ":"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0
