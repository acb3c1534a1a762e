"""A run that an earlier version began goes on: its configuration, checkpoint, state and seeds mean what they meant.

``data/run_of_0_1.tar.gz`` is the run folder of version 0.1 (commit d4f27de) after step 3 of 6, on one process. The digests and losses
below are those of the same version at step 6.
"""

import os
import tarfile
from pathlib import Path

import pytest

from megavlm.config import load_config
from megavlm.launch.train import make_trainer
from megavlm.routing.tasks import TASKS
from tests.distributed.ranks import run_ranks

DIGESTS = {
    0: "ae5a3f0df41f93a8462a7f6b0ab35e54cf2503e268be2c71f86503e0463e8c0b",
    1: "6fd97b9156770f12b47f345d8e5c5a6aa8850c7471670b79d5cf106dd62bd43f",
    2: "ca365722e57714960c3137780ecd038eb0c641db1390334bf0cdb04126fd7705",
    3: "1b0de071acd96c2fe408989ac17dc9d2622616d299823e1cff91943fece0b328",
}
LOSSES = {"understanding": 5.8085, "generation": 5.7329}
"""Of step 6, as its log has them."""


def go_on(world, folder: str) -> tuple[int, dict[int, str], dict[str, float]]:
    """Train the run in a folder to its end: the step where it began, digests of this rank's lanes, losses of the last step."""
    os.chdir(folder)
    trainer = make_trainer(load_config("run/config.yaml", {"run_dir": "run"}), world)
    begin = trainer.step
    trainer.run()
    return begin, trainer.digests, {task: trainer._reported[f"loss/{task}"] for task in TASKS if f"loss/{task}" in trainer._reported}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_of_version_0_1_goes_on(digits_folder, tmp_path, world_size):
    with tarfile.open(Path(__file__).parent / "data" / "run_of_0_1.tar.gz") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_folder)
    results = run_ranks(world_size, go_on, str(tmp_path))
    assert [begin for begin, _, _ in results] == [3] * world_size
    assert {lane: digest for _, digests, _ in results for lane, digest in digests.items()} == DIGESTS
    assert results[0][2] == pytest.approx(LOSSES, abs=6e-5)
