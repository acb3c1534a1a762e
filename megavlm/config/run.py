"""A complete run: the settings of every part. Tested by `tests/test_config.py`."""

from megavlm.data.pack.config import DataConfig
from megavlm.engine.guard import FaultConfig
from megavlm.engine.schedule import OptimizerConfig
from megavlm.engine.zero import EngineConfig
from megavlm.evaluation.held_out import ValidationConfig
from megavlm.evaluation.trained import EvaluationConfig
from megavlm.model.architecture import ModelConfig
from megavlm.model.loss import LossConfig
from megavlm.monitor.metrics import MonitorConfig
from megavlm.monitor.phases import ProfileConfig
from megavlm.routing.config import RoutingConfig
from megavlm.runs.retention import CheckpointConfig
from megavlm.settings import PathText, Seed, Settings
from megavlm.vocabulary import VocabularyConfig


class RunConfig(Settings):
    """A complete run."""

    run_dir: PathText
    """Folder for everything that the run writes."""
    seed: Seed = 0
    """Seed of weights, data order, routing and drawing."""
    init_from: PathText | None = None
    """Start from the weights of another run (its folder, or one of its checkpoints), of an exported folder, or of a pretrained Hugging Face
    model. Only the weights are taken: optimizer, schedule and data start fresh. Ignored once the run has a checkpoint of its own."""
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
    validation: ValidationConfig = ValidationConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
