"""The step's own benchmark runs to its end, at a size that shows nothing."""

import json
import os
import subprocess
import sys

import pytest

from megavlm.model.fusion import PARTS
from megavlm.system.files import PROJECT
from megavlm.system.world import without_place


def run(out, *arguments):
    command = [sys.executable, str(PROJECT / "tools" / "bench_step.py"), f"--out={out}", *arguments]
    done = subprocess.run(command, env=without_place(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_the_engine_has_a_share_of_its_own(tmp_path):
    found, shown = run(tmp_path / "out.json", "--only=engine", "--sizes=tiny", "--steps=2", "--ranks=1")
    shares = found["engine"]["tiny"]["route"]["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(shares[row] > 0 for row in ("forward", "backward", "optimizer", "data", "own overhead"))
    assert "| own overhead |" in shown


@pytest.mark.slow
def test_every_part_is_compiled_and_compared(tmp_path):
    found, shown = run(tmp_path / "out.json", "--only=parts", "--width=64", "--num_layers=1", "--pack_tokens=512", "--repeats=1")
    assert set(found["parts"]) == {"nothing", *PARTS, "all"} and found["parts"]["nothing"]["time_share"] == 1.0
    assert all(name in shown for name in PARTS)
