"""The check that is to run on a GPU, run on a CPU as far as it goes: same code, small sizes."""

import gzip
import json
import random
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from megavlm.routing.policies import POLICIES
from megavlm.routing.selectors import DEVICE_SELECTORS, HOST_SELECTORS
from tools.gpu import ceilings, parity, runner, summary, sync, trace, wheels
from tools.gpu.child import DONE, OUT_OF_TIME, run_items
from tools.gpu.context import Context, Outcome
from tools.gpu.models import EVERY_POLICY
from tools.gpu.record import ROOT, Record

PLANTED = "tests.tools.planted"


@pytest.fixture
def context(tmp_path):
    return Context(torch.device("cpu"), Record(tmp_path / "check.json"), tmp_path, tmp_path)


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command itself, on the CPU."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--device=cpu", f"--out={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def complaints(folder: Path) -> str:
    """Everything that failed, with its traceback."""
    sections = json.loads((folder / "check.json").read_text())["sections"]
    failed = {
        f"{name}: {item}": (entry["failures"], entry.get("traceback"), entry.get("output"))
        for name, section in sections.items()
        for item, entry in section["items"].items()
        if entry["status"] != "passed"
    }
    return json.dumps(failed, indent=1)


def test_a_failure_is_noted_and_the_others_run(context):
    record = context.record
    record.begin_session("cpu", 1)
    items = {"good": lambda: Outcome({"number": 1}), "raises": lambda: 1 / 0, "wrong": lambda: Outcome({}, ["too much"])}
    assert run_items(record, "mine", items, time.monotonic() + 60) == DONE
    again = Record(record.path)
    assert {name: entry["status"] for name, entry in again.items("mine").items()} == {
        "good": "passed",
        "raises": "failed",
        "wrong": "failed",
    }
    assert "1 / 0" in again.items("mine")["raises"]["traceback"]
    assert again.failures("mine") == ["raises: ZeroDivisionError: division by zero", "wrong: too much"]
    calls = []
    run_items(again, "mine", dict.fromkeys([*items, "new"], lambda: calls.append(1) or Outcome({})), time.monotonic() + 60)
    assert len(calls) == 1, "what is done is not done again"
    assert run_items(again, "mine", {"late": items["good"]}, time.monotonic() + 1) == OUT_OF_TIME
    assert not again.is_done("mine", "late")


def test_a_section_that_dies_and_hangs_ends_in_time_and_says_what_happened(context, monkeypatch):
    monkeypatch.setitem(runner.LIMITS_S, PLANTED, 30.0)
    monkeypatch.setattr(runner, "RESERVE_S", 1.0)
    context.record.begin_session("cpu", 5)
    begin = time.monotonic()
    assert runner.Check(context.record.path, "cpu", begin + 300).run([PLANTED], anyway=False) == runner.FAILED
    assert time.monotonic() - begin < 120
    items = Record(context.record.path).items(PLANTED)
    assert {name: entry["status"] for name, entry in items.items()} == {
        "good": "passed",
        "raises": "failed",
        "wrong": "failed",
        "dies": "failed",
        "good after that": "passed",
        "hangs": "failed",
    }
    assert items["dies"]["failures"] == ["its process ended with status 9"]
    assert items["hangs"]["failures"] == ["ran past the section's limit of time"]
    page = (context.out / "summary.md").read_text()
    assert "2 is more than 1" in page and "ran out of time" in page


def test_go_decides_and_a_second_call_goes_on(tmp_path):
    """Through DeepSpeed; the second call has nothing left to do."""
    first = check(tmp_path, "--only=go", "--minutes=4")
    assert first.returncode == 0, complaints(tmp_path) + first.stderr
    assert "GO" in first.stdout.splitlines()
    tree = json.loads((tmp_path / "check.json").read_text())
    assert set(tree["sections"]["go"]["items"]) == {"machine", "parity of dense", "matrix products", "steps"}
    tree["sections"]["go"]["items"]["steps"]["failures"] = ["planted"]
    (tmp_path / "check.json").write_text(json.dumps(tree))
    second = check(tmp_path, "--only=go,ceilings", "--minutes=4")
    assert second.returncode == runner.NO_GO
    assert "NO-GO: steps: planted" in second.stdout
    assert "ceilings" not in json.loads((tmp_path / "check.json").read_text())["sections"]


def test_mistakes_on_the_command_line_are_named(tmp_path):
    (tmp_path / "check.json").write_text(json.dumps({"sessions": [{"device": "cuda"}], "sections": {}}))
    assert "there is no section parrity" in check(tmp_path, "--only=parrity").stderr
    assert "is of device cuda" in check(tmp_path, "--only=go").stderr


def test_every_policy_and_every_selector_is_compared():
    both = [policy for pair in EVERY_POLICY.values() for policy in pair]
    # other tests register their own
    shipped = [*POLICIES.items(), *HOST_SELECTORS.items(), *((name, selector.score) for name, selector in DEVICE_SELECTORS.items())]
    names = {name for name, part in shipped if part.__module__.startswith("megavlm.")}
    ours, selectors = names & set(POLICIES), names & {*HOST_SELECTORS, *DEVICE_SELECTORS}
    assert {policy.policy for policy in both} == ours
    assert {policy.selector_name for policy in both} >= selectors


def test_parity_of_every_policy(context):
    for name, item in parity.items(context).items():
        if "64, grouped" in name:
            outcome = item()
            assert not outcome.failures, (name, outcome)
            assert outcome.result["float32"]["gradient_error"] == 0, "the same device"


@pytest.mark.parametrize("policy", ["pyramid, question_attention", "mixture_of_depths", "merge"])
def test_parity_sees_a_weight_that_is_off(context, policy, monkeypatch):
    convert = parity.in_precision

    def spoilt(backbone, dtype):
        with torch.no_grad():
            for layer in backbone.causal_lm.model.layers:
                layer.self_attn.k_proj.weight.mul_(-0.5)
        return convert(backbone, dtype)

    monkeypatch.setattr(parity, "in_precision", spoilt)
    outcome = parity.compare(context, policy, 64, grouped=False)
    words = " ".join(outcome.failures)
    assert "float32: gradient_error" in words and "bfloat16: gradient_cosine" in words
    if policy.startswith("pyramid"):
        assert "float32: choices_apart" in words, "queries find other keys"


def test_ceilings(context):
    for name, item in ceilings.items(context).items():
        assert not item().failures, name


def test_a_wait_in_our_code_is_told_from_others(context):
    stacks = sync.Counter()
    for place in ("megavlm/planted.py", "x/deepspeed/planted.py"):
        names: dict = {}
        exec(compile("def read(tensor):\n    return tensor.item()", str(ROOT / place), "exec"), names)
        with sync.waits(context, stacks):
            names["read"](torch.ones(1))
    assert sorted(map(sync.whose, stacks)) == ["deepspeed", "megavlm"]
    assert [stack[-1] for stack in stacks] == ["megavlm/planted.py:2 read", "deepspeed/planted.py:2 read"]


def test_idle_time_and_launches_of_a_trace():
    kernel = {"ph": "X", "cat": "kernel"}
    events = [
        kernel | {"name": "a", "ts": 0, "dur": 10},
        kernel | {"name": "b", "ts": 5, "dur": 10},
        kernel | {"name": "a", "ts": 30, "dur": 10},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 1},
    ]
    found = trace.summarize(events, is_cuda=True)
    assert (found["busy_ms"], found["whole_ms"], found["launches"]) == (0.025, 0.04, 1)
    assert found["idle_share"] == pytest.approx(0.375)
    assert found["kernels"][0] == {"name": "a", "count": 2, "ms": 0.02}
    assert trace.union([]) == (0.0, 0.0)


def test_a_large_trace_is_cut(tmp_path):
    rng = random.Random(0)
    events = [{"cat": cat, "name": str(rng.random())} for cat in ("kernel", "cpu_op", "python_function") for _ in range(2000)]
    sizes = {}
    for largest in (10**6, 50_000, 5_000):
        left_out = trace.write_small({"traceEvents": list(events)}, tmp_path / "t.gz", largest)
        assert (tmp_path / "t.gz").stat().st_size <= largest
        kept = json.loads(gzip.decompress((tmp_path / "t.gz").read_bytes()))["traceEvents"]
        sizes[largest] = (len(kept), "python_function" in left_out, "the end" in left_out)
    assert sizes[10**6] == (6000, False, False)
    assert sizes[50_000][1:] == (True, False)
    assert sizes[5_000][1:] == (True, True)


def test_what_the_machine_lacks_is_brought():
    brought = wheels.lacking()
    ours = {wheels.canonicalize_name(Requirement(line).name) for line in requires("megavlm") or [] if "extra" not in line}
    assert ours <= set(brought) | wheels.THERE
    assert {"deepspeed", "pydantic-core", "hjson", "py-cpuinfo"} <= set(brought)
    assert not set(brought) & {"torch", "transformers", "numpy"}


def test_a_summary_of_nothing_but_a_failure(context):
    context.record.begin_session("cpu", 1)
    context.record.end("mfu", "1B", failures=["OutOfMemoryError: so much"], traceback="...")
    summary.write_summary(context.record.path)
    assert "**mfu: 1B**: OutOfMemoryError: so much" in (context.out / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_check_on_a_cpu(tmp_path):
    """Every section, in calls that end before it is done."""
    for _ in range(10):
        call = check(tmp_path, "--minutes=4")
        print(call.stdout)
        if call.returncode != runner.UNFINISHED:
            break
    assert call.returncode == 0, complaints(tmp_path) + call.stderr
    sections = json.loads((tmp_path / "check.json").read_text())["sections"]
    assert list(sections) == list(runner.LIMITS_S)
    assert not any(section.get("out_of_time") for section in sections.values())
    page = (tmp_path / "summary.md").read_text()
    assert all(f"## {name}" in page for name in summary.DETAILS)
