"""The training loop and what belongs to one run: initial weights, and reports of skipped steps."""
