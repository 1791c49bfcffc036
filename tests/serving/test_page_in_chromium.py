"""The page of a server in a real browser: Debian's Chromium, driven by Selenium."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, CONTRASTS, DRIVER, Browser, running
from served import KEY, TEXT

from transformerfam.tools.costs import full_cache_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver; apt-get install chromium-driver"
    ),
    pytest.mark.skipif(find_spec("selenium") is None, reason="selenium is not installed; pip install selenium"),
]
MARKUP = '<img src=x onerror="window.isBroken = true"><script>window.isBroken = true</script>'
LEAST_CONTRAST = 4.5
PHONE = 360


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.driver.quit()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    with running(tmp_path) as made:
        yield made


@pytest.fixture
def page(browser: Browser, service: Any) -> Iterator[Browser]:
    """The page of a server without memories; nothing may be wrong in its console afterwards."""
    browser.complaints()
    browser.look_as()
    browser.driver.get(service.url)
    browser.until_text("body", "No memories yet")
    yield browser
    assert browser.complaints() == []


def drop_book(page: Browser, name: str = "book.txt", text: str = TEXT * 10) -> None:
    """Drop a text, and wait until it is read."""
    page.drop(".drop", name, text)
    page.until(lambda: page.text("#chosen") == name.removesuffix(".txt"))
    page.until(lambda: page.text("#read-title") == "Read")


def ask(page: Browser, question: str, most: int = 8) -> str:
    """Ask, and return the last answer when it is whole."""
    page.js("document.querySelector('#ask [name=most]').value = arguments[0]", most)
    page.js("document.querySelector('#question').value = arguments[0]", question)
    page.js("document.querySelector('#ask').requestSubmit()")
    page.until_text(".talk > :last-child", "token")
    return page.text(".talk > :last-child .answer")


def show(page: Browser) -> None:
    """Show where the memory looked."""
    page.js("document.querySelector('#look').requestSubmit()")
    page.until(lambda: re.search(r"\d blocks?$", page.text("#look ~ .row [role=status]")))


def test_dropped_book_is_read_with_the_servers_numbers(page: Browser, service: Any) -> None:
    """Catches a file that is not taken, and numbers that are not the server's."""
    drop_book(page)
    (memory,) = page.memories()
    assert memory["name"] == "book"
    assert memory["keep_text"] is True
    numbers = page.js("return [...document.querySelectorAll('dl div')].map((e) => e.innerText.split('\\n').sort())")
    shown = {next(x for x in pair if not x[0].isdigit()): next(x for x in pair if x[0].isdigit()) for pair in numbers}
    model = service.engine.model
    assert shown["tokens"] == str(memory["num_tokens_read"]) == "281"
    assert float(shown["tokens per second"].replace(",", "")) > 0
    assert shown["state in RAM"] == in_units(model.init_state().num_bytes)
    assert shown["key/value cache"] == in_units(full_cache_bytes(model, 281, model.dtype))
    label = page.js("return document.querySelector('.chart svg').getAttribute('aria-label')")
    assert shown["state in RAM"] in label
    assert shown["key/value cache"] in label
    (flat,) = page.js(
        "return [...document.querySelectorAll('line.state')].map((l) => l.getAttribute('y1') - l.getAttribute('y2'))"
    )
    assert flat == 0
    heights = page.js(
        "return document.querySelector('polyline').getAttribute('points').split(' ').map((p) => +p.split(',')[1])"
    )
    assert heights == sorted(heights, reverse=True)  # pixels from the top
    assert heights[-1] < heights[0]


def in_units(number: int) -> str:
    """Return bytes as the page writes thousands of them."""
    kilobytes = number / 1000
    return f"{kilobytes:.{2 if kilobytes < 9.995 else 1 if kilobytes < 99.95 else 0}f}\u00a0kB"


def test_everything_is_done_by_keyboard_alone(page: Browser, service: Any) -> None:
    """Catches a control that Tab does not reach, that shows no focus, or that no key works."""
    from selenium.webdriver.common.keys import Keys

    page.tab_to("input[type=file]")
    page.tab_to("summary", "Paste")
    page.press(Keys.ENTER)
    page.tab_to("[name=pasted]")
    page.press(TEXT * 3)
    page.tab_to("button", "Read it")
    page.press(Keys.ENTER)
    page.until(lambda: page.text("#read-title") == "Read")
    page.js("document.querySelector('#ask [name=most]').value = 8")
    page.tab_to("#question")
    page.press("The sky", Keys.ENTER)
    page.until_text(".talk", "The memory is as it was")
    page.tab_to("#look button", "Show")
    page.press(Keys.ENTER)
    page.until_text("#look ~ .row [role=status]", "10 blocks")
    page.tab_to("#block")
    assert "Block 0, tokens 0 to 7" in page.text(".caption")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.until_text(".caption", "Block 2, tokens 16 to 23")
    assert "block 2, " in page.js(
        "return document.activeElement.ariaValueText ?? document.activeElement.getAttribute('aria-valuetext')"
    )
    page.tab_to("button", "Rename")
    page.press(Keys.ENTER)
    page.until_text("dialog", "Rename")
    page.press("Emma", Keys.ENTER)
    page.until_text("#chosen", "Emma")
    assert page.js("return document.activeElement.textContent") == "Rename"  # where the focus was
    page.tab_to("button", "Fork")
    page.press(Keys.ENTER)
    page.until_text("dialog", "Fork")
    page.press(Keys.ENTER)
    page.until_text("#chosen", "Emma, fork")
    page.tab_to("button", "Delete")
    page.press(Keys.ENTER)
    page.until_text("dialog", "Delete this memory?")
    page.press(Keys.ESCAPE)
    page.until(lambda: page.text("dialog") == "")
    assert len(page.memories()) == 2
    page.press(Keys.ENTER)
    page.until_text("dialog", "Delete this memory?")
    page.tab_to("dialog button", "Delete")
    page.press(Keys.ENTER)
    page.until_text(".empty", "Drop a text")
    assert [memory["name"] for memory in page.memories()] == ["Emma"]
    page.tab_to(".entry", "Emma")
    page.press(Keys.ENTER)
    page.tab_to("[name=more]")
    page.press("Here we go. There and back again.")
    page.tab_to("#more button")
    page.press(Keys.ENTER)
    page.until(lambda: page.memories()[0]["num_tokens_read"] > 85)


def test_answer_is_streamed_stopped_and_kept(page: Browser, service: Any) -> None:
    """Catches an answer that comes all at once, a stop that stops nothing, and a turn that is kept unasked."""
    service.answers.end_ids = set()
    drop_book(page)
    assert ask(page, "The sky") != ""
    assert page.memories()[0]["num_tokens_read"] == 281
    assert page.js("return document.querySelector('.talk').getAttribute('aria-live')") == "polite"
    page.js("document.querySelector('#ask [name=keeps]').checked = true")
    ask(page, "The grass")
    page.until(lambda: page.memories()[0]["num_tokens_read"] > 281)
    before = page.memories()[0]["num_tokens_read"]
    page.js(
        "document.querySelector('#ask [name=most]').value = 4000; document.querySelector('#question').value = 'The sun'"
    )
    page.js("document.querySelector('#ask').requestSubmit()")
    page.until(lambda: page.text(".talk > :last-child .answer"))
    assert page.text("#ask .row button") == "Stop"
    page.js("document.querySelector('#ask .row button').click()")
    page.until_text(".talk > :last-child", "Stopped. The memory is as it was.")
    page.until(lambda: not service.engine.counts()["open_answers"])
    assert page.memories()[0]["num_tokens_read"] == before


def test_markup_in_names_answers_and_tokens_stays_text(page: Browser, service: Any) -> None:
    """Catches a name, an answer or a token that becomes an element and runs a script."""
    drop_book(page)
    decode = service.answers.tokenizer.decode
    service.answers.tokenizer.decode = lambda ids, **options: MARKUP * len(ids)
    page.js(
        "fetch('v1/memories/' + arguments[0], {method: 'PATCH', body: JSON.stringify({name: arguments[1]})})",
        page.memories()[0]["id"],
        MARKUP,
    )
    page.until(lambda: page.memories()[0]["name"] == MARKUP)
    page.js("location.reload()")
    page.until_text("#chosen", MARKUP)
    assert MARKUP in page.text(".entry")
    assert MARKUP in ask(page, MARKUP)
    assert page.text(".question") == MARKUP
    show(page)
    assert MARKUP in page.text(".tokens")
    assert MARKUP in page.text("table")
    page.js("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Delete').click()")
    assert MARKUP in page.text("dialog")
    assert page.js("return [document.querySelectorAll('img').length, window.isBroken ?? false]") == [0, False]
    service.answers.tokenizer.decode = decode


def test_policy_stops_markup_and_scripts_of_others(page: Browser) -> None:
    """Catches a policy that a browser does not keep."""
    stopped = """try { document.body.innerHTML = '<p>x</p>'; return 'written'; } catch (error) { return error.name; }"""
    assert page.js(stopped) == "TypeError"
    page.js("const s = document.createElement('img'); s.src = 'http://127.0.0.1:9/x.png'; document.body.append(s)")
    page.until(lambda: any("Content Security Policy" in line for line in page.complaints()))
    page.complaints()


def test_key_is_asked_for_and_kept_in_the_tab_alone(browser: Browser, tmp_path: Path) -> None:
    """Catches a page that says nothing without a key, and a key that stays in the browser."""
    with running(tmp_path, keys=(KEY,)) as service:
        browser.look_as()
        browser.driver.get(service.url)
        browser.until_text("form", "API key")
        for key, shown in (("wrong", "the API key is missing or wrong"), (KEY, "No memories yet")):
            browser.js("document.querySelector('[name=key]').value = arguments[0]", key)
            browser.js("document.querySelector('#key-form').requestSubmit()")
            browser.until_text("body", shown)
        kept = browser.js(
            "return [Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]"
        )
        assert kept == [[KEY], [], "", service.url]
        drop_book(browser)
        assert browser.text(".entry .name") == "book"
        service.settings.__dict__["keys"] = ("another",)
        browser.js("document.querySelector('#look').requestSubmit()")
        browser.until_text("form", "API key")
        browser.js("sessionStorage.clear()")


def test_server_that_goes_is_said_and_comes_back(page: Browser, service: Any) -> None:
    """Catches an answer that breaks off without a word, and a page that waits for nothing."""
    service.answers.end_ids = set()
    drop_book(page)
    page.js(
        "document.querySelector('#ask [name=most]').value = 4000; document.querySelector('#question').value = 'The sun'"
    )
    page.js("document.querySelector('#ask').requestSubmit()")
    page.until(lambda: page.text(".talk > :last-child .answer"))
    service.end()
    page.until_text(".talk > :last-child", "No whole answer: the server ended before the answer was complete")
    page.js("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Download').click()")
    page.until_text(".banner", "the server cannot be reached")
    page.until_text(".away", "The server does not answer")


def test_refusals_are_shown_in_the_servers_words(page: Browser, service: Any) -> None:
    """Catches an error that is swallowed, or shown as a number."""
    page.drop(".drop", "manual.txt", "verbose daemon option restart " * 50)
    page.until_text(".right .failure", "words that the tokenizer does not know")
    page.until_text(".entry", "failed")
    page.drop(".drop", "empty.txt", "")
    page.until_text(".banner", "the text is empty")
    drop_book(page, text="The sky.")
    page.js("document.querySelector('#look').requestSubmit()")
    page.until_text("#look ~ p", "fills no block of 8 tokens")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_is_readable(page: Browser, service: Any, scheme: str) -> None:
    """Catches a page that scrolls sideways on a phone, and text that is too pale in light or in dark."""
    service.answers.end_ids = set()
    page.look_as(PHONE, scheme)
    drop_book(page, name="a-long-name-without-a-space-" * 6 + ".txt")
    ask(page, "The pass key is")
    show(page)
    page.js("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.js("return document.documentElement.scrollWidth") <= PHONE
    found = page.js(CONTRASTS)
    assert len(found) > 60
    assert {text: ratio for text, ratio in found if ratio < LEAST_CONTRAST} == {}
    body = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", body)[0]) > 128) == (scheme == "light")
    unnamed = "return [...document.querySelectorAll('input, textarea, select')].filter((e) => !e.labels.length).length"
    assert page.js(unnamed) == 0
