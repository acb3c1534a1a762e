"""The commands: `megavlm …` or `python -m megavlm …`."""

import logging
import os
import sys
import warnings

import megavlm
from megavlm.cli.analyze import AnalyzeCommands
from megavlm.cli.arguments import asks_for_help, check_arguments
from megavlm.cli.board import BoardCommands
from megavlm.cli.completion import completion_script
from megavlm.cli.data import DataCommands
from megavlm.cli.help import help_of
from megavlm.cli.interrupted import what_is_kept
from megavlm.cli.judge import JudgeCommands
from megavlm.cli.plan import PlanCommand
from megavlm.cli.recipes import InitCommand, RecipeCommands
from megavlm.cli.runs import CheckpointCommands, RunCommands
from megavlm.cli.talk import TalkCommands
from megavlm.errors import ConfigError, MegavlmError
from megavlm.system.progress import Console, be_quiet

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class Commands(RunCommands, BoardCommands, InitCommand, PlanCommand, TalkCommands):
    """Train unified vision-language models, spending fewer FLOPs on image tokens.

    A run is a recipe: a YAML file, or the name of one that ships with megavlm. Every setting of it can be changed on the
    command line by its dotted path: --optimizer.num_steps=200 --data.num_lanes=8
    """

    def __init__(self):
        self.data = DataCommands()
        self.recipe = RecipeCommands()
        self.judge = JudgeCommands()
        self.checkpoint = CheckpointCommands()
        self.analyze = AnalyzeCommands()

    def train(self, recipe: str, profile: bool = False, **overrides):
        """Train a recipe, or go on with it from its checkpoint.

        Alone, or one process per GPU under torchrun, the deepspeed launcher or srun: which one is found out from the environment.

            torchrun --standalone --nproc-per-node 2 -m megavlm train digits

        Args:
            recipe: Path of a YAML file, or a name such as `digits`.
            profile: Trace the third and the fourth step into RUN/profile/, and log where their time went; profile.steps and profile.ranks
                choose others.
            overrides: Settings to change: --run_dir=runs/mine --optimizer.learning_rate=1e-3 --init-from=runs/other
        """
        from megavlm.launch.train import train

        train(str(recipe), overrides | ({"profile.enabled": True} if profile else {}))

    def evaluate(self, run: str, **overrides):
        """Judge a checkpoint on held-out data.

        By default a run's newest one. Writes RUN/evaluation.json and RUN/drawings.png.

        With a benchmark its questions and judge. Without one losses, exact match (RUN/answers.jsonl) and drawings of held-out samples.

        Args:
            run: The run folder, or one checkpoint in it: RUN/checkpoints/step-00000500
            overrides: Settings to change: --evaluation.guidance=3 --evaluation.num_drawings=1000
        """
        import json

        from megavlm.evaluation.evaluate import evaluate
        from megavlm.parts.trained import load_trained

        model, parts = load_trained(str(run), overrides)
        print(json.dumps(evaluate(model, parts.config.validation), indent=2))

    def doctor(self):
        """Say what this machine can do, and what is missing."""
        from rich import print as show

        from megavlm.launch.doctor import examine

        table, missing = examine()
        show(table)
        show("nothing is missing" if not missing else "missing:\n  " + "\n  ".join(missing))

    def completion(self, shell: str = "bash"):
        """Print the script that lets a shell complete commands and options.

            eval "$(megavlm completion bash)"           # in ~/.bashrc; zsh likewise
            megavlm completion fish | source            # in config.fish

        Args:
            shell: bash, zsh or fish.
        """
        print(completion_script(self, shell))


def main() -> None:
    """Run a command; mistakes of the user end with a message and exit status 2, not with a traceback."""
    import fire

    # the deepspeed launcher puts it before the command, and says the same in the environment
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    console = Console()
    if "--quiet" in arguments:
        arguments.remove("--quiet")
        console.setLevel(logging.WARNING)
        be_quiet()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console])
    for noisy in ("DeepSpeed", "deepspeed", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # torch floods the screen with these under DeepSpeed
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if arguments == ["--version"]:
        print(f"megavlm {megavlm.__version__}")
        return
    commands = Commands()
    try:
        if (path := asks_for_help(commands, arguments)) is not None:
            print(help_of(commands, path))
            return
        fire.Fire(commands, check_arguments(commands, arguments), name="megavlm")
    except MegavlmError as error:
        # a mistake in the recipe is the same on every rank: one message is enough
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"megavlm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # in `train` Ctrl-C saves: see megavlm.engine.signals
        print(f"megavlm: ended by Ctrl-C; {what_is_kept(arguments)}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"megavlm: {error.filename}: {error.strerror}\n  do:    check the path and its permissions", file=sys.stderr)
        sys.exit(2)
