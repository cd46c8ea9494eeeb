"""A real headless Chromium, driven by the DevTools protocol over a pipe: no driver, no port, no download."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

CHROMIUM = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--mute-audio")
_SECONDS = 60.0
# key -> code, virtual key code, and the text that it types
_KEYS = {
    "Enter": ("Enter", 13, "\r"),
    " ": ("Space", 32, " "),
    "Backspace": ("Backspace", 8, ""),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}
CONTROL, SHIFT = 2, 8
"""Modifiers of a key press or a click."""


class Browser:
    """One browser with one page.

    Args:
        profile: an empty folder.

    Attributes:
        complaints: what the page's console and the browser itself had to say against the page.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium wants 3 and 4, so that the others have to be out of the way.
        theirs_in, theirs_out = (_moved(descriptor) for descriptor in (theirs_in, theirs_out))
        self._process = os.posix_spawn(
            CHROMIUM,
            [CHROMIUM, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            {**os.environ, "HOME": str(profile)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._received = b""
        self._calls = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)  # which tells it to end
        os.close(self._in)
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._calls:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._received:
            assert select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0], "Chromium does not answer"
            block = os.read(self._in, 1 << 20)
            assert block, "Chromium has ended"
            self._received += block
        message, _, self._received = self._received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.complaints.append(event["params"]["entry"]["text"] + " " + event["params"]["entry"].get("url", ""))

    def show(self, url: str, *, width: int = 1280, height: int = 800, is_dark: bool = False) -> None:
        """Open a page in a window of a size."""
        self.resize(width, height, is_dark=is_dark)
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Change the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = "dark" if is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; of a promise, what it resolves to."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 30) -> None:
        """Wait until an expression in the page is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, (expression, self.text(), self.complaints)
            time.sleep(0.02)

    def text(self) -> str:
        """What the page shows, as text."""
        return str(self.evaluate("document.body.innerText"))

    def press(self, *keys: str, modifiers: int = 0) -> None:
        """Press keys, one after the other."""
        for key in keys:
            code, number, text = _KEYS.get(key) or (f"Key{key.upper()}", ord(key.upper()), key)
            shared = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
            if text and not modifiers & CONTROL:
                shared["text"] = text
            self.call("Input.dispatchKeyEvent", type="keyDown", **shared)
            self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def click(self, selector: str, modifiers: int = 0) -> None:
        """Click into the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, modifiers=modifiers)

    def shoot(self, path: Path) -> None:
        """Write a picture of the window, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def _moved(descriptor: int) -> int:
    """A descriptor under a number that is out of the way."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return copy
