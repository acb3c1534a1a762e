"""From a run folder to its configuration and its trained model. Tested by `tests/evaluation/sets/test_judge.py`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megavlm.config import RunConfig, load_config
from megavlm.config.load import read_settings
from megavlm.engine.weights import load_weights
from megavlm.evaluation.trained import TrainedModel
from megavlm.model.attention import fits_fused
from megavlm.parts.exported import is_export, load_exported
from megavlm.parts.parts import Parts
from megavlm.runs.checkpoints import check_run, locate
from megavlm.runs.folder import RunFolder
from megavlm.runs.user_files import kept_name


def load_run_config(folder: RunFolder, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a run, with its own copies of the text model and of the user's Python files.

    Args:
        folder: Folder of the run.
        overrides: Settings to change, as on the command line.
    """
    check_run(folder)
    own: dict[str, Any] = {"vocabulary.text_model": str(folder.text_model)}
    routing = read_settings(folder.config_file).get("routing")
    if isinstance(routing, dict) and isinstance(routing.get("modules"), list) and routing["modules"]:
        own["routing.modules"] = [kept_name(folder, str(name)) for name in routing["modules"]]
    return load_config(str(folder.config_file), own | (overrides or {}))


def to_bfloat16(module: nn.Module) -> None:
    """Round the parameters as DeepSpeed does in training: buffers, such as the frequencies of the rotary embedding, stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()


def load_trained(run: str | Path, overrides: dict[str, Any] | None = None, *, in_float32: bool = False) -> tuple[TrainedModel, Parts]:
    """The weights of a checkpoint, by default a run's newest one, in this one process, and the parts of its configuration.

    Args:
        run: The run folder, or one checkpoint in it, or a folder that `megavlm export` wrote.
        overrides: Settings to change, as on the command line.
        in_float32: Whatever the training's precision was. Otherwise it is the training's on CUDA, and float32 on a CPU.

    Raises:
        MegavlmError: If there is no checkpoint, or it is damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_export(Path(run)):
        folder, checkpoint = RunFolder(run), Path(run)
        backbone, parts = load_exported(checkpoint, overrides or {}, device)
    else:
        folder, checkpoint = locate(run)
        parts = Parts(load_run_config(folder, overrides), device)
        backbone = parts.make_backbone()
        load_weights(checkpoint, backbone)
    backbone.to(device).eval()
    if device.type == "cuda" and parts.config.model.is_bfloat16("cuda") and fits_fused(parts.shape.head_width) and not in_float32:
        to_bfloat16(backbone)
    model = TrainedModel(
        folder=folder,
        checkpoint=checkpoint,
        backbone=backbone,
        encoder=parts.encoder,
        costing=parts.inference_costing,
        guidance_costing=parts.guidance_costing,
        device=device,
        config=parts.config.evaluation,
        seed=parts.config.seed,
    )
    return model, parts
