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


def start(run, *flags):
    """A server as a user starts it, and its address."""
    command = [sys.executable, "-m", "megavlm", "serve", str(run), "--port=0", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
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


def requests_of(driver):
    """The addresses that the browser asked for, and those that the page's policy kept it from."""
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return {entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"}


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


def test_one_asks_and_draws_without_a_network(page, browser, images):
    browser.get(page)
    wait_for(lambda: find(browser, "textarea[data-testid=textbox]"))
    say(browser, "Which digit is this?", images / "0.png")
    wait_for(lambda: replies(browser))
    assert wait_for(lambda: replies(browser)[0].text is not None)
    shown = len(replies(browser))
    find(browser, "input[type=radio][value=draw]")[0].click()
    say(browser, "a handwritten seven")
    image = wait_for(lambda: find(browser, ".message.bot img"))[-1]
    wait_for(lambda: len(replies(browser)) > shown)
    wait_for(lambda: not find(browser, ".message.pending, .generating"))
    image = find(browser, ".message.bot img")[-1]
    drawn = wait_for(lambda: (pixels := picture_of(browser, image)).size and pixels)
    assert drawn.shape == (240, 240, 3)
    elsewhere = {url for url in requests_of(browser) if not url.startswith((page, "data:", "blob:", "chrome:"))}
    assert not elsewhere, "the page wants what is not here"
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_the_endpoint_alone_ends_in_one_line(run):
    server, _ = start(run, "--nopage")
    assert end(server).splitlines() == ["megavlm: ended by Ctrl-C; the conversations are gone"]
