"""Debian's Chromium with the page of a server of a tiny model, for tests that need a real browser."""

import contextlib
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from served import make_service

from transformerfam.serving.process import Server, open_socket

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS = 60.0
"""How long a test waits for what it expects; a test that passes waits for what is there."""
MOST_TABS = 80
FOCUSED = "const e = document.activeElement;"

CONTRASTS = """
const numbers = (colour) => {  // through a canvas, whatever the form of the colour
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0.99) return colour;
  }
  return [255, 255, 255, 1];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement, style = getComputedStyle(element);
  if (!node.textContent.trim() || !element.checkVisibility() || element.closest('.unseen, noscript')) continue;
  const colour = element.closest('svg') ? style.fill : style.color;
  const [a, b] = [light(numbers(colour)), light(ground(element))].sort((x, y) => y - x);
  found.push([node.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
}
return found;
"""


@contextlib.contextmanager
def running(store: Path, **settings: Any) -> Iterator[Any]:
    """Yield the service of a server at a socket, with its address as `url`; `end()` ends it as SIGTERM does."""
    service: Any = make_service(store, **{"keys": (), "slice_seconds": 0.02} | settings)
    server, listening = Server(service, grace_seconds=0.1), open_socket("127.0.0.1", 0)

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what uvicorn imports
            server.run(sockets=[listening])

    def end() -> None:
        server.should_exit = True
        thread.join()

    thread = threading.Thread(target=run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    service.url, service.end = f"http://127.0.0.1:{listening.getsockname()[1]}/", end
    try:
        yield service
    finally:
        end()


class Browser:
    """Chromium without a window.

    Attributes:
        driver: of Selenium.
    """

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))

    def look_as(self, width: int = 1100, scheme: str = "light") -> None:
        """Have a width in pixels and a colour scheme."""
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def js(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, holds: Callable[[], Any]) -> Any:
        """Wait until something holds, and return it."""
        end = time.monotonic() + SECONDS
        while not (found := holds()):
            assert time.monotonic() < end, f"the page shows: {self.text('body')}"
            time.sleep(0.02)
        return found

    def text(self, css: str) -> str:
        """Return the text of the first element that is chosen, "" where there is none; spaces are plain ones."""
        found = self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css)
        return str(found).replace("\u00a0", " ")

    def until_text(self, css: str, part: str) -> str:
        """Wait until an element has a text, and return all of it."""
        self.until(lambda: part in self.text(css))
        return self.text(css)

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, css: str, text: str = "") -> None:
        """Press Tab until an element, with this text, has the focus; a ring must show it."""
        from selenium.webdriver.common.keys import Keys

        for _ in range(MOST_TABS):
            self.press(Keys.TAB)
            if self.js(f"{FOCUSED} return e.matches(arguments[0]) && e.textContent.includes(arguments[1])", css, text):
                ring = self.js(f"{FOCUSED} return getComputedStyle(e.closest('label.button') ?? e).outlineStyle")
                assert ring != "none", f"no ring around {css}"
                return
        raise AssertionError(f"{css} {text!r} is not reached by Tab")

    def drop(self, css: str, name: str, text: str) -> None:
        """Drop a file onto an element."""
        self.js(
            """const data = new DataTransfer();
            data.items.add(new File([arguments[2]], arguments[1], {type: 'text/plain'}));
            for (const kind of ['dragover', 'drop'])
              document.querySelector(arguments[0]).dispatchEvent(
                new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}));""",
            css,
            name,
            text,
        )

    def memories(self) -> list[dict[str, Any]]:
        """Return the server's memories, by the page's own request."""
        script = "const done = arguments[0]; fetch('v1/memories').then((r) => r.text()).then(done)"
        found: list[dict[str, Any]] = json.loads(self.driver.execute_async_script(script))["data"]
        return found

    def complaints(self) -> list[str]:
        """Return what the console says of scripts and the policy, and forget it; refused requests are no fault."""
        lines = [str(entry["message"]) for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [line for line in lines if "Failed to load resource" not in line]
