"""The page in a real browser that can reach nothing but this machine: asking, drawing, and the end by Ctrl-C."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megavlm.parts.trained import load_trained
from megavlm.talk.talker import Talker, Writing, last
from megavlm.talk.words import read_picture

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]
NEEDED = {
    "gradio": importlib.util.find_spec("gradio"),
    "selenium": importlib.util.find_spec("selenium"),
    "chromium": BROWSER[0],
    "chromedriver": BROWSER[1],
}
MISSING = [name for name, found in NEEDED.items() if not found]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]


def heeds_ctrl_c():
    """In the child: whoever starts the tests in the background of a script has told them, and all that they start, to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(run, *flags):
    """A server as a user starts it, and its address."""
    command = [sys.executable, "-m", "megavlm", "serve", str(run), "--port=0", *flags]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=heeds_ctrl_c,
    )
    line = server.stdout.readline()
    assert "http://127.0.0.1:" in line, line + server.communicate(timeout=60)[1]
    return server, re.search(r"http://\S+", line)[0]


def end(server):
    """What Ctrl-C leaves on the screen."""
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=60)
    assert server.returncode == 130
    return out + err


@pytest.fixture(scope="module")
def page(run):
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    server, address = start(run)
    yield address
    assert end(server).splitlines() == ["megavlm: ended by Ctrl-C; the conversations are gone"]


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
    yield driver
    driver.quit()


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
    return found


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def say(driver, text, *files):
    for file in files:
        find(driver, "input[type=file]")[-1].send_keys(str(file))
        wait_for(lambda: find(driver, ".thumbnail-item, .thumbnail-wrapper"))
    find(driver, "textarea[data-testid=textbox]")[0].send_keys(text)
    wait_for(lambda: find(driver, "button.submit-button:not([disabled])"))[0].click()


def replies(driver):
    return find(driver, ".message.bot")


def wait_until_done(driver):
    """The box takes the next text when the answer to the last one is whole."""
    wait_for(
        lambda: not find(driver, ".generating, .pending") and not find(driver, "textarea[data-testid=textbox]")[0].get_attribute("value")
    )


def requests_of(driver):
    """The addresses that the browser asked for."""
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return {entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"}


def enlarged(image):
    """As `megavlm.talk.page` shows small pictures; that module needs gradio."""
    return image.repeat(30, 0).repeat(30, 1)


def picture_of(driver, image):
    """The pixels of an image on the page, as the browser has decoded them."""
    script = """
    const canvas = document.createElement('canvas'), image = arguments[0];
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
    return [canvas.height, canvas.width, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
    """
    height, width, data = driver.execute_script(script, image)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def drawn_last(driver):
    """The last drawing of the conversation, once it is whole."""
    return wait_for(lambda: (pixels := picture_of(driver, find(driver, ".message.bot img")[-1])).size == 240 * 240 * 3 and [pixels])[0]


def test_one_asks_and_draws_without_a_network(page, browser, run, images):
    talker = Talker(load_trained(run)[0])
    asked = [read_picture(images / "0.png"), "Which digit is this?"]
    said = last(talker.answer(asked, Writing(seed=3))).text
    expected = last(talker.draw([*asked, said, "a seven"], talker.drawing_settings(seed=3))).pictures[0]
    alone = last(talker.draw(["a seven"], talker.drawing_settings(seed=3))).pictures[0]

    browser.get(page)
    wait_for(lambda: find(browser, "#seed textarea, #seed input"))[0].send_keys("3")
    say(browser, "Which digit is this?", images / "0.png")
    wait_for(lambda: replies(browser))
    wait_until_done(browser)
    find(browser, "#remembers input")[0].click()
    find(browser, "input[type=radio][value=draw]")[0].click()
    say(browser, "a seven")
    wait_for(lambda: len(replies(browser)) == 2)
    wait_until_done(browser)
    assert (drawn_last(browser) == enlarged(expected)).all(), "the whole conversation was the prompt"
    find(browser, "#remembers input")[0].click()
    say(browser, "a seven")
    wait_for(lambda: len(replies(browser)) == 3)
    wait_until_done(browser)
    assert (drawn_last(browser) == enlarged(alone)).all(), "the request alone was the prompt"
    asked_for = requests_of(browser)
    assert len([url for url in asked_for if "/file=" in url]) > 3, "it grew"
    elsewhere = {url for url in asked_for if not url.startswith((page, "data:", "blob:", "chrome:"))}
    assert not elsewhere, "the page wants what is not here"
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, "the browser was kept from something"


def test_the_endpoint_alone_ends_in_one_line(run):
    server, _ = start(run, "--nopage")
    assert end(server).splitlines() == ["megavlm: ended by Ctrl-C; the conversations are gone"]
