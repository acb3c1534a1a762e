"""Real processes for tests: each rank is a process of its own, started from a clean parent that has imported torch already."""

import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "deepspeed", "megavlm.training.trainer"])


def run_ranks(world_size: int, function, *args, timeout_s: float = 120) -> list:
    """Call ``function(world, *args)`` in ``world_size`` processes of one process group.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        AssertionError: With the tracebacks if a rank fails, or saying which ranks hang after ``timeout_s``.
    """
    port = _free_port()
    queue = _context.Queue()
    # pickled here and in the ranks: multiprocessing would share tensors through file descriptors, too many of them
    call = pickle.dumps((function, args))
    processes = [_context.Process(target=_rank, args=(queue, rank, world_size, port, call)) for rank in range(world_size)]
    for process in processes:
        process.start()
    results, failures, deadline = {}, [], time.monotonic() + timeout_s
    try:
        while len(results) < world_size and not failures:
            left = deadline - time.monotonic()
            try:
                rank, result, failure = queue.get(timeout=max(0.1, min(left, 1.0)))
            except multiprocessing.queues.Empty:
                hanging = sorted(set(range(world_size)) - set(results))
                assert time.monotonic() < deadline, f"ranks {hanging} of {world_size} hang for {timeout_s:.0f} s"
                dead = [r for r in hanging if processes[r].exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died: {[processes[r].exitcode for r in dead]}"
                continue
            results[rank] = result
            failures += [failure] if failure else []
        assert not failures, failures[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [pickle.loads(results[rank]) for rank in range(world_size)]


def _rank(queue, rank: int, world_size: int, port: int, call: bytes) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from megavlm.system import world as distributed

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        result = function(distributed.start(timeout_s=60), *args)
        queue.put((rank, pickle.dumps(result), None))
    except BaseException:
        queue.put((rank, None, f"rank {rank}:\n{traceback.format_exc()}"))
    queue.close()
    queue.join_thread()


def _free_port() -> int:
    """A port below those that the system gives to connections: two test processes that look at the same time hardly meet."""
    while True:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port := random.SystemRandom().randrange(10_000, 30_000)))
                return port
            except OSError:
                continue
