"""Every command of the documents is one that exists, and runs: here, in another test, or it is said why it does not."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megavlm.cli.arguments import check_arguments
from megavlm.cli.main import Commands
from tests.conftest import TINY

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = "megavlm|python|bash|torchrun|pytest|tensorboard|ssh|docker|apptainer|touch|kill|pip"

HERE = (
    "megavlm data digits data/digits",
    "torchrun --standalone --nproc-per-node 2 -m megavlm train digits",
    "megavlm evaluate runs/digits",
    "python tools/compare_with_dense.py runs/digits",
    "python tools/page.py runs/digits",
    'megavlm generate runs/digits "a handwritten seven" --out grid.png',
    'megavlm analyze attention runs/digits --shards="data/digits/{understanding,generation}-test-00.tar"',
    "megavlm analyze drops runs/digits --flops_share=0.6",
    "megavlm doctor",
)
"""What the test below runs, in this order, on a model that takes seconds."""
SMALLER = {
    "train": [f"--{name}={value}" for name, value in TINY.items()],
    "evaluate": ["--evaluation.num_drawings=10"],
    "tools/compare_with_dense.py": ["--num_packs=1", "--repeats=1"],
    "analyze": ["--num_packs=1"],
}

ELSEWHERE = {
    r"megavlm submit|python -m tests\.slurm": "tests/launch/test_submit.py, tests/slurm",
    r"touch|kill|megavlm replay|megavlm status": "tests/distributed, tests/slurm",
    r"megavlm checkpoint|megavlm export": "tests/engine, tests/parts",
    r"torchrun .* --run_dir=runs/a|megavlm train digits --run_dir=runs/b": "tests/distributed",
    r"megavlm data": "tests/data, tests/image_tokenizers, tests/cli",
    r"megavlm judge": "tests/evaluation/sets",
    r"megavlm (init|recipe)|python make_pictures\.py|torchrun .* train mine\.yaml": "tests/launch/test_init.py, tests/test_own_data.py",
    r"megavlm (ask|batch|serve)": "tests/talk",
    r"megavlm board": "tests/cli/test_board.py",
    r"megavlm plan|(python|torchrun .*) tools/(calibrate|plan_error|longest_pack)\.py": "tests/planner",
    r"python tools/sweep_drawing\.py": "tests/tools/test_sweep_drawing.py",
    r"megavlm analyze": "tests/analysis",
    r"megavlm train digits --routing\.modules": "tests/routing/test_user_policy.py",
    r"megavlm (train|evaluate|generate) ": "tests/distributed, tests/cli, tests/evaluation: with other settings",
    r"megavlm study|bash tools/(shapes|compress)\.sh": "takes minutes to hours: the figures were made with it",
    r"python tools/(bench|kill)|torchrun .* tools/bench": "the same",
    r"bash tools/(quickstart|test|check|docs)\.sh|pytest|python tools/families\.py": "CI, or the lines above on a smaller model",
    r"torchrun .*--nproc-per-node 8": "needs 8 GPUs or cores",
    r"docker|apptainer": "needs a container engine and a registry",
    r"ssh|tensorboard|pip install": "needs another machine, or a network",
}
"""Pattern → where such a command runs, or what it needs."""


def commands_of(page: Path) -> list[str]:
    """The commands in the shell blocks of a page, without comments, lines that go on joined."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE))
    lines = re.findall(rf"^((?:{PROGRAMS}) .*)$", f"{fenced}\n{indented}", re.MULTILINE)
    return [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines]


ALL = dict.fromkeys(command for page in PAGES for command in commands_of(page))


@pytest.mark.parametrize("command", ALL)
def test_a_command_exists_and_somebody_runs_it(command):
    # what may be left out stands in brackets
    words = shlex.split(re.sub(r"\[(--[^]]*)]", r"\1", command.split(" > ")[0]))
    if words[0] == "megavlm" or "-m megavlm" in command:
        check_arguments(Commands(), words[words.index("megavlm") + 1 :])
    assert command in HERE or any(re.match(pattern, command) for pattern in ELSEWHERE), "run it in this file, or say where it runs"


def test_what_runs_here_stands_in_the_documents():
    assert len(ALL) > 60
    assert [command for command in HERE if command not in ALL and command != "python tools/page.py runs/digits"] == []


@pytest.mark.slow
def test_the_commands_of_the_first_run_work(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for command in HERE:
        program, *words = shlex.split(command)
        words = [str(REPOSITORY / word) if word.startswith("tools/") else word for word in words]
        start = {"megavlm": ["-m", "megavlm"], "torchrun": ["-m", "torch.distributed.run"], "python": []}[program]
        more = [word for name, settings in SMALLER.items() if any(part.endswith(name) for part in words) for word in settings]
        done = subprocess.run([sys.executable, *start, *words, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    page = (tmp_path / "runs/digits/page.html").read_text()
    assert page.count("data:image/png;base64,") > 40 and "<svg" in page
    # nothing is fetched; namespaces of SVG are names
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
