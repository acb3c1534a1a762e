"""Ctrl-C lets what runs save, begins nothing else, and kills nothing before its time."""

import os
import signal
import subprocess
import sys
import time

STUDY = """
import sys, logging
from concurrent.futures import ThreadPoolExecutor
from megavlm.study.children import Children
logging.basicConfig(level=logging.INFO)
children = Children()
child = [sys.executable, "-c", '''
import pathlib, signal, sys, time
saved = pathlib.Path(sys.argv[1])
def save(number, frame):
    time.sleep(1.0)  # longer than the 0.25 s that subprocess waits before it kills
    saved.with_suffix(".saved").write_text(saved.with_suffix(".saved").read_text() + "x" if saved.with_suffix(".saved").exists() else "x")
    sys.exit(76)
signal.signal(signal.SIGINT, save)
saved.write_text("started")
time.sleep(60)
''']
with ThreadPoolExecutor(1) as pool, children.ended_by_signals(pool):
    for name in sys.argv[1:]:
        pool.submit(children.run, [*child, name])
    import time
    time.sleep(60)
"""


def study(tmp_path, number: signal.Signals, to_group: bool):
    """A study of two arms, one at a time, that gets a signal when its first arm runs."""
    names = [tmp_path / "first", tmp_path / "second"]
    process = subprocess.Popen([sys.executable, "-c", STUDY, *names], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not names[0].exists():
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if to_group else os.kill)(process.pid, number)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


def test_ctrl_c_of_a_terminal_and_of_one_process_save_once(tmp_path):
    for number, to_group in ((signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGHUP, True)):
        folder = tmp_path / f"{number}-{to_group}"
        folder.mkdir()
        status, error = study(folder, number, to_group)
        assert status and "KeyboardInterrupt" in error and "saves and ends" in error
        assert (folder / "first.saved").read_text() == "x", "the arm had the time to save, and was told once"
        assert not (folder / "second").exists()
