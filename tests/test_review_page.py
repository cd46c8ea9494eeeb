"""The page of `sorter review` in a real Chromium: keys, buttons, many at once, and what it says when things fail."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, CONTROL, SHIFT, Browser
from conftest import photo, read_tree
from pictures import encoded
from PIL import Image
from reviewing import CAT, DOG, UNSURE, Client, Sorted, fixed, reviewing, rows, sort_as

if CHROMIUM is None:
    pytest.skip("needs Chromium", allow_module_level=True)
for module in ("starlette", "uvicorn", "jinja2"):
    pytest.importorskip(module, reason="needs the extra review")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """The browser; the page may have complained of nothing."""
    browser.complaints.clear()
    yield browser
    # A page that is still open when its review ends may miss it.
    assert [complaint for complaint in browser.complaints if "ERR_CONNECTION" not in complaint] == []


def name(page: Browser) -> str:
    """The photo in front."""
    return str(page.evaluate("document.querySelector('#one:not([hidden]) #name')?.textContent ?? ''"))


def said(page: Browser) -> str:
    return str(page.evaluate("document.querySelector('#status').textContent"))


def opened(page: Browser, client: Client) -> None:
    page.show(client.url)
    page.wait_for("document.querySelector('#picture img')?.complete")


def at_rest(page: Browser, left: int) -> None:
    """Wait until everything that was decided is recorded."""
    page.wait_for(f"document.querySelector('#status').textContent.endsWith(', {left} left.')")


def numbered(count: int, how: Callable[[int], Sorted]) -> dict[str, tuple[bytes, Sorted]]:
    return {f"{n:02}.jpg": (photo(n), how(n)) for n in range(count)}


def test_twenty_photos_by_keys_alone_end_in_the_right_folders_with_the_right_rows(
    page: Browser, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(20, lambda n: Sorted("cat" if n % 2 else "dog", 0.5 + n / 50, "unsure" if n < 4 else "")))
    keys = [*"cdu", "Enter", *"cdu", " ", *"dcud", "Enter", "Enter", *"ccdd", "u", " "]
    model = ["cat" if n % 2 else "dog" for n in range(20)]
    labels = [{"c": "cat", "d": "dog", "u": None}.get(key, model[n]) for n, key in enumerate(keys)]
    with reviewing(output) as client:
        opened(page, client)
        for n, key in enumerate(keys):
            page.wait_for(f"document.querySelector('#name').textContent.endsWith('/{n:02}.jpg')")
            page.press(key)
        at_rest(page, 0)
        assert "That was the last one: everything here is decided." in page.text()
    folders = {"cat": "cats", "dog": "dogs", None: "unsure"}
    assert set(read_tree(output)) == {f"{folders[label]}/{n:02}.jpg" for n, label in enumerate(labels)}
    found = rows(output, "SELECT m.source, v.label, v.how FROM verdicts v JOIN moves m ON m.id = v.move ORDER BY m.id")
    assert [label for _, label, _ in found] == labels
    assert {how for n, (_, label, how) in enumerate(found) if n >= 4 and label == model[n]} == {"confirmed"}


def test_arrows_decide_nothing_and_decisions_can_be_taken_back_as_deep_as_the_session(
    page: Browser, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(6, lambda n: Sorted("cat", 0.6 + n / 50)))
    before = read_tree(output)
    with reviewing(output) as client:
        opened(page, client)
        for view in ("", "f", "f"):
            page.press(*view)
            start = name(page)
            page.press("ArrowRight", "ArrowRight", "j", "ArrowLeft", "k", "ArrowLeft", "ArrowLeft")
            assert name(page) == start == "cats/00.jpg"
        assert rows(output, "SELECT count(*) FROM verdicts") == [(0,)]
        page.press("d", "d", "Enter", "u", "d", "d")
        at_rest(page, 0)
        assert set(read_tree(output)) != set(before)
        page.press("ArrowLeft")  # what was decided is still there
        assert "You say dog" in page.text()
        page.press("z", modifiers=CONTROL)
        page.press(*["Backspace"] * 5)
        at_rest(page, 6)
        page.press("Backspace")
        page.wait_for("document.body.innerText.includes('nothing to take back')")
    assert read_tree(output) == before
    assert rows(output, "SELECT count(*) FROM verdicts") == [(0,)]


def test_many_at_once_by_key_by_click_and_all_of_them(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(12, lambda n: Sorted("cat", 0.6 + n / 50)))
    with reviewing(output) as client:
        opened(page, client)
        page.press("g", "x", "ArrowRight", "ArrowRight", "x", "d")  # 0 and 2
        at_rest(page, 10)
        page.click("#grid > :nth-child(2)")  # 3
        page.click("#grid > :nth-child(4)", modifiers=SHIFT)  # to 5
        page.press("u")
        at_rest(page, 7)
        page.press("a", modifiers=CONTROL)
        page.press("Enter")
        at_rest(page, 0)
        assert "That was the last one" in page.text()
        page.press("Backspace")
        at_rest(page, 7)
        page.press("g")
        assert name(page) == "cats/01.jpg"
    places = {f"{folder}/{n:02}.jpg" for folder, some in (("dogs", (0, 2)), ("unsure", (3, 4, 5))) for n in some}
    assert set(read_tree(output)) == places | {f"cats/{n:02}.jpg" for n in (1, 6, 7, 8, 9, 10, 11)}


def test_more_photos_than_a_page_follow_each_other(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    content = photo(1)
    sort_as(output, {f"{n:03}.jpg": (content, Sorted("cat", 0.5 + n / 1000)) for n in range(230)})
    with reviewing(output) as client:
        opened(page, client)
        for n in range(230):
            page.wait_for(f"document.querySelector('#name').textContent === 'cats/{n:03}.jpg'")
            page.press("Enter")
        at_rest(page, 0)
    assert rows(output, "SELECT count(DISTINCT move) FROM verdicts") == [(230,)]


def test_a_button_does_what_its_key_does_and_keys_can_be_switched_off(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(4, lambda n: Sorted("cat", 0.6 + n / 50)))
    with reviewing(output) as client:
        opened(page, client)
        page.click("#keys")
        page.press("d", "Enter", "u", "Backspace", "x", "f", "g", "?")
        assert name(page) == "cats/00.jpg"
        page.click("[aria-keyshortcuts=d]")
        at_rest(page, 3)
        page.press("Enter")  # no button has kept the focus
        assert name(page) == "cats/01.jpg"
        page.show(client.url)
        page.wait_for("document.querySelector('#picture img')?.complete")
        assert page.evaluate("document.querySelector('#keys').checked") is False
        page.click("#keys")
        page.press("c")
        at_rest(page, 2)
        page.call("Input.dispatchKeyEvent", type="keyDown", key="d", code="KeyD", text="d", autoRepeat=True)
        assert name(page) == "cats/02.jpg", "a key that is held down decides once"
    assert rows(output, "SELECT label FROM verdicts") == [("dog",), ("cat",)]


def test_the_table_of_keys_is_the_one_that_binds_them(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    with reviewing(output) as client:
        opened(page, client)
        page.press("?")
        page.wait_for("document.querySelector('#help').open")
        listed = page.evaluate("[...document.querySelectorAll('#help tr')].map((row) => row.cells[0].innerText.trim())")
        assert listed[:4] == ["c", "d", "u", "Enter Space"]
        buttons = page.evaluate(
            "[...document.querySelectorAll('[aria-keyshortcuts]')].map((b) => b.getAttribute('aria-keyshortcuts'))"
        )
        assert {"c", "d", "u", "Enter Space", "Backspace Control+Z", "Control+A", "x", "g", "f", "?"} <= set(buttons)
        page.press("?")
        assert page.evaluate("document.querySelector('#help').open") is False


def test_names_are_shown_as_text_and_run_nothing(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    strange = {"<img src=x onerror=window.hit=1>.jpg": (photo(1), UNSURE), "'\"><b>&amp;.jpg": (photo(2), UNSURE)}
    strange |= {os.fsdecode(b"caf\xe9.jpg"): (photo(3), UNSURE)}
    strange |= {"<script>window.hit=1<.jpg": (photo(9)[:99], Sorted("cat", 0.0, "failed", "<b>truncated"))}
    sort_as(output, strange)
    with reviewing(output) as client:
        opened(page, client)
        shown = []
        for _ in range(3):
            shown.append(name(page))
            page.press("d")
        at_rest(page, 0)
        page.evaluate("document.querySelector('#view').value = 'failed'")
        page.evaluate("document.querySelector('#view').dispatchEvent(new Event('change'))")
        page.wait_for("document.querySelector('#failed li')")
        assert "failed/<script>window.hit=1<.jpg (<b>truncated)" in page.text()
        assert page.evaluate("window.hit") is None
    assert set(shown) == {f"unsure/{name}" for name in ("<img src=x onerror=window.hit=1>.jpg", "'\"><b>&amp;.jpg")} | {
        r"unsure/caf\xe9.jpg"
    }
    assert {name.partition("/")[0] for name in read_tree(output)} == {"dogs", "failed"}


def test_what_changed_or_went_meanwhile_is_said_and_the_rest_goes_on(browser: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(4, lambda n: Sorted("cat", 0.6 + n / 50)))
    with reviewing(output) as client:
        opened(browser, client)
        later = 1_600_000_001 * 10**9
        os.utime(output / "cats" / "00.jpg", ns=(later, later))
        (output / "cats" / "01.jpg").unlink()
        browser.press("d")
        browser.wait_for("document.querySelector('#notice').textContent.includes('changed since it was shown')")
        assert name(browser) == "cats/01.jpg"
        browser.press("d")
        browser.wait_for("document.querySelector('#notice').textContent.includes('is gone')")
        for left in (2, 1, 0):
            browser.press("d")
            at_rest(browser, left)
    assert set(read_tree(output)) == {f"dogs/{n:02}.jpg" for n in (0, 2, 3)}
    browser.complaints.clear()  # the 409s


def test_what_was_moved_by_hand_is_shown_as_corrected_and_can_be_taken_back(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(4, lambda n: Sorted("cat", 0.6 + n / 50)))
    (output / "dogs").mkdir()
    for n in (1, 2):
        (output / "cats" / f"{n:02}.jpg").rename(output / "dogs" / f"{n:02}.jpg")
    with reviewing(output) as client:
        opened(page, client)
        assert name(page) == "cats/00.jpg"
        page.press("Enter")
        at_rest(page, 1)
        page.evaluate("document.querySelector('#view').value = 'corrected'")
        page.evaluate("document.querySelector('#view').dispatchEvent(new Event('change'))")
        page.wait_for("document.querySelector('#name').textContent === 'dogs/02.jpg'")
        assert page.evaluate("document.querySelector('#said').textContent").startswith(
            "you say dog; the model says: cat"
        )
        page.press("g")
        page.wait_for("document.querySelectorAll('#grid > *').length === 2")
        page.press("g", "j")
        assert name(page) == "dogs/01.jpg"
        page.press("Backspace", "j", "Backspace")  # the confirmation, and then what is in front
        page.wait_for("document.querySelector('#status').textContent.startsWith('01.jpg: taken back')")
        assert name(page) == "cats/01.jpg"
    assert set(read_tree(output)) == {"cats/00.jpg", "cats/01.jpg", "cats/03.jpg", "dogs/02.jpg"}
    assert rows(output, "SELECT label, how FROM verdicts") == [("dog", "moved")]


def test_a_sidecar_that_stays_behind_is_said_and_its_photo_stays_decided(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(3, lambda n: Sorted("cat", 0.6 + n / 50)))
    before = read_tree(output)
    sidecar = output / "cats" / "00.jpg.xmp"
    sidecar.write_bytes(b"about 00")
    with reviewing(output) as client, fixed(sidecar):
        opened(page, client)
        page.press("d")
        at_rest(page, 2)
        notice = page.evaluate("document.querySelector('#notice').textContent")
        assert notice.startswith(f"00.jpg: {sidecar} ")
        assert name(page) == "cats/01.jpg"
        page.press("Enter")
        at_rest(page, 1)
        page.press("Backspace", "Backspace")
        at_rest(page, 3)
        assert name(page) == "cats/00.jpg"
    assert read_tree(output) == before | {"cats/00.jpg.xmp": b"about 00"}
    assert rows(output, "SELECT count(*) FROM verdicts") == [(0,)]


def test_a_review_that_has_ended_is_said(browser: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(3, lambda n: CAT))
    with reviewing(output) as client:
        opened(browser, client)
    browser.press("d")
    browser.wait_for("document.querySelector('#notice').textContent.includes('does not answer')")
    browser.wait_for("document.querySelector('#left').textContent === '3 left'")
    assert set(read_tree(output)) == {f"cats/{n:02}.jpg" for n in range(3)}
    browser.complaints.clear()


def test_a_check_shows_no_label_before_the_key(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, numbered(5, lambda n: CAT if n % 2 else DOG))
    with reviewing(output, "--check", "5") as client:
        opened(page, client)
        for left in (4, 3, 2, 1, 0):
            assert page.evaluate("document.querySelector('#said').textContent") == "What is it?"
            assert name(page).count("/") == 0
            assert page.evaluate("document.querySelector('#picture img').alt").endswith(".jpg. ")
            assert page.evaluate("document.querySelector('#sure').hidden")
            page.press("Enter")  # there is nothing to confirm
            page.press("c")
            at_rest(page, left)
            assert "you say cat, the model said" in said(page)
        page.wait_for("document.querySelector('#end').textContent.includes('2 of 5 photos')")
        assert "The model claims 90.0%." in page.text()
    assert len(read_tree(output)) == 5
    assert set(read_tree(output)) == {f"cats/{n:02}.jpg" for n in range(5)}


def test_it_fits_a_narrow_window_in_every_view(page: Browser, tmp_path: Path) -> None:
    output = tmp_path / "out"
    long_name = {f"{'long-name-without-a-place-to-break' * 6}.jpg": (photo(99), UNSURE)}
    sort_as(output, numbered(8, lambda n: CAT) | long_name)
    with reviewing(output) as client:
        opened(page, client)
        for view in ("", "g", "g", "?"):
            page.press(*view)
            for width in (1280, 640, 320):
                page.resize(width, 640, is_dark=width == 640)
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, (view, width)
                assert page.evaluate("document.querySelector('#actions button').getBoundingClientRect().height") >= 24
        page.press("?")
        page.resize(320, 640)
        assert page.evaluate("document.querySelector('#picture img').getBoundingClientRect().height") > 150


@pytest.mark.long
def test_the_next_picture_is_there_at_once(page: Browser, tmp_path: Path, proved: Callable[[str], None]) -> None:
    output = tmp_path / "out"
    large = encoded(_camera(), "JPEG", quality=90)  # 12 megapixels
    sort_as(output, {f"{n:03}.jpg": (large + bytes([n]), Sorted("cat", 0.5 + n / 1000)) for n in range(200)})
    shown, durable = [], []
    with reviewing(output) as client:
        opened(page, client)
        page.evaluate(_TIMED)
        for n in range(199):
            page.evaluate("window.pressed = performance.now()")
            page.press("d" if n % 2 else "c")
            page.wait_for(f"window.shown.length > {n} && window.durable.length > {n}")
            time.sleep(0.3)  # nobody looks at a photo for less
        shown, durable = page.evaluate("[window.shown, window.durable]")
    p95_shown, p95_durable = np.percentile(shown, 95), np.percentile(durable, 95)
    proved(
        f"200 photos of 12 megapixels: key to next picture {np.median(shown):.0f} ms (95th percentile "
        f"{p95_shown:.0f}), key to recorded {np.median(durable):.0f} ms ({p95_durable:.0f})"
    )
    assert p95_shown < 300
    assert p95_durable < 300


_TIMED = """
window.shown = [];
window.durable = [];
new MutationObserver(async () => {
  const image = document.querySelector("#picture img");
  await image.decode();
  window.shown.push(performance.now() - window.pressed);
}).observe(document.querySelector("#picture"), { childList: true });
new MutationObserver(() => window.durable.push(performance.now() - window.pressed))
  .observe(document.querySelector("#status"), { childList: true });
"""


def _camera() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    return Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
