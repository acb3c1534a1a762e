"""The one typed tree of settings. A recipe is this tree as YAML; unknown keys are refused.

``load_config`` reports *all* mistakes of a recipe and its overrides at once, each with its dotted path, the value
that was given and, for a name that does not exist, the nearest one that does.
"""

import difflib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from megavlm.data.mixture import SourceMixture
from megavlm.data.overlong import OVER_LONG
from megavlm.data.sources import ALLOWED
from megavlm.errors import ConfigError
from megavlm.routing.policies import POLICIES, AnyPolicy, Dense, Policy
from megavlm.settings import Settings

RECIPES = Path(__file__).parent / "recipes"
_CHECKOUT = Path(__file__).parent.parent
PROJECT = _CHECKOUT if (_CHECKOUT / "ds_configs").is_dir() else Path(sys.prefix) / "share" / "megavlm"
"""Where `ds_configs/` and `slurm/` are: in the checkout, or where the installation put them."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class PixelTokenizerConfig(Settings):
    """Images as grey levels of single pixels (`megavlm.model.image_tokenizer.PixelTokenizer`)."""

    kind: Literal["pixel"] = "pixel"
    """Which tokenizer."""
    levels: Annotated[int, Field(ge=2, le=256)] = 17
    """Size of the codebook: number of grey levels."""
    height: Positive = 8
    """Rows of codes per image."""
    width: Positive = 8
    """Columns of codes per image."""


class VQTokenizerConfig(Settings):
    """The VQ model of Chameleon, Emu3 or Janus, or one trained by `megavlm data image-tokenizer` (`megavlm.model.vq_tokenizer`)."""

    kind: Literal["vq"]
    """Which tokenizer."""
    path: str
    """Folder written by `save_pretrained`, of the VQ model or of the whole model around it. It is not copied into the run folder."""
    height: Positive
    """Rows of codes per image."""
    width: Positive
    """Columns of codes per image."""
    fingerprint: str | None = None
    """Filled in at the start of a run: the SHA-256 of the VQ model. A run does not go on with another one."""


class CompressedTokenizerConfig(Settings):
    """A UniCompress plug-in around another tokenizer (`megavlm.model.compressed_tokenizer`)."""

    kind: Literal["compressed"]
    """Which tokenizer."""
    path: str
    """Folder written by `megavlm data compressor`. It is not copied into the run folder."""
    around: Annotated[PixelTokenizerConfig | VQTokenizerConfig, Field(discriminator="kind")]
    """The tokenizer that the plug-in was trained around."""
    understanding: Literal["continuous", "discrete"] = "continuous"
    """What the model reads of an image: the tokens as features, through a projection of its own; or their codes, as it draws them."""
    fingerprint: str | None = None
    """Filled in at the start of a run: of the plug-in and the tokenizer inside. A run does not go on with others."""


class VocabularyConfig(Settings):
    """What ids mean: text pieces, special tokens, image codes."""

    text_model: str
    """Path of a SentencePiece model, or of a Hugging Face folder with `tokenizer.json`; a copy is kept in the run folder."""
    image_tokenizer: Annotated[
        PixelTokenizerConfig | VQTokenizerConfig | CompressedTokenizerConfig, Field(discriminator="kind")
    ] = PixelTokenizerConfig()
    """How images become codes."""


class SourceConfig(Settings):
    """A set of WebDataset shards with a weight in the mixture."""

    shards: str | list[str]
    """URL or list of URLs; braces expand: `data/train-{0000..0015}.tar`. Also `file:`, `pipe:` and `http:`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples (or tokens, see `data.weights`) drawn from this source, relative to the other weights."""
    repeat: Annotated[float, Field(gt=0)] | None = None
    """Instead of weights, for all sources: shares follow from the sources' sizes, and a sample of this source comes up so many times
    while one of a source with 1 comes up once. Needs indexes (`megavlm data index`)."""
    epochs: Positive | None = None
    """The source ends after so many epochs; 1 makes it finite, for evaluation. Endless if not given."""
    format: str = "megavlm"
    """How samples are written: megavlm, img2dataset, llava, text, interleaved, or `module:function` (see `megavlm.data.formats`)."""
    generation_ratio: Share = 0.5
    """img2dataset, interleaved: share of the images that are drawn instead of read."""
    caption_requests: Annotated[list[str], Field(min_length=1)] = ["Describe the image.", "What does the image show?"]
    """img2dataset: what is asked when a caption is the answer."""
    image_root: str | None = None
    """llava: folder of the images that the JSON names; none if they are in the tar."""


class DataConfig(Settings):
    """Sources, and how they become packs."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Name → source."""
    num_lanes: Positive = 8
    """Independent streams of packs = packs per optimizer step. The world size must divide it."""
    pack_tokens: Positive = 8192
    """Upper bound of a pack's length in tokens (memory)."""
    weights: Literal["samples", "tokens"] = "samples"
    """What the sources' weights share out."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Weights are raised to 1/temperature: above 1 evens them out (arXiv 1907.05019)."""
    look_ahead_samples: Positive = 256
    """Samples that a lane holds to choose from. Also the longest wait of a sample, counted in packs of its lane."""
    over_long: Literal[OVER_LONG] = "error"
    """What happens to samples longer than a pack (`megavlm.data.overlong`). All are counted."""
    fill: Annotated[float, Field(gt=0, le=1)] = 0.985
    """The packs' target cost, as a share of the mean cost of `pack_tokens` tokens of the mixture."""
    unconditional_ratio: Share = 0.1
    """Share of generation prompts replaced by `<unconditional>`, for classifier-free guidance (Ho & Salimans 2022)."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 builds packs in the training process."""
    prefetch_packs: Positive = 4
    """Packs that each worker prepares ahead."""
    max_errors: Annotated[int, Field(ge=0)] = 0
    """Bad samples or shards that each lane counts, reports and passes over before it stops the run."""
    when_sources_change: Literal[tuple(ALLOWED)] = "strict"
    """If sources differ from the checkpoint's: an error, or go on where sources were added, added or removed, or changed in any way."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often in a row an HTTP connection is tried again."""
    cache_dir: str | None = None
    """Folder for local copies of shards that are not local files; none are kept if not given."""
    cache_gib: Annotated[float, Field(gt=0)] = 100.0
    """Size limit of that folder; the copies used longest ago are removed."""
    mixture_samples: Positive = 512
    """Samples of each source that are looked at for the packs' target cost."""
    mixture: dict[str, SourceMixture] | None = None
    """Filled in at the start of a run and kept with it: what was found, per source."""


class RoutingConfig(Settings):
    """The route of each task and its schedule over the run."""

    modules: list[str] = []
    """Python modules or files that register policies and selectors of your own; see docs/write-a-policy.md."""
    understanding: Annotated[SerializeAsAny[Policy], AnyPolicy] = Dense()
    """Policy for image spans that the model reads (without a loss)."""
    generation: Annotated[SerializeAsAny[Policy], AnyPolicy] = Dense()
    """Policy for image spans that the model draws (with a loss)."""
    warmup_fraction: Share = 0.0
    """Over this first share of the steps the kept length falls linearly from everything to `keep_ratio`."""
    dense_finish_fraction: Share = 0.0
    """Over this last share of the steps everything is kept, because inference is dense."""


NOT_ARCHITECTURE = ("vocab_size", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path",
                    "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
"""Fields of a pretrained model's config.json that say nothing about its layers, or that the run's own vocabulary replaces."""


def _architecture_of(folder: str) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError("is neither a mapping nor a folder with config.json")
    tree = json.loads(file.read_text())
    if "auto_map" in tree:
        raise ValueError("needs code of its own, which is never run")
    return {name: value for name, value in tree.items() if name not in NOT_ARCHITECTURE}


class ModelConfig(Settings):
    """The backbone: decoder layers of a stock Hugging Face model."""

    architecture: Annotated[dict[str, Any], BeforeValidator(lambda given: _architecture_of(given) if isinstance(given, str) else given)]
    """A `transformers` configuration: `model_type` and its fields, or the folder of a pretrained model, whose `config.json` is then taken over.
    `vocab_size` is set by the vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; `auto` is bfloat16 on CUDA and float32 on CPU."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""


class LossConfig(Settings):
    """Next-token cross-entropy per task."""

    task_weights: dict[Literal["understanding", "generation", "text"], Annotated[float, Field(ge=0)]] = {
        "understanding": 1.0,
        "generation": 1.0,
        "text": 1.0,
    }
    """Factor of each task's mean loss. A task that is not named has weight 1."""
    gate_weight: Annotated[float, Field(ge=0)] = 0.01
    """Factor of the auxiliary loss of learned gates (policy `mixture_of_depths`), a mean over image tokens."""
    chunk_rows: Positive = 4096
    """Labelled rows that go through the output head at a time (bounds the memory of the logits)."""


class OptimizerConfig(Settings):
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay."""

    num_steps: Positive
    """Optimizer steps of the run."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the last step, relative to the peak."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """For matrices; norms and biases have none."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class EngineConfig(Settings):
    """DeepSpeed and the processes."""

    deepspeed: str = "zero3"
    """Name of a JSON file in `ds_configs/`, or a path. Batch sizes, precision and clipping are set by the recipe."""
    timeout_s: Positive = 600
    """A collective that takes longer is an error instead of a hang; until the first step is done."""
    step_timeout_s: Positive = 300
    """The same from then on. Drawings and reports between steps must fit in too."""
    gc_every_steps: Positive = 100
    """Python's garbage is collected at these steps, on all ranks together, and at no other time."""
    stop_margin_s: Annotated[float, Field(ge=0)] = 20.0
    """Before the job's time limit a run saves and ends; so long before it needs to, going by earlier saves and steps."""


class FaultConfig(Settings):
    """Bad steps and hanging ones."""

    spike_sigmas: Annotated[float, Field(gt=0)] = 6.0
    """A step is skipped if its loss or gradient norm lies so many standard deviations above the mean of the window."""
    spike_window_steps: Annotated[int, Field(ge=2)] = 128
    """Accepted steps that mean and deviation are taken over; nothing is a spike until there are so many."""
    max_skipped_in_a_row: Positive = 10
    """The run ends when so many steps in a row were skipped."""
    step_budget_s: Positive = 1800
    """The watchdog ends a step that takes longer, with the stacks of all ranks; until the first step is done."""
    steady_step_budget_factor: Annotated[float, Field(gt=1)] = 20.0
    """From then on the budget is this many times the slowest of the last steps, but at least a minute and at most `step_budget_s`."""


class CheckpointConfig(Settings):
    """When checkpoints are written and how many stay. One is always written at the end."""

    every_steps: Positive = 500
    """Steps between checkpoints."""
    background: bool = True
    """Write while training goes on, from a copy in host memory; otherwise training waits."""
    keep_last: Positive = 2
    """The newest so many stay."""
    keep_every_steps: Positive | None = None
    """Checkpoints at multiples of this stay for ever."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """The best so many by `best_metric` stay as well."""
    best_metric: str = "loss/generation"
    """TensorBoard tag, as reported last before the save."""
    best_mode: Literal["min", "max"] = "min"
    """Whether small or large is good."""


class MonitorConfig(Settings):
    """What is reported, and how often."""

    log_every_steps: Positive = 10
    """Steps between lines in the log and points in TensorBoard."""
    sample_every_steps: Positive | None = None
    """Steps between drawings that go to TensorBoard and `samples/`; none if not given."""
    sample_prompts: list[str] = []
    """What to draw then."""
    attention_every_steps: Positive | None = None
    """Steps between looks at where attention goes, by layer and task, in the step's own packs; none if not given."""
    geometry_every_steps: Positive | None = None
    """Steps between comparisons of the tasks' gradients, by block; none if not given. Such a step costs as much again for each task."""


class EvaluationConfig(Settings):
    """How `megavlm evaluate` samples and what it judges with."""

    benchmark: str | None = None
    """What is asked and who judges: digits, shapes, or `module:Class` (see `megavlm.evaluation.benchmark`)."""
    shards: str | list[str] | None = None
    """The held-out samples of the benchmark."""
    num_drawings: Positive = 200
    """Images to draw, evenly over the benchmark's prompts."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of the drawing."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k most likely codes; 0 is all of them."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    route: Literal["dense", "trained"] = "dense"
    """Which tokens are active when the model is judged or draws: all, or as the policies of the training have it, in full."""


class RunConfig(Settings):
    """A complete run."""

    run_dir: str
    """Folder for everything that the run writes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of weights, data order, routing and drawing."""
    init_from: str | None = None
    """Begin with the weights of another run (its folder, or one of its checkpoints), of an exported folder, or of a pretrained Hugging Face
    model. Only weights: the optimizer, the schedule and the data begin anew. Without effect once the run has a checkpoint of its own."""
    model: ModelConfig
    vocabulary: VocabularyConfig
    data: DataConfig
    routing: RoutingConfig = RoutingConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    faults: FaultConfig = FaultConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def find_resource(folder: str, name: str, suffix: str) -> Path:
    """The file that ``name`` means: a path, or the stem of a file that ships with megavlm in ``folder``."""
    shipped = (RECIPES.parent if folder.startswith("recipes") else PROJECT) / folder
    candidates = [Path(name), shipped / f"{name}{suffix}"]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob(f"*{suffix}")))
    raise ConfigError(f"no file {name}, and {folder} has none of that name\n  do:    give a path or one of: {known}")


def load_config(recipe: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: Path of a YAML file, or the name of one that ships with megavlm.
        overrides: Dotted path → value; a string is read as YAML.

    Raises:
        ConfigError: With every mistake of the recipe and the overrides.
    """
    path = find_resource("recipes", str(recipe), ".yaml")
    tree = read_settings(path)
    for dotted, value in (overrides or {}).items():
        _override(tree, dotted, read_value(dotted, value))
    _import_modules(tree, path)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(mistake, tree) for mistake in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(lines)) from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        ConfigError: If it is not YAML, or no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}\n  do:    correct the file at the place named") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no settings\n  do:    start from a file in {RECIPES}")
    return tree


def read_value(name: str, value: Any) -> Any:
    """What was given for a setting on the command line; a string is read as YAML."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {value!r} is not YAML: {error}\n  do:    close what is open, and quote what has a colon") from error


def _import_modules(tree: dict, recipe: Path) -> None:
    """Import the modules that register policies, so that the recipe may name them."""
    routing = tree.get("routing")
    names = routing.get("modules") if isinstance(routing, dict) else None
    for name in names if isinstance(names, list) else []:
        try:
            import_user_module(str(name))
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"{recipe}: routing.modules: {name} cannot be imported: {type(error).__name__}: {error}\n"
                "  do:    give the path of a Python file, or a module that Python finds"
            ) from error
    if names:
        # the union of policies is part of the schema
        RoutingConfig.model_rebuild(force=True)
        RunConfig.model_rebuild(force=True)


def import_user_module(name: str) -> ModuleType:
    """Import a module by its name, or a file by its path; a second time is no harm."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    key = "megavlm_user_" + re.sub(r"\W", "_", str(path))
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[key] = module
    return sys.modules[key]


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that ``load_config`` reads again."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110))


def _override(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[leaf] = value


def _describe(mistake: dict, tree: Any) -> str:
    parts = []
    for i, part in enumerate(mistake["loc"]):
        # pydantic names the chosen member of a union in the path; the user did not write it
        if isinstance(tree, dict) and part not in tree and i + 1 < len(mistake["loc"]):
            continue
        parts.append(str(part))
        tree = tree.get(part) if isinstance(tree, dict) else None
    path, value = ".".join(parts), mistake["input"]
    if mistake["type"] == "extra_forbidden":
        return f"  {path}: there is no such setting (value {value!r}). Did you mean {nearest_path(path)}?"
    if mistake["type"] == "missing":
        return f"  {path}: is missing and has no default"
    if mistake["type"] == "union_tag_invalid":
        tags = mistake["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(str(mistake["ctx"]["tag"]), tags, n=1, cutoff=0)[0]
        discriminator = mistake["ctx"]["discriminator"].strip("'")
        return f"  {path}.{discriminator}: there is no {mistake['ctx']['tag']!r}. Did you mean {near}? There are {', '.join(tags)}."
    return f"  {path}: {mistake['msg']} (value {value!r})"


def nearest_path(path: str) -> str:
    """The existing setting that looks most like ``path``, by its whole path and by its last name."""
    given = path.split(".")

    def likeness(known: str) -> float:
        leaf = known.split(".")[-1]
        whole = difflib.SequenceMatcher(None, known, path).ratio()
        return whole + difflib.SequenceMatcher(None, leaf, given[-1]).ratio() + (given[-1] in leaf.split("_"))

    known_paths = [
        # the names inside a mapping are the user's own: take them over
        ".".join(given[i] if part == "*" and i < len(given) else part for i, part in enumerate(known.split(".")))
        for known in _all_paths(RunConfig)
    ]
    return max((known for known in known_paths if not path.startswith(known + ".")), key=likeness)


def _all_paths(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings below a Config class; ``*`` stands for the names of a mapping."""
    if get_origin(annotation) is dict:
        yield from _all_paths(get_args(annotation)[1], f"{prefix}*.")
    elif annotation is Policy:
        for policy in POLICIES.values():
            yield from _all_paths(policy, prefix)
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _all_paths(member, prefix)
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        for name, field in annotation.model_fields.items():
            yield prefix + name
            yield from _all_paths(field.annotation, f"{prefix}{name}.")
