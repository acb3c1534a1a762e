"""Habits that a person would forget: files stay short, and every module says which test holds it to its promise."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [file for file in sorted((ROOT / "megavlm").rglob("*.py")) if file.name not in ("__init__.py", "__main__.py")]
LONGEST, LONGEST_MEDIAN, FILES_AT_THE_TOP = 400, 150, 8


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_files_are_short():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in MODULES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
    assert statistics.median(lengths.values()) < LONGEST_MEDIAN


def test_the_top_holds_a_handful_of_files():
    assert len(list((ROOT / "megavlm").glob("*.py"))) <= FILES_AT_THE_TOP


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for_and_names_its_test(file):
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert doc, "no docstring"
    place = file.relative_to(ROOT / "megavlm")
    if (ROOT / "tests" / place.with_name(f"test_{place.name}")).is_file():
        return
    named = [word.strip("`.,;)(") for word in doc.split() if word.strip("`.,;)(").startswith("tests/")]
    assert named, f"name the test in the docstring, or write tests/{place.with_name(f'test_{place.name}')}"
    assert all((ROOT / name).exists() for name in named), named
