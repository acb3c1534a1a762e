"""From a checkpoint to a folder that `transformers` loads."""

import json
from pathlib import Path

from megavlm.engine.weights import load_weights
from megavlm.errors import MegavlmError
from megavlm.parts.hub_tokenizer import write_tokenizer
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_run_config
from megavlm.runs.checkpoints import locate
from megavlm.system.files import folder_written_atomically
from megavlm.vocabulary import SPECIALS, copy_text_model


def export(source: Path, out: Path) -> str:
    """Write weights, configuration and vocabulary of a checkpoint.

    ``AutoModelForCausalLM.from_pretrained(out)`` gives the same logits, ``AutoTokenizer`` the same ids, or an error where the text model
    has no equal there; a tied output head is stored once. Beside it lie ``text.model`` (a SentencePiece file, or a folder with
    ``tokenizer.json``) and ``vocabulary.json``, which says where text, special tokens and image codes begin.

    Args:
        source: A run folder (its newest checkpoint) or a checkpoint in one.
        out: The folder to write.

    Returns:
        What was written, in words.

    Raises:
        MegavlmError: If ``out`` exists, or the checkpoint is damaged.
    """
    if out.exists():
        raise MegavlmError(f"{out} exists already\n  do:    name another folder, or remove it")
    folder, checkpoint = locate(source)
    parts = Parts(load_run_config(folder))
    config, vocabulary = parts.config, parts.vocabulary
    backbone = parts.make_backbone()
    causal_lm = backbone.causal_lm
    load_weights(checkpoint, backbone)
    left_out = [name for name, _ in backbone.named_parameters() if not name.startswith("causal_lm.")]
    layout = {
        "size": vocabulary.size,
        "num_text": vocabulary.num_text,
        "specials": {name: vocabulary.num_text + i for i, name in enumerate(SPECIALS)},
        "first_code": vocabulary.first_code,
        "image_tokenizer": config.vocabulary.image_tokenizer.model_dump(mode="json"),
        "checkpoint": str(checkpoint.name),
    }
    with folder_written_atomically(out) as files:
        for described in (causal_lm.config, causal_lm.generation_config):
            described.bos_token_id, described.eos_token_id = vocabulary.bos, vocabulary.eos
        causal_lm.save_pretrained(files)
        copy_text_model(folder.text_model, files / "text.model")
        (files / "vocabulary.json").write_text(json.dumps(layout, indent=1))
        without_tokenizer = write_tokenizer(vocabulary, files)
    remark = f"; left out, as stock models have no place for them: {', '.join(left_out)}" if left_out else ""
    return f"{sum(p.numel() for p in causal_lm.parameters()) / 1e6:.2f}M parameters in float32 from {checkpoint}{remark}{without_tokenizer}"
