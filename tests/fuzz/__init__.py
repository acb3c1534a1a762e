"""Hostile recipes, samples, run folders: each ends with a documented message or the right result (see `tests.fuzz.harness`)."""
