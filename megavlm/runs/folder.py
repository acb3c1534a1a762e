"""The run folder: everything that a run writes, under names that explain themselves.

config.yaml       the resolved recipe          checkpoints/      see `megavlm.engine.checkpoint`
text.model        its text tokenizer, a SentencePiece file or a folder with tokenizer.json
modules/          copies of the Python files that it names
samples/          drawings, routes and attention on the way, PNG
scalars.csv       step, tag, value, if `monitor.writers` has csv
log.txt           what was printed             tensorboard/      tensorboard --logdir
evaluation.json   written by `megavlm evaluate`, with drawings.png
judged/           written by `megavlm judge`
analysis/         written by `megavlm analyze`
status.json       where it stands              exit_code         how it ended; not there while it runs
stragglers.txt    times per rank               forensics/        skipped steps
profile/          traces of `--profile`, with tables
hangs/            stacks of hung steps         environment.json  versions, hardware, command; of every start
save, stop        touch them: the run saves, or saves and ends
slurm/            sbatch scripts that `megavlm submit` rendered, and what the jobs printed
"""

from pathlib import Path


class RunFolder:
    """Paths of a run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.text_model = self.path / "text.model"
        self.modules = self.path / "modules"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.log_file = self.path / "log.txt"
        self.evaluation = self.path / "evaluation.json"
        self.status = self.path / "status.json"
        self.exit_code = self.path / "exit_code"
        self.stragglers = self.path / "stragglers.txt"
        self.forensics = self.path / "forensics"
        self.profile = self.path / "profile"
        self.hangs = self.path / "hangs"
        self.environment = self.path / "environment.json"
