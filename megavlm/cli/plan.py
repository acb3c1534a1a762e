"""`megavlm plan`. Tested by `tests/planner/test_plan.py`."""

from pathlib import Path

from megavlm.cli.arguments import Positive
from megavlm.errors import ConfigError


class PlanCommand:
    """What a run would take."""

    def plan(
        self,
        recipe: str,
        gpus: Positive = 8,
        gpu: str = "h100",
        calibration: str = "",
        standard_data: bool = False,
        sequence_parallel: Positive = 1,
        out: str = "plan.png",
        **overrides,
    ):
        """Say what a run would take: memory, time, GPU-hours.

            megavlm plan unified-7b --gpus 256 --standard_data

        Args:
            recipe: Path of a YAML file, or a name such as `digits`.
            gpus: Number of GPUs.
            gpu: Whose data sheet is taken: a100, h100, h200, b200 or l40s.
            calibration: Rates that tools/calibrate.py measured, in place of a data sheet.
            standard_data: Without the recipe's files: the standard mixture, and 8192 image codes behind the architecture's vocab_size.
            sequence_parallel: GPUs that share a pack. For the plan only, training does not do it: docs/long-sequences.md.
            out: Figure to write (PNG); the numbers go beside it (JSON).
            overrides: Settings of the recipe to change.
        """
        from megavlm.config import load_config
        from megavlm.planner.plan import Planner
        from megavlm.planner.rates import from_file, from_sheet
        from megavlm.planner.report import report

        if gpus % sequence_parallel:
            raise ConfigError(f"--sequence_parallel={sequence_parallel} does not divide {gpus} GPUs\n  do:    give a divisor of --gpus")
        rates = from_file(Path(str(calibration))) if calibration else from_sheet(str(gpu))
        planner = Planner(
            load_config(recipe, overrides),
            rates,
            on_cuda=rates.host.runs_ahead,
            standard_data=standard_data,
            sequence_parallel=sequence_parallel,
        )
        print(report(planner, gpus, Path(str(out))))
