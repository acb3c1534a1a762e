"""The table of docs/models.md: every text decoder of transformers, exact with its largest difference, or the words it is refused with.

python tools/families.py > table.md
"""

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megavlm.model.families import read_exact
from megavlm.model.proof import VOCABULARY, prove

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
HEAD_WIDTH_NEEDED = ("helium", "ministral")
"""Families that transformers cannot run without ``head_dim``."""


def verdict(model_type: str) -> str:
    kind = CONFIG_MAPPING[model_type]
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    architecture = {"model_type": model_type} | {name: value for name, value in SIZES.items() if name in known}
    if model_type in HEAD_WIDTH_NEEDED:
        architecture["head_dim"] = 16
    try:
        read_exact(architecture, VOCABULARY)
        return f"exact, {prove(architecture):.0e}"
    except ValueError as error:
        # the list of families that are exact ends many messages
        return "refused: " + str(error).split("; ")[0].split(", which is not computed")[0][:120].replace("|", "/")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print("| family | verdict |\n|---|---|")
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(f"| {name} | {verdict(name)} |")
