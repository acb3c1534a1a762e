"""`megavlm status` says what is so: of a process that is gone, on another machine, in the queue, and of damaged files."""

import json
import os
import subprocess
import sys
import time

import pytest

from megavlm.runs import status as module
from megavlm.runs.folder import RunFolder
from megavlm.runs.status import describe_status, write_status
from megavlm.system.processes import identity_of, is_alive


@pytest.fixture
def run(tmp_path):
    write_status(RunFolder(tmp_path), state="running", step=3, num_steps=9, world_size=2, step_s=2.0, tokens_per_s=5.0, skipped=0)
    return tmp_path


def change(run, **entries):
    file = run / "status.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def state(run) -> str:
    return describe_status(run).splitlines()[0].split(None, 1)[1]


def test_a_process_that_is_gone_does_not_run(run):
    assert state(run) == "running"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    change(run, pid=process.pid, process=identity_of(process.pid))
    assert state(run) == "running" and is_alive(process.pid, None)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert state(run).startswith(f"ended without a word: its process {process.pid} is gone")
    process.wait()
    assert state(run).startswith("ended without a word")
    change(run, pid=os.getpid())  # another process has got the number
    assert state(run).startswith("ended without a word")
    change(run, state="done")
    assert state(run) == "done"


def test_a_status_of_an_earlier_version(run):
    content = json.loads((run / "status.json").read_text())
    del content["process"]
    (run / "status.json").write_text(json.dumps(content))
    assert state(run) == "running"
    change(run, pid=2**22 + 1)
    assert state(run).startswith("ended without a word")


def test_what_cannot_be_seen_is_not_claimed(run):
    change(run, host="elsewhere")
    assert state(run).startswith("running, as far as is known: last report 0 s ago on elsewhere")
    change(run, updated=time.time() - 10_000)
    assert state(run).startswith("silent: last report 2 h ago on elsewhere")


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ("RUNNING (None), nodes n1", "running"),
        ("PENDING (BeginTime), nodes", "waiting in the queue"),
        ("COMPLETED (None)", "ended without a word: its job is over"),
        ("CANCELLED by 1000", "ended without a word: its job is over"),
        ("NODE_FAIL (None)", "ended without a word: its job is over"),
        (module.NOT_IN_QUEUE, "ended without a word: its job is over"),
        ("not known: squeue does not answer", "running, as far as is known"),
    ],
)
def test_the_queue_knows_more(run, monkeypatch, queue, expected):
    change(run, host="elsewhere", job="7")
    monkeypatch.setattr(module, "queue_state", lambda job: queue)
    assert state(run).startswith(expected)


def test_a_queue_that_does_not_answer(monkeypatch):
    def hang(*_args, **_options):
        raise subprocess.TimeoutExpired("squeue", 20)

    monkeypatch.setattr(subprocess, "run", hang)
    assert module.queue_state("7") == "not known: squeue does not answer"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"{}",
        b'{"updated": "x", "host": 1, "pid": 2}',
        b'{"updated": NaN, "host": "a", "pid": 2}',
        b'{"updated": 1, "host": "a", "pid": 1%s}' % (b"0" * 400),
        b'{"updated": 1, "host": "a", "pid": 2, "job": "--help"}',
        b'{"updated": 1, "host": "a", "pid": 2, "job": "\\u0000"}',
    ],
)
def test_a_damaged_status_is_named_and_the_rest_is_told(run, content):
    (run / "status.json").write_bytes(content)
    out = describe_status(run)
    assert "not known: " in out and "status.json is damaged" in out and "last checkpoint  none" in out
    (run / "exit_code").write_text("75\n")
    assert "last start       interrupted, to be continued" in describe_status(run)


@pytest.mark.parametrize("content", ["", "x", "75 75", "9" * 5000])
def test_a_damaged_exit_code_is_named(run, content):
    (run / "exit_code").write_text(content)
    assert "exit_code is damaged" in state(run)


@pytest.mark.parametrize("content", [b"\xff", b"\x00", b"-1", b"seven"])
def test_a_damaged_note_of_a_job_is_passed_over(run, content):
    (run / "slurm").mkdir()
    (run / "slurm" / "7.job").write_bytes(content)
    (run / "slurm" / "6.job").write_text("6\n")
    assert "job              6" in describe_status(run)
