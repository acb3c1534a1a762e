"""Bars on a terminal, lines elsewhere, nothing where it is quiet; the log stands above the bars."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from megavlm.system import progress as module
from megavlm.system.progress import Progress, progress

WORK = """
import logging, time
from megavlm.system import progress
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[progress.Console()])
progress.SHORTEST_S = 0.0
for item in progress.progress(range(20), "draw images"):
    time.sleep(0.02)
    if item == 10:
        logging.info("a line of the log")
print("result")
"""


def on_a_terminal(code: str) -> str:
    """What a terminal of 60 columns shows while Python runs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
        assert process.wait() == 0, shown.decode()
    os.close(ours)
    return shown.decode()


def test_a_terminal_shows_a_bar_with_the_time_left_and_the_log_above_it():
    shown = on_a_terminal(WORK)
    assert re.search(r"draw images: +\d+%\|.*\| \d+/20 \[\d\d:\d\d<\d\d:\d\d", shown)
    lines = [line.split("\r")[-1] for line in shown.split("\r\n")]
    assert "a line of the log" in [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in lines]
    assert "?25l" not in shown, "the cursor stays, however the process ends"
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 70


TRAINING = """
import logging, time
from types import SimpleNamespace as Its
from megavlm.observers.bar import Bar
from megavlm.system import progress
progress.SHORTEST_S = 0.0
console = progress.Console()
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console])
bar = Bar()
bar.attach(Its(parts=Its(config=Its(optimizer=Its(num_steps=20)))))
for step in range(10, 15):  # a run that resumed, and is stopped
    bar.before_step(Its(number=step))
    time.sleep(0.15)
    bar.after_step(step + 1)
logging.info("saved")
console.flush()
"""


def test_training_counts_from_where_it_resumed_and_leaves_the_screen_clean():
    shown = on_a_terminal(TRAINING)
    assert "| 10/20 [" in shown and re.search(r"\| 14/20 \[", shown)
    last = re.split(r"[\r\n]+", shown.rstrip("\r\n"))[-1]
    assert "saved" in shown and "train" not in last


def test_quiet_shows_nothing_but_results():
    shown = on_a_terminal(WORK.replace("for item", "progress.be_quiet()\nfor item").replace("logging.info", "logging.debug"))
    assert shown.split() == ["result"]


def test_lines_where_there_is_no_terminal(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    assert list(progress("abc", "index")) == ["a", "b", "c"]
    assert caplog.messages[-1] == "index: 3 of 3, 00:00 left" and len(caplog.messages) == 3
    list(progress(iter("ab"), "lint"))
    assert caplog.messages[-1] == "lint: 2 done"
    with Progress("train", 10, done=5, lines=False) as bar:
        bar.advance(5)
    assert len(caplog.messages) == 5 and capsys.readouterr().err == ""


def test_an_error_ends_the_bar():
    with pytest.raises(ValueError, match="mine"):
        for _ in progress("abc", "index"):
            raise ValueError("mine")
