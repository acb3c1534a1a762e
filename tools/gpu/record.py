"""The JSON of a check: what was tried, what came out, what is left. Tested by `tests/tools/test_gpu_check.py`.

``sections[NAME].items[ITEM]`` has a ``status``: passed, failed or running. One that is passed or failed is not tried again.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megavlm.system.files import read_json, write_atomically

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "deepspeed", "triton", "numpy")
MOST_TRIES = 2
"""An item that ended its process so often is given up."""


def source_digest() -> str:
    """Which code this is."""
    digest = hashlib.sha256()
    for folder in ("megavlm", "tools/gpu"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


class Record:
    """The JSON file; every change is written at once.

    Args:
        path: It need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tree: dict[str, Any] = read_json(path) if path.exists() else {"sessions": [], "sections": {}}

    def begin_session(self, device: str, minutes: float) -> None:
        """Note who goes on from here."""
        versions = {name: _version(name) for name in PACKAGES}
        self.tree["sessions"].append({
            "begin": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "device": device, "minutes": minutes, "command": sys.argv,
            "source": source_digest(), "python": platform.python_version(), "versions": versions,
        })  # fmt: skip
        self.write()

    @property
    def device(self) -> str | None:
        """The device of the sessions so far."""
        return self.tree["sessions"][0]["device"] if self.tree["sessions"] else None

    def section(self, name: str) -> dict[str, Any]:
        return self.tree["sections"].setdefault(name, {"seconds": 0.0, "items": {}})

    def items(self, section: str) -> dict[str, dict[str, Any]]:
        return self.section(section)["items"]

    def result(self, section: str, item: str) -> dict[str, Any] | None:
        """What an item measured, if it has."""
        return self.tree["sections"].get(section, {"items": {}})["items"].get(item, {}).get("result")

    def is_done(self, section: str, item: str) -> bool:
        return self.items(section).get(item, {}).get("status") in ("passed", "failed")

    def forget(self, section: str) -> None:
        """The section will be tried again."""
        self.tree["sections"].pop(section, None)
        self.write()

    def begin(self, section: str, item: str) -> None:
        tries = self.items(section).get(item, {}).get("tries", 0) + 1
        self.items(section)[item] = {"status": "running", "tries": tries, "session": len(self.tree["sessions"]) - 1}
        self.write()

    def end(
        self, section: str, item: str, *, seconds: float = 0.0, result: dict | None = None, failures: Sequence[str] = (), **more
    ) -> None:
        """An item is over.

        Args:
            section: Its section.
            item: Its name.
            seconds: How long it took.
            result: What it measured.
            failures: What it should have been and was not; nothing if it has passed.
            more: Whatever else is known, such as a traceback.
        """
        entry = self.items(section).setdefault(item, {"tries": 0, "session": len(self.tree["sessions"]) - 1})
        entry |= {"status": "failed" if failures else "passed", "seconds": round(seconds, 2), "failures": list(failures)}
        entry |= {"result": result or {}, **more}
        self.write()

    def running(self, section: str) -> list[str]:
        """Items that a process left unfinished."""
        return [name for name, entry in self.items(section).items() if entry["status"] == "running"]

    def failures(self, section: str) -> list[str]:
        return [f"{name}: {what}" for name, entry in self.items(section).items() for what in entry.get("failures", [])]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.tree, indent=1, default=str))
