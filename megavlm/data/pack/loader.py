"""From lanes to steps: a rank's packs, built in its own process or in loader workers."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from threading import Thread, current_thread, main_thread

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megavlm.data.pack.lane import Lane, State
from megavlm.data.pack.pack import Pack
from megavlm.errors import ConfigError, LostProcess, MegavlmError

DEAF_TO = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A worker that dies of the job's warning signal takes the emergency checkpoint with it."""


def lanes_of(rank: int, world_size: int, num_lanes: int) -> list[int]:
    """The lanes that a rank runs: rank, rank + world_size, ….

    Raises:
        ConfigError: If the world size does not divide the lanes.
    """
    if num_lanes % world_size:
        fitting = [w for w in range(1, num_lanes + 1) if num_lanes % w == 0]
        raise ConfigError(
            f"{world_size} processes cannot share data.num_lanes = {num_lanes} lanes evenly\n"
            f"  do:    start {', '.join(map(str, fitting))} processes, or choose lanes that {world_size} divides"
        )
    return list(range(rank, num_lanes, world_size))


class _Steps(IterableDataset):
    """Per step the packs of some lanes. Worker w of n has the lanes w, w+n, …, and one item is its part of a step.

    The part of a worker whose lanes have ended is empty; an error of the data is an item too, so that it arrives as it is.
    """

    def __init__(self, make_lane, lanes: list[int], states: dict[int, State]):
        self.make_lane = make_lane
        self.lanes = lanes
        self.states = states

    def __iter__(self) -> Iterator[list[tuple[Pack, State]] | MegavlmError]:
        worker = get_worker_info()
        mine = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        try:
            lanes: list[Lane] = [self.make_lane(number, self.states.get(number)) for number in mine]
            while True:
                # a lane of finite sources ends; the others go on without it
                yield [pair for lane in lanes if (pair := next(lane, None)) is not None]
        except MegavlmError as error:
            yield error


def _prepare_worker(_worker: int) -> None:
    """Only the trainer's own SIGTERM ends a worker: its `multiprocessing` sends one to workers left over, and waits for them for ever."""
    # after all other finalizers: an interpreter that ends under the thread that feeds packs to the queue, in the middle of torch's C++,
    # aborts, and the trainer takes that for a worker that was killed
    util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
    signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    trainer = os.getppid()

    def listen() -> None:
        while True:
            heard = signal.sigwaitinfo(DEAF_TO)
            if (heard.si_signo, heard.si_pid) == (signal.SIGTERM, trainer):
                os._exit(0)

    Thread(target=listen, daemon=True).start()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here inherit the blocked signals, so that they are deaf before their first line runs.

    A signal for this process itself is not lost: it comes when the block ends.
    """
    # else it is started with the first worker, and unblocks signals when it is
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaths_told_by_the_queue() -> Iterator[None]:
    """Keep torch from installing a handler of SIGCHLD.

    It raises wherever the main thread happens to be when a worker dies, such as in a forward pass, and out of the collectives of all ranks.
    Without it the death is found where a pack of that worker is waited for.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGCHLD, before)


class Loader:
    """An iterator of steps: the packs of this rank's lanes in lane order, and the states after them.

    Args:
        make_lane: ``(number, state) -> Lane``; picklable if there are workers.
        lanes: The rank's lanes.
        states: Lane → state to go on from; empty at the start of a run.
        num_workers: Processes that build packs ahead; at most one per lane is used.
        prefetch_packs: Packs that each prepares, rounded up to whole steps.
        pin_memory: Put packs in page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, make_lane, lanes: list[int], states: dict[int, State], num_workers: int, *, prefetch_packs: int, pin_memory: bool):
        self.lanes = lanes
        self.num_workers = min(num_workers, len(lanes))
        options = {}
        if self.num_workers:
            lanes_per_worker = -(-len(lanes) // self.num_workers)
            options = {"prefetch_factor": -(-prefetch_packs // lanes_per_worker), "multiprocessing_context": "spawn"}
        with _signals_blocked(), _deaths_told_by_the_queue():
            self._parts = iter(
                DataLoader(
                    _Steps(make_lane, lanes, states),
                    batch_size=None,
                    num_workers=self.num_workers,
                    pin_memory=pin_memory,
                    worker_init_fn=_prepare_worker,
                    **options,
                )
            )

    def __iter__(self) -> Iterator[tuple[list[Pack], dict[int, State]]]:
        return self

    def __next__(self) -> tuple[list[Pack], dict[int, State]]:
        pairs = []
        for _ in range(max(1, self.num_workers)):
            part = self._next_part()
            if isinstance(part, MegavlmError):
                raise part
            pairs += part
        if not pairs:
            raise StopIteration
        pairs.sort(key=lambda pair: pair[0].lane)
        return [pack for pack, _ in pairs], {pack.lane: state for pack, state in pairs}

    def close(self) -> None:
        """End the workers; the packs that they prepared are lost, the lanes' states are not."""
        self._parts = iter(())

    def _next_part(self) -> list[tuple[Pack, State]] | MegavlmError:
        try:
            return next(self._parts)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("exited unexpectedly", "killed by signal")):
                raise
            raise LostProcess(
                f"a loader worker has died: {error}\n"
                "  do:    look for a lack of memory (data.num_workers, data.prefetch_packs), and start again: "
                "nothing is lost but the steps since the last checkpoint"
            ) from error
