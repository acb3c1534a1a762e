"""What is kept of a command that Ctrl-C ended, and how to go on. Training says it by itself: see `megavlm.engine.signals`.

Tested by `tests/cli/test_help.py`.
"""

AGAIN = "give the same command again to go on"
KEPT = {
    "study": f"arms that are done stay, the others have saved what they had; {AGAIN}",
    "data encode": f"shards that are complete stay; {AGAIN}",
    "data index": f"indexes that were written stay; {AGAIN}",
    "data build": "shards that are complete stay; remove them, and give the same command again",
    "judge": "the answers so far are in RUN/judged/; the figures are written at the end, so it starts anew",
    "checkpoint prune": f"what was removed is gone, the other checkpoints are intact; {AGAIN}",
    "board": "the run is as it was",
    "batch": "the answers and pictures so far are in the new folder; remove it, or name another",
    "serve": "the conversations are gone",
    "submit": "see `squeue --me` for what was submitted before",
}
"""The first words of a command → what is kept of it."""
NOTHING = "nothing was written; give the same command again to start anew"


def what_is_kept(arguments: list[str]) -> str:
    """The words for a command line."""
    return next((words for command, words in KEPT.items() if arguments[: len(command.split())] == command.split()), NOTHING)
