"""Writes docs/settings.md: every setting of a recipe, from the schema."""

from pathlib import Path

from megavlm.config.reference import page

if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "settings.md"
    path.write_text(page())
    print(path)
