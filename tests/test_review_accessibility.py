"""The review page by the rules of axe-core, in a real Chromium: in every view, light and dark.

Runs where Node finds axe-core: `npm install axe-core` in a folder elsewhere, and NODE_PATH=FOLDER/node_modules.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from conftest import photo
from reviewing import CAT, UNSURE, Sorted, reviewing, sort_as

if CHROMIUM is None:
    pytest.skip("needs Chromium", allow_module_level=True)
for module in ("starlette", "uvicorn", "jinja2"):
    pytest.importorskip(module, reason="needs the extra review")


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    found = None
    if shutil.which("node") is not None:
        command = ["node", "-p", "require.resolve('axe-core/axe.min.js')"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found is None or found.returncode:
        pytest.skip("needs axe-core, where Node finds it (NODE_PATH)")
    return Path(found.stdout.strip()).read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def violations(page: Browser, axe: str) -> Callable[[], list[Any]]:
    """The serious rules that the page breaks as it is shown now, light and dark, and where."""

    def found() -> list[Any]:
        page.evaluate(f"{axe};0")
        broken = []
        for is_dark in (False, True):
            page.resize(1280, 800, is_dark=is_dark)
            broken += page.evaluate(
                "axe.run().then((r) => r.violations.map((v) => [v.impact, v.id, v.nodes.map((n) => n.html)]))"
            )
        return [one for one in broken if one[0] in ("serious", "critical")]

    return found


def change(page: Browser, view: str) -> None:
    page.evaluate(f"document.querySelector('#view').value = '{view}'")
    page.evaluate("document.querySelector('#view').dispatchEvent(new Event('change'))")


def test_no_view_breaks_a_serious_rule(page: Browser, violations: Callable[[], list[Any]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    photos = {f"{n}.jpg": (photo(n), UNSURE if n % 2 else CAT) for n in range(6)}
    sort_as(output, photos | {"bad.jpg": (b"x", Sorted("cat", 0.0, "failed", "truncated"))})
    with reviewing(output) as client:
        page.show(client.url)
        page.wait_for("document.querySelector('#picture img')?.complete")
        assert violations() == [], "one photo"
        page.press("f")
        assert violations() == [], "the photo alone"
        page.press("f", "d")
        page.wait_for("document.querySelector('#status').textContent.includes('left')")
        assert violations() == [], "after a decision"
        page.press("g", "x")
        assert violations() == [], "the grid"
        page.press("g", "?")
        assert violations() == [], "the table of keys"
        page.press("?")
        change(page, "corrected")
        page.wait_for("document.querySelector('#said').textContent.startsWith('you say dog')")
        assert violations() == [], "what was corrected"
        change(page, "failed")
        page.wait_for("document.querySelector('#failed li')")
        assert violations() == [], "the failed list"


def test_a_check_breaks_no_serious_rule(page: Browser, violations: Callable[[], list[Any]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {f"{n}.jpg": (photo(n), CAT) for n in range(2)})
    with reviewing(output, "--check", "2") as client:
        page.show(client.url)
        page.wait_for("document.querySelector('#picture img')?.complete")
        assert violations() == []
        page.press("c", "c")
        page.wait_for("document.querySelector('#end').textContent.includes('2 of 2')")
        assert violations() == [], "its end"
