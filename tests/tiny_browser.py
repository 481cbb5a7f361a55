"""Pages in headless Chromium: `browser` is a fixture; tests that use it are marked `browser`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.pages import Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api, path = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the path")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


def opened(browser: Any, page: Page, path: Path, errors: list[str], **options: Any) -> Any:
    """Opens a page from its file; `errors` gets all messages, and addresses asked for."""
    page.save(path)
    tab = browser.new_context(**options).new_page()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    outside = ("http:", "https:", "ftp:", "ws:")
    tab.on("request", lambda x: errors.append(x.url) if x.url.startswith(outside) else None)
    tab.goto(path.as_uri())
    return tab


SCREENS = pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 390)])


def accessible_tab(browser: Any, page: Page, path: Path, scheme: str, width: int) -> Any:
    """Opens a page so that `violations` can check it."""
    size = {"width": width, "height": 800}
    return opened(browser, page, path, [], color_scheme=scheme, viewport=size, bypass_csp=True)


def violations(tab: Any) -> list[tuple[str, str]]:
    """Returns the faults of access that axe finds in a page; it must not be wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(tab).response["violations"]
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return [(x["id"], x["nodes"][0]["html"]) for x in found]
