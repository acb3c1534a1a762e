"""The tasks of a sample. Image spans belong to one of the first two: those that are read, and those that are drawn.

Tested by `tests/routing/test_route.py`.
"""

from enum import IntEnum
from typing import Literal, cast

TaskName = Literal["understanding", "generation", "text"]


class Task(IntEnum):
    """What a loss, a span or a sample counts for."""

    UNDERSTANDING = 0
    GENERATION = 1
    TEXT = 2


TASKS: tuple[TaskName, ...] = tuple(cast(TaskName, task.name.lower()) for task in Task)
"""Their names in samples, recipes and reports."""
