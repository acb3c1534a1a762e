"""The page in a real browser that can reach nothing but this machine: asking, drawing, and the end by Ctrl-C."""

import numpy as np
import pytest

from megavlm.parts.trained import load_trained
from megavlm.talk.talker import Talker, Writing, last
from megavlm.talk.words import read_picture
from tests.talk.browser import MISSING, end, find, open_browser, replies, requests_of, say, start, wait_for, wait_until_done


@pytest.fixture(scope="module")
def page(run):
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    server, address = start(run)
    yield address
    assert end(server).splitlines() == ["megavlm: ended by Ctrl-C; the conversations are gone"]


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path / "profile") as driver:
        yield driver


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
