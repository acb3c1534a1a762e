"""Checkpoints: sharded, written by all ranks while training goes on, complete or invisible, loadable at any world size that
divides the lanes.

    checkpoints/
        owner.json          which start of the run may write here
        step-00000500/
            manifest.json   step, world size, metrics, size and SHA-256 of every other file; its presence marks a complete checkpoint
            state.json      steps of every parameter group, state of every data lane, loss statistics, totals
            tensors/        see `megavlm.engine.shards` and `megavlm.engine.zero_state`

``save`` copies the shards to host memory, which is the only thing that training waits for, and leaves the rest to a
thread: every rank writes and hashes its own file in a folder with a temporary name, and rank 0 renames the folder last.
The thread talks over a process group of its own, to rank 0 and back.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from megavlm.engine.protocol import Engine
from megavlm.engine.shards import LAYOUT, layout, write_part
from megavlm.engine.weights import check_tensors, shards_of
from megavlm.engine.zero_state import Staging, group_steps, install, numel_of, set_group_steps
from megavlm.errors import MegavlmError
from megavlm.runs import manifest
from megavlm.runs.manifest import checkpoints_in, complete_checkpoints, verify
from megavlm.runs.ownership import Ownership, Superseded
from megavlm.runs.retention import CheckpointConfig
from megavlm.system.files import read_json, sync_folder, write_synced
from megavlm.system.harmless import harmless
from megavlm.system.world import World, new_host_group

log = logging.getLogger(__name__)

Value = TypeVar("Value")

WRITING_TIMEOUT_S = 3600
"""A file system that does not answer for so long is given up."""


@dataclass(frozen=True)
class Saved:
    """The outcome of a save, the same on all ranks (the times are this rank's)."""

    step: int
    path: Path | None
    """None if it failed."""
    error: str
    stall_s: float
    """How long training waited."""
    seconds: float
    """From the call to the rename."""
    num_bytes: int
    """Bytes of all files."""


class Checkpointer:
    """Saves and restores the whole state of a run. Made by all ranks together.

    Args:
        folder: Where checkpoints live.
        world: The processes.
        config: The recipe's ``checkpoint``: which ones stay, and whether training goes on while they are written.

    Raises:
        Superseded: If a newer start of the same job owns the folder.
    """

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        self.folder = folder
        self.world = world
        self.config = config
        self._owner: Ownership | None = None
        self._group = new_host_group(WRITING_TIMEOUT_S)
        self._on_main(self._take_folder)
        self._staging = Staging(world.rank)
        self._writer = ThreadPoolExecutor(1, "checkpoint", initializer=_use_device, initargs=(world.device,))
        self._pending: Future | None = None
        self._seconds: list[float] = []
        self.last_step: int | None = None

    @property
    def expected_s(self) -> float:
        """How long a save takes, going by the last three; 0 before the first."""
        return max(self._seconds[-3:], default=0.0)

    def save(
        self,
        step: int,
        engine: Engine,
        lanes: dict[int, Any],
        shared: dict | None = None,
        *,
        metrics: dict | None = None,
        of_rank: Any = None,
    ) -> float:
        """Begin a checkpoint of the state after ``step`` optimizer steps. Called by all ranks together.

        Args:
            step: Steps done.
            engine: The DeepSpeed engine.
            lanes: State of each of this rank's data lanes.
            shared: What else must be there when the run goes on; rank 0's is kept.
            metrics: TensorBoard tag → value, for the retention rule; rank 0's are kept.
            of_rank: What each rank adds; comes back as the list ``ranks``.

        Returns:
            Seconds that training waited, the end of the save before this one included.
        """
        begin = time.perf_counter()
        self.wait()
        if step == self.last_step:  # this very state is on the disk
            return 0.0
        if self._owner and self.config.keep_best and (metrics or {}).get(self.config.best_metric) is None:
            log.warning("the checkpoint of step %d has no rank: %s was not reported before it", step, self.config.best_metric)
        tensors, steps = self._staging.copy_from(engine), group_steps(engine)
        stall_s = time.perf_counter() - begin
        self.last_step = step
        state = {"step": step, "group_steps": steps, **(shared or {})}
        content = _Content(tensors, numel_of(engine), state, (lanes, of_rank), metrics or {}, begin)
        self._pending = self._writer.submit(self._write, content, stall_s)
        if not self.config.background:
            wait = self.wait()
            return wait.seconds if wait else 0.0
        return stall_s

    def finished(self) -> Saved | None:
        """The outcome of a save that has ended since the last call; None if there is none.

        Raises:
            Superseded: If a newer start of the run has taken over.
        """
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Saved | None:
        """Wait for the save that is under way, report its outcome and return it; None if there is none."""
        if self._pending is None:
            return None
        saved, self._pending = self._pending.result(), None
        if saved.error:
            self.last_step = None
            log.error(
                "the checkpoint of step %d could not be written: %s\n  the newest complete one is %s\n"
                "  do:    make room or mend the file system; the run goes on and tries again at the next save",
                saved.step,
                saved.error,
                next((path.name for path in reversed(complete_checkpoints(self.folder))), "none"),
            )
        else:
            self._seconds.append(saved.seconds)
            log.info(
                "checkpoint %s: %.1f MB in %.2f s, training waited %.3f s",
                saved.path,
                saved.num_bytes / 1e6,
                saved.seconds,
                saved.stall_s,
            )
        return saved

    def restore_newest(self, engine: Engine) -> dict[str, Any] | None:
        """Put the newest intact checkpoint into the engine; None if there is no checkpoint. Called by all ranks together.

        A damaged one is named in the log, and set aside as ``damaged-step-…`` once an older one is taken.

        Raises:
            MegavlmError: If there are checkpoints, but none is intact; also if they were set aside before.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self._on_main(partial(checkpoints_in, self.folder))):
            if problems := self._problems(path):
                damaged[path] = "; ".join(problems)
                log.error("checkpoint %s is damaged and not taken: %s", path, damaged[path])
                continue
            self._set_aside(list(damaged))
            return self.restore(path, engine)
        damaged |= dict.fromkeys(self._on_main(partial(manifest.set_aside, self.folder)), "was damaged and set aside")
        if damaged:
            raise MegavlmError(
                "every checkpoint of this run is damaged:\n  " + "\n  ".join(f"{path}: {what}" for path, what in damaged.items()) + "\n"
                f"  do:    bring one back from a copy; or remove {self.folder} to begin at step 0"
            )
        return None

    def restore(self, path: Path, engine: Engine) -> dict[str, Any]:
        """Put a checkpoint that is known to be intact into the engine. Called by all ranks together.

        Returns:
            ``{"step": …, "group_steps": {…}, "lanes": {"0": state, …}, …}``, with what ``save`` got as ``shared``.

        Raises:
            MegavlmError: If it is that of another model.
        """
        state = read_json(path / "state.json")
        set_group_steps(engine, state["group_steps"])
        shards = shards_of(path)
        check_tensors(path, shards, numel_of(engine))
        install(shards.read, engine, self.world.rank)
        self._seconds = [manifest.read_manifest(path)["seconds"]]
        self.last_step = state["step"]
        return state

    def close(self) -> Saved | None:
        """Wait for the last save."""
        saved = self.wait()
        self._writer.shutdown()
        return saved

    def _take_folder(self) -> None:
        """What rank 0 does first: nobody else may write from now on."""
        try:
            self._owner = Ownership(self.folder)
        except OSError as error:
            raise MegavlmError(
                f"{self.folder} cannot be written: {error.strerror}\n  do:    make room, or mend the file system or its permissions"
            ) from error
        manifest.remove_leftovers(self.folder)

    def _set_aside(self, damaged: list[Path]) -> None:
        if owner := self._owner:
            for path in damaged:
                with harmless(f"the new name of the damaged checkpoint {path}"):
                    path.rename(path.with_name(f"damaged-{path.name}-{owner.token}"))

    def _problems(self, path: Path) -> list[str]:
        parts = self._each(lambda: verify(path, self.world.rank, self.world.size))
        return self._on_main(lambda: sorted({problem for part in parts for problem in part}))

    def _write(self, content: "_Content", stall_s: float) -> Saved:
        """What the thread does, on all ranks."""
        step, begin = content.state["step"], content.begin
        try:
            path, num_bytes = self._write_files(content)
        except Superseded:
            raise
        except Exception as error:  # whatever it was, the run goes on
            return Saved(step, None, f"{type(error).__name__}: {error} ({_room(self.folder)})", stall_s, time.perf_counter() - begin, 0)
        return Saved(step, path, "", stall_s, time.perf_counter() - begin, num_bytes)

    def _write_files(self, content: "_Content") -> tuple[Path, int]:
        final = self.folder / manifest.folder_name(content.state["step"])
        temporary = self._on_main(partial(self._make_temporary, final))
        try:
            parts = self._each(lambda: (write_part(temporary / "tensors", self.world.rank, content.tensors), content.of_rank))
            return final, self._on_main(lambda: self._complete(temporary, final, content, parts))
        except BaseException:
            if self._owner:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_temporary(self, final: Path) -> Path:
        assert self._owner is not None
        temporary = self.folder / f".writing-{final.name}-{self._owner.token}"
        (temporary / "tensors").mkdir(parents=True)
        return temporary

    def _complete(self, temporary: Path, final: Path, content: "_Content", parts: list[tuple[dict, tuple]]) -> int:
        """Rank 0's last act: layout, state, manifest, rename, retention. Gives the bytes of all files.

        Args:
            temporary: Where they are.
            final: Where they are to be.
            content: The state, and what rank 0 adds.
            parts: Of each rank what it wrote, and what it adds.
        """
        lanes = {str(lane): state for _, (of_lanes, _) in parts for lane, state in of_lanes.items()}
        state = content.state | {"lanes": lanes, "ranks": [other for _, (_, other) in parts]}
        files = {f"tensors/{name}": entry for entries, _ in parts for name, entry in entries.items()}
        texts = {f"tensors/{LAYOUT}": layout(content.numel, self.world.size), "state.json": json.dumps(state)}
        for name, text in texts.items():
            write_synced(temporary / name, text)
            files[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        entries = {"format": 3, "step": state["step"], "world_size": self.world.size, "metrics": content.metrics}
        entries |= {"seconds": round(time.perf_counter() - content.begin, 3), "files": dict(sorted(files.items()))}
        entries["sha256"] = manifest.digest_of_manifest(entries)
        write_synced(temporary / "manifest.json", json.dumps(entries, indent=1))
        sync_folder(temporary / "tensors")
        sync_folder(temporary)
        assert self._owner is not None
        self._owner.check()
        if final.exists():  # of an earlier life of this run, which went on from an older checkpoint
            manifest.remove(final)
        temporary.rename(final)
        sync_folder(self.folder)
        with harmless(f"the removal of old checkpoints in {self.folder}"):  # this one is complete
            for old in self.config.doomed(complete_checkpoints(self.folder)):
                manifest.remove(old)
        return sum(entry["bytes"] for entry in files.values())

    def _each(self, function: Callable[[], Value]) -> list[Value]:
        """What ``function`` returned on each rank, on rank 0; nothing on the others. If it raised on one, all ranks raise."""
        outcomes: list[Any] = [None] * self.world.size if self.world.is_main else []
        distributed.gather_object(_outcome(function), outcomes or None, dst=0, group=self._group)
        self._raise_alike(next((failure for _, failure in outcomes if failure is not None), None))
        return [result for result, _ in outcomes]

    def _on_main(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returned on rank 0, on all ranks; if it raised, all ranks raise."""
        result, failure = _outcome(function) if self.world.is_main else (None, None)
        return self._raise_alike(failure, result)

    def _raise_alike(self, failure: Exception | None, result: Any = None) -> Any:
        said = [(result, failure)]
        distributed.broadcast_object_list(said, src=0, group=self._group)
        result, failure = said[0]
        if failure is not None:
            raise failure
        return result


@dataclass(frozen=True)
class _Content:
    """What is saved."""

    tensors: dict[str, torch.Tensor]
    """This rank's part of each."""
    numel: dict[str, int]
    """Elements of each whole one."""
    state: dict[str, Any]
    of_rank: tuple[dict[int, Any], Any]
    """States of this rank's lanes, and what it adds."""
    metrics: dict[str, Any]
    begin: float
    """When the save began, by `time.perf_counter`."""


def _outcome(function: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _use_device(device: torch.device) -> None:
    """A new thread would otherwise use the first device, and take half a gigabyte of it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _room(folder: Path) -> str:
    """What else one wants to know when a file could not be written."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    except OSError as error:
        return f"{folder}: {error.strerror}"
