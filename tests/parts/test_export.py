"""An exported folder gives the same logits in `transformers`, and weights can begin another run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megavlm.engine.weights import load_weights
from megavlm.errors import ConfigError, MegavlmError
from megavlm.evaluation.prompts import to_read
from megavlm.evaluation.sampling import stream_tokens
from megavlm.parts.export import export
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_trained
from megavlm.runs.checkpoints import find
from megavlm.training.initial import load_initial_weights
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train
from tests.model.test_experts import EXPERTS


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def run(request, make_config, tmp_path):
    """A run folder of two steps by 2 ranks, its configuration and weights."""
    architecture = TINY["model.architecture"] | {"tie_word_embeddings": request.param}
    config = make_config({"model.architecture": architecture, "checkpoint.every_steps": 2}, tmp_path / "run")
    return tmp_path / "run", config, run_ranks(2, train, config, 2)[0]["weights"]


def test_export_and_init_from(run, make_config, tmp_path):
    folder, config, trained = run
    export(folder, tmp_path / "out")
    vocabulary = Parts(config).vocabulary
    causal_lm = Parts(config).make_causal_lm()
    load_weights(find(folder)[-1], torch.nn.ModuleDict({"causal_lm": causal_lm}))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = torch.arange(1, 200, 3)[None]
    with torch.no_grad():
        expected = causal_lm.eval()(tokens).logits
        assert loaded.eval()(tokens).logits.equal(expected)
    tied = config.model.architecture["tie_word_embeddings"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "Draw a handwritten seven."
    assert tokenizer(prompt)["input_ids"] == vocabulary.encode_text(prompt) and len(tokenizer) == vocabulary.size
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == vocabulary.eos
    described = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert described["first_code"] == vocabulary.first_code and described["specials"]["<boi>"] == vocabulary.boi

    for source in (folder, find(folder)[-1], tmp_path / "out"):
        fresh = Parts(config).make_causal_lm()
        load_initial_weights(str(source), fresh, vocabulary)
        with torch.no_grad():
            assert fresh.eval()(tokens).logits.equal(expected)
    other = make_config(
        {"model.architecture": config.model.architecture, "init_from": str(folder), "optimizer.learning_rate": 1e-30},
        tmp_path / "other",
    )
    begun = run_ranks(1, train, other, 1)[0]
    assert begun["first"] == 0 and begun["group_steps"] == {"decay": 1, "no_decay": 1}
    for name, value in begun["weights"].items():
        if "/" not in name:  # the moments begin anew
            torch.testing.assert_close(value, trained[name], rtol=1e-6, atol=1e-7)


def test_weights_that_do_not_fit_are_refused(run, make_config, tmp_path):
    folder, config, _ = run
    wider = make_config({"model.architecture": TINY["model.architecture"] | {"hidden_size": 48}})
    export(folder, tmp_path / "out")
    for source in (folder, tmp_path / "out"):
        with pytest.raises(ConfigError, match="do not fit this model"):
            vocabulary = Parts(wider).vocabulary
            load_initial_weights(str(source), Parts(wider).make_causal_lm(), vocabulary)
    with pytest.raises(ConfigError, match="holds no weights"):
        load_initial_weights(str(tmp_path), Parts(config).make_causal_lm(), vocabulary)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("mixture_of_depths", "no learned gates, which the policy mixture_of_depths needs \\(gates"),
        ("kv_injection", "no projections, which the policy kv_injection needs \\(injectors"),
    ],
)
def test_a_checkpoint_without_the_modules_of_a_policy_says_so(policy, words, make_config, tmp_path):
    config = make_config({"checkpoint.every_steps": 1}, tmp_path / "run")
    run_ranks(1, train, config, 1)
    with pytest.raises(MegavlmError, match=f"(?s)does not fit this model: it has {words}.*`init_from`.*do:"):
        load_trained(tmp_path / "run", {"routing.understanding": {"policy": policy}})
    other = make_config({"routing.understanding": {"policy": policy}, "init_from": str(tmp_path / "run")}, tmp_path / "other")
    load_initial_weights(str(tmp_path / "run"), Parts(other).make_causal_lm(), Parts(other).vocabulary)


LINES = re.search(r"### Without megavlm.*?```python\n(.*?)```", (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(), re.DOTALL)


def test_the_lines_of_the_documents_draw_and_answer_as_megavlm_does(make_config, tmp_path):
    """They run in a process that cannot import megavlm, in a folder that holds nothing but the export."""
    assert LINES
    # an untrained model with small weights would say one thing for ever
    settings = {"model.architecture": TINY["model.architecture"] | {"initializer_range": 0.5}, "evaluation.guidance": 2.0}
    config = make_config(settings | {"checkpoint.every_steps": 1, "evaluation.top_k": 1}, tmp_path / "run")
    run_ranks(1, train, config, 1)
    export(tmp_path / "run", tmp_path / "elsewhere" / "out")
    barred = "import sys\nsys.modules['megavlm'] = None\n"
    shown = "\nprint(json.dumps({'drawn': drawn.tolist(), 'said': said.tolist(), 'answer': answer}))\n"
    (tmp_path / "elsewhere" / "lines.py").write_text(barred + LINES[1] + shown)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "lines.py"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])

    model, _ = load_trained(tmp_path / "elsewhere" / "out")
    codes = model.draw(["a handwritten seven"])
    vocabulary = model.encoder.vocabulary
    assert theirs["drawn"] == (codes.flatten() + vocabulary.first_code).tolist() and len(set(theirs["drawn"])) > 1
    prompt = to_read(model.encoder, [model.image_tokenizer.decode(codes)[0], "Which digit is this?"])
    steps = stream_tokens(model.backbone, model.encoder, [prompt], model.costing, device=model.device, max_tokens=16)
    assert theirs["said"] == [token for (token,) in steps] and isinstance(theirs["answer"], str)


def test_an_export_in_bfloat16_is_the_run_rounded(make_config, tmp_path):
    config = make_config({"checkpoint.every_steps": 1}, tmp_path / "run")
    run_ranks(1, train, config, 1)
    for dtype in ("float32", "bfloat16"):
        export(tmp_path / "run", tmp_path / dtype, dtype)
    whole, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert all(rounded[name].equal(tensor.bfloat16()) for name, tensor in whole.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    assert load_trained(tmp_path / "bfloat16")[0].draw(["a seven"]).shape == (1, 8, 8)
    with pytest.raises(MegavlmError, match="float16 is no type of exported weights"):
        export(tmp_path / "run", tmp_path / "other", "float16")


def test_an_export_carries_what_a_trained_route_and_features_need(make_config, tmp_path, digits_folder):
    """Gates, which stock models have no place for; drawn along the route they decide with the run's weights."""
    gated = {"policy": "mixture_of_depths"}
    config = make_config({"checkpoint.every_steps": 1, "routing.generation": gated, "routing.understanding": gated}, tmp_path / "run")
    run_ranks(1, train, config, 1)
    assert "modules/modules.safetensors: gates." in export(tmp_path / "run", tmp_path / "out")
    route = {"evaluation.route": "trained"}
    ours, theirs = (load_trained(tmp_path / name, route)[0] for name in ("run", "out"))
    gates = [{name: p for name, p in model.backbone.named_parameters() if "gates" in name} for model in (ours, theirs)]
    assert gates[0] and all(tensor.equal(gates[1][name]) for name, tensor in gates[0].items())
    assert (ours.draw(["a handwritten seven"] * 2) == theirs.draw(["a handwritten seven"] * 2)).all()
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(MegavlmError, match="(?s)by an older megavlm.*export the run again"):
        load_trained(tmp_path / "out")


def architecture_with(family):
    dense = {name: value for name, value in TINY["model.architecture"].items() if name != "head_dim"}
    return dense | {"model_type": family} | EXPERTS[family]


def test_a_model_with_experts_goes_to_transformers(make_config, tmp_path):
    config = make_config({"model.architecture": architecture_with("qwen3_moe"), "checkpoint.every_steps": 1}, tmp_path / "run")
    run_ranks(1, train, config, 1)
    export(tmp_path / "run", tmp_path / "out")
    causal_lm = Parts(config).make_causal_lm()
    load_weights(find(tmp_path / "run")[-1], torch.nn.ModuleDict({"causal_lm": causal_lm}))
    assert_same_logits(tmp_path / "out", causal_lm, Parts(config))


@pytest.mark.parametrize("family", EXPERTS)
def test_files_with_every_expert_by_itself_are_read(family, make_config, tmp_path):
    """The model holds the experts of a layer as one tensor; published files, and exports, do not."""
    parts = Parts(make_config({"model.architecture": architecture_with(family)}))
    causal_lm, folder = parts.make_causal_lm(), tmp_path / "out"
    causal_lm.save_pretrained(folder)
    assert any(".experts.0." in name for name in load_file(folder / "model.safetensors"))
    assert_same_logits(folder, causal_lm, parts)
    for lacking in (".experts.1.", ".experts.0.w1.", ".experts.0.gate_proj."):
        kept = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if lacking not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"missing \['model.layers.0.mlp.experts"):
            load_initial_weights(str(folder), parts.make_causal_lm(), parts.vocabulary)


def assert_same_logits(folder, causal_lm, parts):
    """Of a folder read by `transformers`, and as weights to begin with."""
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    fresh, tokens = parts.make_causal_lm(), torch.arange(1, 200, 3)[None]
    load_initial_weights(str(folder), fresh, parts.vocabulary)
    with torch.no_grad():
        expected = causal_lm.eval()(tokens).logits
        assert loaded.eval()(tokens).logits.equal(expected) and fresh.eval()(tokens).logits.equal(expected)
