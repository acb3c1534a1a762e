"""From lanes to steps: a rank's packs, built in its own process or in loader workers."""

import logging
import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megavlm.data.lane import Lane, State
from megavlm.data.pack import Pack
from megavlm.errors import ConfigError

log = logging.getLogger(__name__)


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


class _RoundRobin(IterableDataset):
    """The packs of some lanes in turn. In worker w of n, the lanes w, w+n, …, so that taking from the workers in turn
    gives the same order as having no workers."""

    def __init__(self, make_lane, lanes: list[int], states: dict[int, State]):
        self.make_lane, self.lanes, self.states = make_lane, lanes, states

    def __iter__(self) -> Iterator[tuple[Pack, State]]:
        worker = get_worker_info()
        mine = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        lanes: list[Lane] = [self.make_lane(number, self.states.get(number)) for number in mine]
        while True:
            for lane in lanes:
                yield next(lane)


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # a worker that dies of the job's warning signal takes the emergency checkpoint with it
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class Loader:
    """An endless iterator of steps: the packs of this rank's lanes in lane order, and the states after them.

    Args:
        make_lane: ``(number, state) -> Lane``; picklable if there are workers.
        lanes: The rank's lanes.
        states: Lane → state to go on from; empty at the start of a run.
        num_workers: Processes that build packs ahead; rounded down to a divisor of the number of lanes.
        prefetch_packs: Packs that each prepares.
        pin_memory: Put packs in page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(
        self, make_lane, lanes: list[int], states: dict[int, State], num_workers: int, prefetch_packs: int, pin_memory: bool
    ):
        self.lanes = lanes
        workers = max(n for n in range(num_workers + 1) if n == 0 or len(lanes) % n == 0)
        if workers < num_workers:
            log.info("data.num_workers = %d does not divide %d lanes: using %d", num_workers, len(lanes), workers)
        options = {"prefetch_factor": prefetch_packs, "multiprocessing_context": "spawn"} if workers else {}
        self._packs = iter(
            DataLoader(
                _RoundRobin(make_lane, lanes, states),
                batch_size=None,
                num_workers=workers,
                pin_memory=pin_memory,
                worker_init_fn=_leave_signals_to_the_trainer,
                **options,
            )
        )

    def __iter__(self) -> Iterator[tuple[list[Pack], dict[int, State]]]:
        return self

    def __next__(self) -> tuple[list[Pack], dict[int, State]]:
        pairs = [next(self._packs) for _ in self.lanes]
        return [pack for pack, _ in pairs], {pack.lane: state for pack, state in pairs}


