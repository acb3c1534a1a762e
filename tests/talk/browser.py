"""`megavlm serve` and a real browser that can reach nothing but this machine, for tests."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

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


@contextmanager
def open_browser(profile):
    """A headless Chromium; its profile is that folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
    try:
        yield driver
    finally:
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
