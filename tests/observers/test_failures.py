"""No picture, log or report ends a run, and none of them changes what is trained."""

from PIL import Image

from tests.distributed.ranks import run_ranks
from tests.observers.failing import run_with

FAULTS = {
    "before a step": "one rank before a step",
    "after a step": "one rank after a step",
    "in a backward pass": "all ranks, with gradients left behind",
    "in a layer": "all ranks in the midst of a forward pass",
    "in the picture": "no picture today",
    "in the board": "no picture today",
}
PROMPTS = [r"between $\frac{1$ and $x^$", "a\x07b", "word " * 30, "a handwritten 七"]


def test_whatever_fails_beside_training_the_run_goes_on_as_if_nothing_had_been(make_config, tmp_path):
    settings = {"optimizer.num_steps": 3, "monitor.sample_every_steps": 1, "monitor.sample_prompts": ["a handwritten two"]}
    jobs = {fault or "none": (make_config(settings, tmp_path / f"run-{number}"), fault) for number, fault in enumerate(["", *FAULTS])}
    for rank, result in enumerate(run_ranks(2, run_with, jobs, timeout_s=280)):
        for fault, words in FAULTS.items():
            assert result[fault]["step"] == 3
            for name, value in result["none"]["weights"].items():
                assert value.equal(result[fault]["weights"][name]), (fault, name)
            told = words in result[fault]["log"]
            everywhere, only = fault in ("in a backward pass", "in a layer"), 1 if "a step" in fault else 0
            assert told == (everywhere or rank == only), (fault, rank)


def test_prompts_of_any_text_are_drawn(make_config, tmp_path):
    config = make_config(
        {"optimizer.num_steps": 1, "optimizer.warmup_steps": 1, "monitor.sample_every_steps": 1, "monitor.sample_prompts": PROMPTS}
    )
    (result,) = run_ranks(1, run_with, {"run": (config, "")})
    assert "could not be written" not in result["run"]["log"] and "failed" not in result["run"]["log"]
    assert Image.open(tmp_path / "run" / "samples" / "step-00000001.png")
