"""P13: imports run one way, read from the source: late imports and those for type checkers count as well."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megavlm"

ORDER = (
    *("errors", "settings", "randomness", "system", "costs"),
    *("routing", "image_tokenizers", "vocabulary", "data.read", "data.pack", "data.tools"),
    *("model", "monitor", "runs", "engine", "evaluation", "benchmarks", "config"),
    *("parts", "planner", "talk", "training", "analysis", "study", "observers", "launch", "cli"),
)
"""Rooms and single files, the lowest first: each imports only those before it."""


def module_of(file: Path) -> str:
    return ".".join(("megavlm", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself and its ``__main__``, which everything and nothing may import."""
    inside = module.removeprefix("megavlm").removeprefix(".")
    return next((room for room in ORDER if inside == room or inside.startswith(room + ".")), None)


def imports_of(module: str, tree: ast.AST) -> set[str]:
    """The modules of ours that a module names in any import statement."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where they lead"
            assert node.module
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return {name for name in found if name.startswith("megavlm.")}


IMPORTS = {module: imports_of(module, ast.parse(file.read_text())) for module, file in MODULES.items()}


def climbs(imports: dict[str, set[str]]) -> list[str]:
    """Every import that leads to a higher room."""
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if room_of(module) and (room_of(other) is None or ORDER.index(room_of(other)) > ORDER.index(room_of(module)))
    ]


def test_every_module_is_in_a_room_of_the_order():
    assert not [m for m in MODULES if room_of(m) is None and m not in ("megavlm", "megavlm.__main__", "megavlm.data")]
    assert {room_of(module) for module in MODULES} >= set(ORDER), "a room that is gone"


def test_no_import_leads_to_a_higher_room():
    assert not climbs(IMPORTS)


@pytest.mark.parametrize("other", ["megavlm.cli.main", "megavlm.engine.zero"])
def test_an_import_that_climbs_is_seen(other):
    tree = ast.parse(f"def late():\n    from {other} import x\n")
    assert climbs({"megavlm.data.pack.lane": imports_of("megavlm.data.pack.lane", tree)}) == [f"megavlm.data.pack.lane imports {other}"]


def test_no_two_modules_import_each_other():
    """Not even by way of others: every module can be read before those that use it."""
    left = {module: others & set(MODULES) - {module} for module, others in IMPORTS.items()}
    while free := [module for module, others in left.items() if not others & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"these wait for each other: {sorted(left)}"
