"""The table of the documents is the one that the script measured."""

import json
from pathlib import Path

from megavlm.model.families import EXACT
from tools.families import table

REPOSITORY = Path(__file__).parents[2]


def test_the_documents_show_what_was_measured():
    results = json.loads((REPOSITORY / "docs/results/families.json").read_text())["families"]
    assert table(results) in (REPOSITORY / "docs/models.md").read_text()
    exact = {family for family, found in results.items() if "refused" not in found}
    assert set(EXACT) & set(results) <= exact
    assert all(found["in"] <= 1e-4 for found in results.values() if "in" in found)
    assert all(found["out"] <= 1e-4 and 0 < found["loss"] < 10 for found in results.values() if "loss" in found)
