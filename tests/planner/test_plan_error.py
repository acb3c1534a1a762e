"""The script that judges the planner runs, and says by how much it is wrong; how much that may be is no matter of a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_planner_is_judged(processes, tmp_path):
    command = [sys.executable, "tools/plan_error.py", f"--processes={processes}", "--sizes", "0.5M", "--seconds=0.01"]
    done = subprocess.run([*command, f"--out={tmp_path}/error.json"], cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "error.json").read_text())
    assert len(document["rows"]) == 3 and document["calibration"]["world_size"] == processes
    assert all(row["predicted_s"] > 0 and row["predicted_bytes"] > 1e8 for row in document["rows"])
    assert done.stdout.count("%") == 6


@pytest.mark.slow
def test_the_digits_are_planned_with_rates_of_this_machine(tmp_path, digits_folder):
    data = [f"--vocabulary.text_model={digits_folder}/text.model"]
    sources = {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
    calibrated = subprocess.run(
        [sys.executable, "tools/calibrate.py", "digits", "--vocabulary=300", f"--out={tmp_path}/rates.json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert calibrated.returncode == 0, calibrated.stderr
    command = [sys.executable, "-m", "megavlm", "plan", "digits", "--gpus=1", f"--calibration={tmp_path}/rates.json"]
    command += [f"--out={tmp_path}/plan.png", *data, f"--data.sources={json.dumps(sources)}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "measured on this CPU" in done.stdout


@pytest.mark.slow
def test_the_longest_document_is_found():
    done = subprocess.run([sys.executable, "tools/longest_pack.py"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n|") == 5 + 14 - 1
