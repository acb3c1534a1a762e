"""Which start of a run may write checkpoints. After a lost node the processes of the old start can live on beside the
new ones.

Tested by `tests/engine/test_checkpoint.py`.
"""

import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from megavlm.errors import MegavlmError
from megavlm.system.files import DamagedFile, read_json, write_atomically

log = logging.getLogger(__name__)


class Superseded(MegavlmError):
    """A newer start of the same run has taken over its folder."""


class Ownership:
    """Taken by rank 0 when a run starts, checked before anything is renamed or removed.

    Args:
        folder: The folder of the checkpoints.
        environment: Where SLURM_JOB_ID and SLURM_RESTART_COUNT are.

    Raises:
        Superseded: If a later restart of the same SLURM job owns the folder already.
    """

    def __init__(self, folder: Path, environment=os.environ):
        self.file = folder / "owner.json"
        self.mine = {
            "job": environment.get("SLURM_JOB_ID", ""),
            "restart": int(environment.get("SLURM_RESTART_COUNT", 0)),
            "token": uuid.uuid4().hex[:12],
        }
        folder.mkdir(parents=True, exist_ok=True)
        other = self._read()
        if other and other["job"] and other["job"] == self.mine["job"] and other["restart"] > self.mine["restart"]:
            raise Superseded(self._message(other))
        write_atomically(self.file, json.dumps(self.mine))

    @property
    def token(self) -> str:
        """A name that no other start has."""
        return self.mine["token"]

    def check(self) -> None:
        """Raises:
        Superseded: If a later start owns the folder now.
        """
        other = self._read()
        if other is None:  # nobody's: who takes a folder over writes the file whole
            write_atomically(self.file, json.dumps(self.mine))
        elif other != self.mine:
            raise Superseded(self._message(other))

    def _read(self) -> dict[str, Any] | None:
        """Who owns the folder; None if nobody does, or if the file is damaged.

        Raises:
            DamagedFile: If it cannot be read now: it may be another's.
        """
        if not os.path.lexists(self.file):
            return None
        try:
            other = read_json(self.file)
            if [type(other.get(name)) for name in ("job", "restart", "token")] == [str, int, str]:
                return other
            what = f"{self.file} is damaged: it names no owner"
        except DamagedFile as error:
            if isinstance(error.__cause__, OSError):
                raise
            what = error.what
        log.warning("%s: this start takes the folder over", what)
        return None

    def _message(self, other: dict) -> str:
        return (
            f"another start of this run owns {self.file.parent}: job {other['job'] or 'none'}, restart {other['restart']}\n"
            "  do:    let that one go on; this one ends without writing anything"
        )
