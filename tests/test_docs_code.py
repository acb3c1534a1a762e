"""The Python blocks of the documents run as they stand, each page in a process and an empty folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megavlm.config import load_config
from megavlm.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

USES = {
    "parts-alone.md": "",
    "write-a-format.md": """
from megavlm.data.read.formats import FORMATS, parse
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.source import SourceConfig
import io
from PIL import Image
FORMATS["labelled"] = labelled
png = io.BytesIO()
Image.new("RGB", (8, 8)).save(png, "PNG")
source = SourceConfig(shards="a.tar", format="labelled")
sample = parse("a", {"png": png.getvalue(), "label": b"dog"}, source, Coordinates(0, 0, 0, 0), seed=0)
assert sample.segments[-1].text == "dog" and sample.images["img0"].shape == (8, 8, 3)
try:
    parse("a", {"png": png.getvalue()}, source, Coordinates(0, 0, 0, 0), seed=0)
except DataError as error:
    assert "no label" in str(error)
else:
    raise AssertionError
""",
    "write-an-image-tokenizer.md": """
from megavlm.config import load_config
from megavlm.parts.parts import Parts
parts = Parts(load_config("digits"), image_tokenizer=Ink()).with_mixture()
pack = next(parts.make_lane(0))[0]
assert pack.num_tokens > 64 and parts.image_tokenizer.codebook_size == 2
codes = Ink().encode([np.zeros((20, 30, 3), np.uint8)])
assert codes.shape == (1, 8, 8) and codes.all() and Ink().decode(codes).shape == (1, 8, 8, 3)
""",
    "write-a-judge.md": """
images = np.stack([np.full((8, 8, 3), 200 * (i % 2), np.uint8) for i in range(6)])
judge = Brightness([], 6, None)
assert judge.requests[1] == "a bright picture" and judge.judge(images) == {"accuracy": 1.0}
assert judge.judge(images[::-1]) == {"accuracy": 0.0}
""",
}
"""Page → what is done with its blocks, in the same process after them."""


def blocks_of(page: str) -> list[str]:
    return BLOCK.findall((REPOSITORY / "docs" / page).read_text())


@pytest.mark.parametrize("page", USES)
def test_the_blocks_of_a_page_run(page, tmp_path, digits_folder):
    blocks = blocks_of(page)
    assert blocks
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits_folder)
    (tmp_path / "page.py").write_text("\n".join([*blocks, USES[page]]))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_smallest_recipe_is_one(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(re.search(r"^```yaml\n(.*?)^```", (REPOSITORY / "docs/recipes.md").read_text(), re.MULTILINE | re.DOTALL)[1])
    assert load_config(str(recipe), {}).run_dir == "runs/mine"
    blocks = list(yaml.safe_load(recipe.read_text()))
    for block in blocks:
        less = {name: value for name, value in yaml.safe_load(recipe.read_text()).items() if name != block}
        (tmp_path / "less.yaml").write_text(yaml.safe_dump(less))
        with pytest.raises(ConfigError, match=block):
            load_config(str(tmp_path / "less.yaml"), {})


def test_a_part_alone_takes_under_thirty_lines():
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in blocks_of("parts-alone.md")]
    assert len(lengths) == 3 and max(lengths) < 30
