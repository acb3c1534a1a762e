"""Hostile values for recipes, as YAML, and the recipes that they are put into."""

import random
from collections.abc import Iterator
from typing import Any

import yaml

from megavlm.config.mistakes import all_paths
from megavlm.config.run import RunConfig
from megavlm.routing.policies import POLICIES

VALUES = (
    *("null", "true", "false", "yes", "0", "1", "2", "3", "7", "-1", "-0", "0.0", "-0.5", "0.5", "1.0", "1.5", "1e-300", "1e-30", "1e-6"),
    *("1e6", "1000", "65535", "1000000", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "1" + "0" * 12),
    *("1" + "0" * 30, "9" * 400, "1e30", "1e308", "1e400", ".inf", "-.inf", ".nan", "0x7f", "010", "1:30", "2026-01-01", "1_000"),
    *(
        '""',
        '" "',
        "a",
        '"8"',
        '"1e-3"',
        '"true"',
        '"\\0"',
        '"a\\0b"',
        '"\\ud800"',
        '"\\n"',
        "ä ö ü",
        "中文",
        "'; rm -rf x'",
        "'$\\frac{'",
        "../x",
    ),
    *(
        "/",
        ".",
        "..",
        "/dev/null",
        "/proc/self/mem",
        "/nowhere/at/all",
        "x/y",
        "'{'",
        "'a}'",
        "'{0..1000000000000}'",
        "'http://['",
        "s4://x/y",
    ),
    *("'http://127.0.0.1:1/x.tar'", "'pipe:false'", "file:///nowhere", "'%s %d {}'", "a" * 300, "b" * 5000, "os:system", "'math:'", "':'"),
    *("[{fraction: 1}]", "[{fraction: 0.5}, {fraction: 0.5, optimizer: {}}]", "[{fraction: 0.5, generation: {policy: tread}}]"),
    *("[]", "{}", "[null]", "[1, 2]", "[true, true]", "[a, a]", "[[]]", "[0.9, 1]", "[.nan, 0.9]", "{a: 1}", "{1: 2}", "{null: null}"),
    *(
        "[[[[[[[[[[]]]]]]]]]]",
        "&x [*x]",
        "!!set {a}",
        "!!binary aGVsbG8=",
        "!!python/name:os.system",
        "!!int a",
        "!!float x",
        "!!str 1",
        "*x",
    ),
    *(
        "{policy: dense}",
        "{policy: random_ltd, keep_ratio: 0.5}",
        "{policy: merge, at_layer: 99}",
        "{kind: pixel}",
        "{kind: vq}",
        "{kind: [a]}",
    ),
)
"""Each is put in the place of every setting."""

ARCHITECTURE_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *(
        "max_position_embeddings",
        "vocab_size",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "layer_types",
    ),
    *("attention_bias", "attention_dropout", "initializer_range", "tie_word_embeddings", "sliding_window", "use_sliding_window", "dtype"),
    *(
        "pad_token_id",
        "bos_token_id",
        "use_cache",
        "architectures",
        "quantization_config",
        "is_decoder",
        "output_hidden_states",
        "no_such_field",
    ),
    *("_attn_implementation", "torch_dtype", "max_window_layers", "text_config", "auto_map", "transformers_version", "pruned_heads"),
)
"""Of `model.architecture`, which the schema does not list."""

OF_POLICIES: dict[str, dict[str, Any]] = {
    "late_drop": {"after_layer": 2},
    "late_entry": {"at_layer": 1},
    "random_ltd": {"keep_ratio": 0.5},
    "tread": {"first_layer": 1, "end_layer": -1},
    "merge": {"at_layer": 1},
}
"""What policies need beside their defaults, in a model of four layers."""

Tree = dict[str, Any]
Edit = tuple[str, str]
"""Dotted path → YAML."""

_PLACE = "the-value-number-%d-goes-here"


def paths() -> list[str]:
    """Every setting of a recipe; the names inside mappings are those of the tiny recipe."""
    names = {"data.sources": "understanding", "data.mixture": "understanding", "loss.task_weights": "generation"}
    found = []
    for path in all_paths(RunConfig):
        if path.startswith("routing.phases.*"):  # a list, which no dotted path goes into: `VALUES` has some
            continue
        for mapping, name in names.items():
            path = path.replace(f"{mapping}.*", f"{mapping}.{name}")
        found.append(path)
    found += ["loss.task_weights.generation", "data.sources.new", "data.mixture.understanding", "no_such", "model.no_such"]
    found += [f"model.architecture.{name}" for name in ARCHITECTURE_FIELDS]
    # sections themselves too
    found += sorted({path.rsplit(".", 1)[0] for path in found if "." in path})
    return list(dict.fromkeys(found))


def single_edits() -> Iterator[tuple[str, list[Edit]]]:
    """(name, edits) of every setting with every value; of policies and image tokenizers in recipes that have them."""
    for path in paths():
        for value in VALUES:
            yield f"{path}={value[:60]}", [(path, value)]
    for name, needed in OF_POLICIES.items():
        fields = [field for field in POLICIES[name].model_fields if field != "policy"]
        for field in fields:
            for value in VALUES:
                whole = {"policy": name, **needed}
                base = yaml.safe_dump(whole, default_flow_style=True).strip()
                yield f"{name}.{field}={value[:60]}", [("routing.understanding", base), (f"routing.understanding.{field}", value)]


def pairs(rng: random.Random, number: int) -> Iterator[tuple[str, list[Edit]]]:
    """Two edits at once, of settings that hold numbers or names more often than not."""
    known = paths()
    for _ in range(number):
        edits = [(rng.choice(known), rng.choice(VALUES)) for _ in range(2)]
        yield " and ".join(f"{path}={value[:60]}" for path, value in edits), edits


def edited(tree: Tree, edits: list[Edit]) -> str:
    """The recipe as YAML, with values in the places of settings."""
    tree, fragments = _copy(tree), {}
    for number, (path, value) in enumerate(edits):
        place = _PLACE % number
        if value.startswith("{") and number + 1 < len(edits):
            # a section that the next edit goes into
            _put(tree, path, yaml.safe_load(value))
            continue
        _put(tree, path, place)
        fragments[place] = value
    text = yaml.safe_dump(tree, sort_keys=False, width=10**6)
    for place, value in fragments.items():
        text = text.replace(place, value)
    return text


def mangled(text: str, rng: random.Random, number: int) -> Iterator[tuple[str, str]]:
    """(name, text) of recipes whose text was damaged: lines lost, doubled, indented, cut, bytes changed."""
    lines = text.splitlines()
    for _ in range(number):
        changed, i, j = list(lines), rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.choice(("lost", "doubled", "indented", "outdented", "swapped", "cut", "character", "tab", "anchor", "comment"))
        if kind == "lost":
            del changed[i]
        elif kind == "doubled":
            changed.insert(j, changed[i])
        elif kind == "indented":
            changed[i] = "  " + changed[i]
        elif kind == "outdented":
            changed[i] = changed[i].lstrip()
        elif kind == "swapped":
            changed[i], changed[j] = changed[j], changed[i]
        elif kind == "cut":
            changed[i:] = [changed[i][: rng.randrange(1 + len(changed[i]))]]
        elif kind == "character":
            k = rng.randrange(1 + len(changed[i]))
            changed[i] = changed[i][:k] + rng.choice("\0\x07\t:#&*!|>'\"%@`{}[],?-\u2028\ufeffé\ud800") + changed[i][k:]
        elif kind == "tab":
            changed[i] = "\t" + changed[i].lstrip()
        elif kind == "anchor":
            changed[i] = changed[i].replace(": ", ": &a ", 1) + " *a"
        else:
            changed[i] = changed[i].replace(": ", " #", 1)
        yield f"{kind} line {i}, {j}: {lines[i].strip()[:60]}", "\n".join(changed) + "\n"


def _put(tree: Tree, path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[leaf] = value


def _copy(tree: Any) -> Any:
    return {name: _copy(value) for name, value in tree.items()} if isinstance(tree, dict) else tree
