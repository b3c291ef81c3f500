# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: `python -m tests.serve.browse PATH_OF_CHROMIUM [FOLDER FOR PICTURES]`, with playwright.

A server with the stub's model is started, its page loaded, and used with the mouse, with the keyboard alone, on a
narrow screen and in the dark; each claim is an assertion, and the exit code says whether all held.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .conftest import HERE, Running, running

DATA = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
RATIO = """element => {
  const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(n => n / 255)
      .map(n => n <= 0.04045 ? n / 12.92 : ((n + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let under = element;
  const back = element => getComputedStyle(element).backgroundColor, none = "rgba(0, 0, 0, 0)";
  while (back(under) === none && under.parentElement) under = under.parentElement;
  const found = back(under) === none ? "rgb(255, 255, 255)" : back(under);
  const pair = [light(getComputedStyle(element).color), light(found)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


def use(page: Any, server: Running, pictures: Path) -> None:
    """Everything once, on a fresh page."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("document.getElementById('body').value.includes('FP32')")
    assert page.locator("#signature").inner_text() == "(x: FP32[?,4]) → (y: FP32[?,4])"
    page.fill("#body", DATA)
    page.click("#send")
    page.wait_for_function("document.getElementById('answer').textContent.includes('outputs')")
    assert json.loads(page.locator("#answer").inner_text())["outputs"][0]["data"] == [2, 4, 6, 8]
    assert page.locator("#took").inner_text().startswith("200, ")
    page.wait_for_function("document.getElementById('state').textContent === 'ready'")
    page.wait_for_function("Number(document.getElementById('rows').textContent) > 0", timeout=10_000)
    assert page.locator("#late").inner_text() == "0"
    assert not said, said
    page.screenshot(path=pictures / "answer.png")

    for wrong, expected in (("{", "400"), (DATA.replace("FP32", "INT8"), "422"), (DATA.replace("4]}", "]}"), "4")):
        page.fill("#body", wrong)
        page.click("#send")
        page.wait_for_function(f"document.getElementById('took').textContent.startsWith('{expected}')")
        assert "bad" in page.locator("#answer").get_attribute("class") and page.locator("#answer").inner_text()
    page.screenshot(path=pictures / "error.png")

    by_keyboard(page)
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in asked), "nothing comes from elsewhere"
    shown = said[:]  # a refused request is an error in the console; nothing else is
    assert all("Failed to load resource" in line for line in shown), shown


def by_keyboard(page: Any) -> None:
    page.reload()
    page.wait_for_function("document.getElementById('body').value.includes('FP32')")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached == ["model", "body", "send", "key"], reached
    page.focus("#body")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.getElementById('took').textContent.startsWith('200')")


def look(page: Any, name: str, pictures: Path) -> None:
    """Nothing is cut off, and every text can be read: contrasts as WCAG 2 asks for."""
    page.wait_for_function("document.getElementById('body').value.includes('FP32')")
    page.fill("#body", DATA.replace("FP32", "INT8"))
    page.click("#send")
    page.wait_for_function("document.getElementById('took').textContent.startsWith('422')")
    page.screenshot(path=pictures / f"{name}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page can be moved sideways"
    for element in ("h1", "#state", "#rate", "#signature", "#body", "#send", "#key", "#model", "#took", "#answer"):
        ratio = page.locator(element).evaluate(RATIO)
        assert ratio >= 4.5, f"{name}: {element} has a contrast of {ratio:.1f}"


def closing(page: Any, server: Running) -> None:
    """When the server has gone, the page says so, and a request does too."""
    server.process.kill()
    page.wait_for_function("document.getElementById('state').textContent === 'no answer'", timeout=10_000)
    page.click("#send")
    page.wait_for_function("document.getElementById('took').textContent === 'no answer'", timeout=10_000)


def main() -> None:
    from playwright.sync_api import sync_playwright

    pictures = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    pictures.mkdir(parents=True, exist_ok=True)
    with running(sys.executable, HERE / "stub.py", "PORT") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=sys.argv[1], args=["--no-sandbox"])
        use(browser.new_page(), server, pictures)
        for name, options in {
            "narrow": {"viewport": {"width": 400, "height": 800}},
            "dark": {"color_scheme": "dark"},
            "dark and narrow": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"},
        }.items():
            page = browser.new_page(**options)
            page.goto(f"http://127.0.0.1:{server.port}/")
            look(page, name, pictures)
        closing(page, server)
        browser.close()
    print("the page holds; pictures:", pictures)


if __name__ == "__main__":
    main()
