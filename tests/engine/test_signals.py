"""Signals as they are heard: while the main thread waits in C, once, twice, and as torchrun hands them on."""

import signal
import subprocess
import sys
import time

import pytest

WAITING = """
import ctypes, os, sys, time
from megavlm.engine import signals
environment = {"TORCHELASTIC_RUN_ID": "1"} if sys.argv[1] == "torchrun" else {}
signals.listen(lambda: os._exit(130), environment)
print("listening", flush=True)
from threading import Thread
def tell():
    told = None
    while True:
        if signals.noted() != told:
            told = signals.noted()
            print(told.name, flush=True)
        time.sleep(0.02)
Thread(target=tell, daemon=True).start()
if sys.argv[2] == "in C":
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):  # the second time for ever, and no signal interrupts it
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
while True:
    time.sleep(1)
"""


@pytest.fixture(params=["in C", "in Python"])
def start(request):
    """``start(launcher)``: a process that listens; the main thread waits in C or in Python."""
    processes = []

    def start_one(launcher="alone"):
        process = subprocess.Popen([sys.executable, "-c", WAITING, launcher, request.param], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert [process.stdout.readline().strip() for _ in range(2)] == ["listening", "NOTHING"]
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "wish"), [("SIGINT", "QUIT"), ("SIGTERM", "TERMINATE"), ("SIGUSR1", "INTERRUPT")])
def test_a_signal_is_noted_and_ends_nothing(start, number, wish):
    process = start()
    process.send_signal(getattr(signal, number))
    assert process.stdout.readline().strip() == wish
    time.sleep(0.2)
    assert process.poll() is None


def test_ctrl_c_twice_ends_at_once(start):
    process = start()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().strip() == "QUIT"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_of_the_second_ctrl_c_torchrun_makes_sigterm(start):
    process, alone = start("torchrun"), start()
    for one in (process, alone):
        one.send_signal(signal.SIGINT)
        assert one.stdout.readline().strip() == "QUIT"
        one.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    time.sleep(0.5)
    assert alone.poll() is None, "told to stop twice, which is no second Ctrl-C"


def test_the_time_limit_is_stronger_than_ctrl_c(start):
    process = start()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().strip() == "QUIT"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline().strip() == "INTERRUPT"
