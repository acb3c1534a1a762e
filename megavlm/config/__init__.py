"""The one typed tree of settings. A recipe is this tree as YAML; unknown keys are refused.

Each part owns its settings (``DataConfig`` beside the lanes, ``FaultConfig`` beside the guard); `RunConfig` puts them together.
"""

from megavlm.config.load import load_config, read_settings, read_value, run_dir_of, save_config
from megavlm.config.run import RunConfig

__all__ = ["RunConfig", "load_config", "read_settings", "read_value", "run_dir_of", "save_config"]
