"""Every family that is exact goes out to `transformers` and comes back from it, with the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megavlm.model.backbone import make_causal_lm
from megavlm.model.families import EXACT
from megavlm.training.initial import load_initial_weights
from tests.model.test_families import VOCABULARY, architecture_of


class Texts:
    """What a start with the same rows asks of a vocabulary."""

    num_text = VOCABULARY
    text_model = None


@pytest.mark.parametrize("model_type", EXACT)
@torch.no_grad()
def test_out_and_in_again(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr("megavlm.training.initial.same_text_model", lambda *_: False)
    torch.manual_seed(0)
    causal_lm = make_causal_lm(architecture_of(model_type), VOCABULARY).eval()
    for described in (causal_lm.config, causal_lm.generation_config):  # as an export says them
        described.bos_token_id, described.eos_token_id, described.pad_token_id = 1, 2, 2
    causal_lm.save_pretrained(tmp_path)
    tokens = torch.arange(30)[None]
    expected = causal_lm(tokens).logits
    assert expected.std() > 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(stock(tokens).logits, expected, rtol=0, atol=1e-6)
    begun = make_causal_lm(architecture_of(model_type), VOCABULARY).eval()
    load_initial_weights(str(tmp_path), begun, Texts())
    assert begun(tokens).logits.equal(expected)
