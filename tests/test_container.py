"""The container recipes, as far as a machine without a container engine can tell: they copy what the wheel needs, their shell is sound."""

import re
import subprocess
from pathlib import Path

from tests.test_wheel import SOURCES

REPOSITORY = Path(__file__).parents[1]
DOCKER = (REPOSITORY / "tools/container/Dockerfile").read_text()
APPTAINER = (REPOSITORY / "tools/container/megavlm.def").read_text()


def sections() -> dict[str, str]:
    """The sections of Apptainer's recipe by name."""
    parts = re.split(r"^%(\w+)\n", APPTAINER, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_both_copy_what_the_wheel_is_built_from():
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKER, re.MULTILINE) for name in line.split()[:-1]]
    assert sorted(copied) == sorted(SOURCES)
    assert sorted(line.split()[0] for line in sections()["files"].strip().splitlines()) == sorted(SOURCES)


def test_both_begin_alike_and_install_the_same():
    image = re.search(r"^FROM (.+)$", DOCKER, re.MULTILINE)[1]
    assert f"From: {image}\n" in APPTAINER
    packages = [re.search(r"--no-install-recommends (.+?)(?: \\)?$", text, re.MULTILINE)[1] for text in (DOCKER, APPTAINER)]
    assert packages[0] == packages[1]
    assert all("pip install --no-cache-dir '.[cuda]'" in text for text in (DOCKER, APPTAINER))


def test_their_shell_is_sound():
    runs = re.findall(r"^RUN (.+?)(?<!\\)$", DOCKER, re.MULTILINE | re.DOTALL)
    for script in [*runs, sections()["post"], sections()["runscript"], sections()["test"]]:
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
