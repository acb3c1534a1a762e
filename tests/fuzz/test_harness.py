"""The harness itself: every kind of failure is seen as what it is, and the next case is none the worse for it."""

import os
import time

import pytest

from megavlm.errors import ConfigError
from tests.fuzz.harness import try_cases


def act(what: str) -> str:
    if what == "hang":
        time.sleep(60)
    if what == "die":
        os._exit(3)
    if what == "fill":
        parts = []
        while True:
            parts.append(bytearray(os.urandom(1 << 10)) * (64 << 10))
    if what == "refuse":
        raise ConfigError("a.b: is wrong (value 3)\n  do:    give another")
    if what == "mumble":
        raise ConfigError("something is wrong")
    if what == "surrogate":
        raise ConfigError("\ud800 is wrong\n  do:    give another")
    if what == "raise":
        raise KeyError("what")
    return "done"


@pytest.mark.parametrize("per_process", [1, 4])
def test_every_kind_of_end(per_process):
    expected = {
        "fine": "done",
        "hang": "hang",
        "die": "died",
        "fill": "memory",
        "refuse": "refused",
        "mumble": "undocumented",
        "surrogate": "undocumented",
        "raise": "uncaught",
        "fine again": "done",
    }
    table = try_cases(act, {name: (name,) for name in expected}, seconds=8, growth_bytes=200 << 20, per_process=per_process, preload=())
    assert {outcome.name: outcome.kind for outcome in table.outcomes} == expected
    assert {outcome.name for outcome in table.failures} == {n for n, kind in expected.items() if kind not in ("done", "refused")}
    assert "9 cases" in str(table)
    with pytest.raises(AssertionError, match="KeyError"):
        table.check()
