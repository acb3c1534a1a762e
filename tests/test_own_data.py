"""A stranger's walk: the shell blocks of docs/own-data.md, one after the other, in an empty folder. What they leave is looked at."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.talk.browser import MISSING, end, find, open_browser, replies, say, start, wait_for, wait_until_done

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_pictures_and_questions_to_a_model(tmp_path):
    here = Path(__file__).parents[1]
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    for block in BLOCKS:
        if block.startswith("megavlm serve "):  # it ends with Ctrl-C only
            continue
        done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, capture_output=True, text=True, env=os.environ | paths, timeout=1800)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    run = tmp_path / "runs" / "mine"
    judged = json.loads((run / "evaluation.json").read_text())
    assert judged["understanding"]["questions"] == len((run / "answers.jsonl").read_text().splitlines()) > 30
    assert judged["understanding"]["exact_match"] > 0.8, "a guess is right in 3 of 8; 0.957 were measured"
    assert judged["generation"]["drawings"] > 5 and Image.open(run / "drawings.png") and Image.open(tmp_path / "red_circle.png")
    (scores,) = (run / "judged").glob("vqa-*.json")
    assert json.loads(scores.read_text())["figures"]["exact_match"] > 0.8
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    if not MISSING:
        ask_and_draw_in_a_browser(run, tmp_path)


def ask_and_draw_in_a_browser(run, folder):
    """What the page shows lies in ``folder / "page.png"``."""
    server, address = start(run)
    with open_browser(folder / "profile") as browser:
        browser.get(address)
        wait_for(lambda: find(browser, "textarea[data-testid=textbox]"))
        say(browser, "Which colour is it?", folder / "pictures" / "000.png")
        wait_for(lambda: replies(browser))
        wait_until_done(browser)
        assert any(colour in replies(browser)[0].text for colour in ("red", "green", "blue", "yellow"))
        find(browser, "input[type=radio][value=draw]")[0].click()
        say(browser, "a red circle")
        wait_for(lambda: len(replies(browser)) == 2 and find(browser, ".message.bot img"))
        wait_until_done(browser)
        browser.save_screenshot(str(folder / "page.png"))
    end(server)


def test_the_walk_has_every_step():
    commands = re.findall(r"^(?:megavlm|torchrun .* megavlm) (\S+(?: \S+)?)", "\n".join(BLOCKS), re.M)
    words = {word for command in commands for word in command.split()}
    assert words >= {
        *("build", "lint", "inspect", "tokenizer", "image-tokenizer", "init", "check", "show"),
        *("train", "evaluate", "judge", "generate", "export", "ask", "serve"),
    }
