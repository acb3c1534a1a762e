"""Which start of a run may write checkpoints. After a lost node the processes of the old start can live on beside the
new ones."""

import json
import os
import uuid
from pathlib import Path

from megavlm.errors import MegavlmError
from megavlm.system.files import write_atomically


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
        if self.file.exists():
            other = json.loads(self.file.read_text())
            if other["job"] and other["job"] == self.mine["job"] and other["restart"] > self.mine["restart"]:
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
        if (other := json.loads(self.file.read_text())) != self.mine:
            raise Superseded(self._message(other))

    def _message(self, other: dict) -> str:
        return (
            f"another start of this run owns {self.file.parent}: job {other['job'] or 'none'}, restart {other['restart']}\n"
            "  do:    let that one go on; this one ends without writing anything"
        )
