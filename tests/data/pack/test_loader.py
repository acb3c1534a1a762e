"""Loader workers: deaf to the job's signals, and never left over."""

import atexit
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time

import pytest

from megavlm.data.pack.loader import Loader
from megavlm.errors import LostProcess

SCRIPT = """
import multiprocessing, os, pickle, subprocess, sys

def main():
    from megavlm.data.pack.loader import Loader

    global loader  # alive until the interpreter ends, as after an error whose traceback holds it
    loader = Loader(pickle.load(open(sys.argv[1], "rb")), [0, 1, 2, 3], {}, 2, prefetch_packs=2, pin_memory=False)
    next(loader)
    workers = multiprocessing.active_children()
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", "-" + name, *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(20):
        next(loader)
    print(*(worker.is_alive() for worker in workers))
    if sys.argv[2] == "close":
        loader.close()
        print(*(worker.is_alive() for worker in workers))
    else:
        import torch.utils.data

        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # its patience at the end of the interpreter

if __name__ == "__main__":
    main()
"""


def run_script(factory, tmp_path, end: str) -> list[str]:
    (tmp_path / "factory").write_bytes(pickle.dumps(factory))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "factory"), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_workers_outlive_the_jobs_signals_and_end_with_their_loader(make_factory, corpus_sources, tmp_path):
    factory = make_factory(corpus_sources, num_lanes=4)
    assert run_script(factory, tmp_path, "close") == ["True True", "False False"]


def test_a_loader_that_was_never_closed_does_not_keep_its_process(make_factory, corpus_sources, tmp_path):
    factory = make_factory(corpus_sources, num_lanes=4)
    assert run_script(factory, tmp_path, "leave") == ["True True"]


class AtExit:
    """Makes lanes in a process that leaves a file behind if its interpreter is torn down."""

    def __init__(self, factory, file):
        self.factory, self.file = factory, file

    def __call__(self, number, state=None):
        atexit.register(self.file.touch)
        return self.factory(number, state)


def test_a_worker_that_is_ended_while_it_feeds_packs_cannot_abort(make_factory, corpus_sources, tmp_path):
    """Tearing an interpreter down under the thread that feeds aborts one worker in twenty, which the trainer takes for a killed one."""
    loader = Loader(
        AtExit(make_factory(corpus_sources, num_lanes=4), tmp_path / "torn_down"), [0, 1, 2, 3], {}, 1, prefetch_packs=4, pin_memory=False
    )
    next(loader)
    (worker,) = multiprocessing.active_children()
    loader.close()
    assert not worker.is_alive() and not (tmp_path / "torn_down").exists()


@pytest.mark.timeout(120)
def test_a_killed_worker_is_found_where_its_packs_are_waited_for_and_nowhere_else(make_factory, corpus_sources):
    """Torch's handler of SIGCHLD would raise in the midst of a forward pass."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = Loader(make_factory(corpus_sources, num_lanes=4), [0, 1, 2, 3], {}, 2, prefetch_packs=2, pin_memory=False)
    next(loader)
    assert signal.getsignal(signal.SIGCHLD) == before
    victim, *_ = multiprocessing.active_children()
    victim.kill()
    deadline_s = time.monotonic() + 1.0
    while time.monotonic() < deadline_s:  # a forward pass: any line of it may be the one at which a handler raises
        pass
    with pytest.raises(LostProcess, match=r"a loader worker has died[^$]*data.num_workers"):
        for _ in range(50):
            next(loader)
    loader.close()
