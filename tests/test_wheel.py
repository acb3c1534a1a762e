"""The wheel holds everything: installed without the checkout, it trains in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "megavlm", "ds_configs", "slurm")


def run(*command: str | Path, folder: Path, packages: Path | None = None) -> str:
    """A command in a folder; with ``packages``, what is installed there comes first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(packages)} if packages else {})
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("setuptools is older than pyproject.toml asks for")
        version("pip")
    except PackageNotFoundError as missing:
        pytest.skip(f"building a wheel offline needs {missing.name}")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        here, there = REPOSITORY / name, source / name
        shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__")) if here.is_dir() else shutil.copy(here, there)
    run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, folder=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as file:
        metadata = Parser().parsestr(next(file.read(name) for name in file.namelist() if name.endswith("METADATA")).decode())
        held = {name.split("/share/megavlm/")[-1] for name in file.namelist()}
    assert metadata["Author"] and metadata["License-Expression"] == "Apache-2.0" and metadata["Keywords"]
    assert {"cuda", "docs", "dev", "eval", "test", "check"} <= set(metadata.get_all("Provides-Extra"))
    assert len(metadata.get_all("Classifier")) > 5
    shipped = [path for folder in ("ds_configs", "slurm", "megavlm/recipes") for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    missing = {str(path.relative_to(REPOSITORY)) for path in shipped if path.suffix not in (".py", ".pyc")} - held
    assert not missing


def test_the_wheel_works_in_an_empty_folder(wheel, tmp_path):
    packages, empty = tmp_path / "packages", tmp_path / "empty"
    empty.mkdir()
    run("pip", "install", "--quiet", "--no-deps", "--target", packages, wheel, folder=empty)
    run("megavlm", "data", "digits", "data/digits", folder=empty, packages=packages)
    smaller = ["--optimizer.num_steps=2", "--optimizer.warmup_steps=1", "--data.num_lanes=1", "--monitor.sample_every_steps=null"]
    run("megavlm", "train", "digits", *smaller, folder=empty, packages=packages)
    assert (empty / "runs/digits/exit_code").read_text().strip() == "0"
    shown = run("megavlm", "submit", "digits", "--nodes=2", "--gpus-per-node=2", "--dry-run", folder=empty, packages=packages)
    assert "srun" in shown
    where = "import megavlm, megavlm.system.files as f; print(megavlm.__file__, f.PROJECT)"
    (empty / "where.py").write_text(where)
    assert run("where", folder=empty, packages=packages).split() == [
        str(packages / "megavlm/__init__.py"),
        str(packages / "share/megavlm"),
    ]
