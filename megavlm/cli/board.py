"""The command that opens TensorBoard on what a run has written. Tested by `tests/cli/test_board.py`."""

import time
from pathlib import Path

from megavlm.cli.arguments import NotNegative
from megavlm.errors import MegavlmError

# imports of the heavy parts stand in the command, so that --help and mistakes answer at once


class BoardCommands:
    """A part of the commands of `megavlm`, which inherit from it."""

    def board(self, run: str, port: NotNegative = 6006):
        """Show runs in TensorBoard, the losses first.

        A run, a study or a folder of runs. Ctrl-C ends it.

        Args:
            run: The run folder, a study's folder, or a folder with several of them.
            port: Of the page, on this machine only; 0 takes one that is free.
        """
        folder = Path(str(run))
        if not any(folder.rglob("events.out.tfevents.*")):
            raise MegavlmError(f"{folder} holds nothing that TensorBoard shows\n  do:    name a run folder that has trained some steps")
        from tensorboard import program

        # a run's own folder gives shorter names
        shown = folder / "tensorboard" if (folder / "tensorboard").is_dir() and not (folder / "runs").is_dir() else folder
        server = program.TensorBoard()
        server.configure(argv=["tensorboard", "--logdir", str(shown), "--port", str(port)])
        try:
            print(f"{server.launch()}#custom_scalars", flush=True)
        except program.TensorBoardServerException as error:
            raise MegavlmError(f"{error}\n  do:    give another --port") from error
        while True:
            time.sleep(3600)
