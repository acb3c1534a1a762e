"""A section of the GPU check in which everything goes wrong that can; run by `tests/tools/test_gpu_check.py` in another process."""

import os
import time

from tools.gpu.context import Outcome


def items(context):
    return {
        "good": lambda: Outcome({"device": str(context.device)}),
        "raises": lambda: 1 / 0,
        "wrong": lambda: Outcome({"number": 2}, ["2 is more than 1"]),
        "dies": lambda: os._exit(9),
        "good after that": lambda: Outcome({}),
        "hangs": lambda: time.sleep(1000),
        "never begun": lambda: Outcome({}),
    }
