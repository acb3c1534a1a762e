"""From the fields of a ``config.json``, in any style that `transformers` reads, to its configuration of a text decoder.

Tested by `tests/model/test_families.py`.
"""

import difflib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

log = logging.getLogger(__name__)

REPLACED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that the run's own vocabulary replaces."""
ABOUT_THE_FILE = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "attn_implementation")
"""Fields that say nothing about the layers."""
ROTARY_FIELDS = ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor")
"""Where older files say what `rope_parameters` says now."""
ROTARY_PARAMETERS = (
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor", "mrope_section", "mrope_interleaved",
)  # fmt: skip
UNDECLARED = {"olmoe": {"head_dim"}, "qwen3_moe": {"head_dim"}}
"""Fields that models read and published files have, although their configurations do not declare them."""
LEFTOVERS = ("pretraining_tp", "use_mrope")
"""Fields of many published files that have lost their meaning."""
MISSPELT = 0.85
"""A name of a published file that has no meaning, but is so like one that has, is a mistake."""


def read_configuration(architecture: dict[str, Any], vocabulary_size: int) -> PreTrainedConfig:
    """The configuration that ``AutoConfig`` makes of these fields; of a multimodal one that of its text decoder.

    Args:
        architecture: ``model_type`` and fields, as in a ``config.json`` of any age. Not changed.
        vocabulary_size: Rows of the embedding and the output head.

    Raises:
        ValueError: If `transformers` does not know the type, or refuses the fields.
    """
    given = {name: value for name, value in architecture.items() if not _says_nothing(name)}
    whole, config = _as_transformers_reads(given)
    if config is not whole and "tie_word_embeddings" in given:
        config.tie_word_embeddings = whole.tie_word_embeddings
    if getattr(config, "attention_dropout", 0) and "attention_dropout" not in given | given.get("text_config", {}):
        # the default of a few families, which nobody asked for
        config.attention_dropout = 0.0
    config.vocab_size = vocabulary_size
    config.name_or_path = ""
    return without_special_rows(config)


def without_special_rows(config: PreTrainedConfig) -> PreTrainedConfig:
    """No row of the embedding is special: that of a padding token would get no gradient."""
    # a few families declare that these are numbers
    vars(config).update(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return config


def read_folder(folder: str) -> dict[str, Any]:
    """The fields of a published ``config.json`` that say something about the layers.

    Raises:
        ValueError: If there is none, or a name in it is misspelt.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError("is neither a mapping nor a folder with config.json")
    tree = json.loads(file.read_text())
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no mapping")
    if "auto_map" in tree and tree.get("model_type") not in list(CONFIG_MAPPING):
        raise ValueError("needs code of its own, which is never run")
    unknown = list(unknown_fields(tree))
    if misspelt := [(name, near) for name, near, likeness in unknown if likeness >= MISSPELT]:
        raise ValueError(f"{file}: {_did_you_mean(tree['model_type'], misspelt)}")
    if unknown:
        log.warning("%s: transformers gives these fields no meaning: %s", file, ", ".join(name for name, _, _ in unknown))
    meaningless = {name for name, _, _ in unknown}
    return {name: value for name, value in tree.items() if name not in meaningless and not _says_nothing(name)}


def check_names(architecture: dict[str, Any]) -> None:
    """Whether every field means something.

    Raises:
        ValueError: Naming those that do not, with the nearest that does.
    """
    is_published = "architectures" in architecture or "transformers_version" in architecture
    unknown = [(name, near) for name, near, likeness in unknown_fields(architecture) if likeness >= MISSPELT or not is_published]
    if unknown:
        raise ValueError(_did_you_mean(architecture["model_type"], unknown))


def unknown_fields(tree: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Fields that `transformers` gives no meaning, with the nearest name that has one, and how like it is (0 to 1)."""
    if tree.get("model_type") not in list(CONFIG_MAPPING):  # that is a mistake of its own
        return
    # what transformers makes of it
    is_ministral = tree["model_type"] == "mistral" and "layer_types" in tree
    kind = CONFIG_MAPPING["ministral" if is_ministral else tree["model_type"]]
    known = {*_fields_of(kind), *UNDECLARED.get(kind.model_type, ()), *REPLACED, *ABOUT_THE_FILE, *ROTARY_FIELDS, *LEFTOVERS}
    known |= {*GenerationConfig().to_dict(), "quantization_config", "model_type", "per_layer_config", "num_labels", "output_attentions"}
    for part in _parts_of(kind):
        # files of multimodal models may hold the fields of their text decoder themselves
        known |= _fields_of(part)
    yield from _unlike(tree, known, "")
    for name in ("rope_scaling", "rope_parameters"):
        inner = tree.get(name)
        if isinstance(inner, dict) and not any(isinstance(value, dict) for value in inner.values()):
            yield from _unlike(inner, set(ROTARY_PARAMETERS), f"{name}.")


def _fields_of(kind: type[PreTrainedConfig]) -> set[str]:
    return {*kind.__dataclass_fields__, *kind.attribute_map, *cast(dict, kind.sub_configs)}


def _parts_of(kind: type[PreTrainedConfig]) -> list[type[PreTrainedConfig]]:
    """The configurations inside one, such as its text decoder's."""
    if hasattr(kind, "sub_configs_defaults"):
        parts = kind.sub_configs_defaults.values()
        return [part.config_class if issubclass(part.config_class, PreTrainedConfig) else CONFIG_MAPPING[part.model_type] for part in parts]
    # transformers 5.17 says what they are by default only in a configuration that is made
    found = [getattr(kind(), name, None) for name in cast(dict, kind.sub_configs)]
    return [type(part) for part in found if isinstance(part, PreTrainedConfig)]


def _unlike(tree: dict[str, Any], known: set[str], prefix: str) -> Iterator[tuple[str, str, float]]:
    for name in tree:
        if name not in known and not str(name).startswith("_"):
            near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0)[0]
            yield f"{prefix}{name}", f"{prefix}{near}", difflib.SequenceMatcher(None, str(name), near).ratio()


def _did_you_mean(model_type: str, names: list[tuple[str, str]]) -> str:
    return "; ".join(f"{model_type} has no {name}. Did you mean {near}?" for name, near in names)


def _as_transformers_reads(fields: dict[str, Any]) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The whole configuration and that of its text decoder, which may be the same."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError("needs a model_type of transformers, such as qwen3")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1, cutoff=0)[0]
        raise ValueError(f"transformers has no model_type {model_type!r}. Did you mean {near}?")
    # through a file: only there AutoConfig understands every style
    with tempfile.TemporaryDirectory() as folder:
        try:
            (Path(folder) / "config.json").write_text(json.dumps(fields))
            whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return whole, whole.get_text_config(decoder=True)
        except Exception as error:  # whatever checks of transformers raise
            words = " ".join(str(error).replace(folder, "the architecture").split())
            raise ValueError(
                f"transformers makes no configuration of this {model_type}: {type(error).__name__}: {words}; correct the fields"
            ) from error


def _says_nothing(name: str) -> bool:
    """Whether a field says nothing about the layers, or the run replaces it."""
    return name in REPLACED + ABOUT_THE_FILE or str(name).startswith("_")
