"""What the tests of `sorter review` share: an output that was sorted, and a client of the page's server."""

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

from sorter.files import FOLDER
from sorter.files.photo import Identity
from sorter.history.store import History, Move, Run

LONG_AGO_NS = 1_600_000_000 * 10**9


@dataclass(frozen=True)
class Sorted:
    """How a photo was sorted."""

    label: str
    confidence: float
    folder: str = ""
    reason: str | None = None

    @property
    def kind(self) -> str:
        return self.folder if self.folder in ("unsure", "failed") else "sorted"


CAT, DOG = Sorted("cat", 0.9), Sorted("dog", 0.9)
UNSURE = Sorted("cat", 0.6, "unsure")


def sort_as(output: Path, photos: Mapping[str, tuple[bytes, Sorted]], run: str = "") -> str:
    """Photos in the folders of an output, with the rows that a run would have written; returns the run."""
    run = run or uuid4().hex[:12]
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    moves = []
    for name, (content, how) in photos.items():
        folder = how.folder or f"{how.label}s"
        path = output / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
        moves.append(
            Move(
                uuid4().hex[:16],
                run,
                output.parent / "inbox",
                name,
                folder,
                name,
                Identity.of(os.lstat(path)),
                how.kind,
                label=how.label,
                confidence=how.confidence,
                reason=how.reason,
            )
        )
    (output.parent / "inbox").mkdir(exist_ok=True)
    with closing(History(output)) as history:
        history.begin(Run(run, "0", "catdog"))
        history.intend(moves)
        history.settle(moves, [])
    return run


def rows(output: Path, query: str) -> list[Any]:
    """Rows of the history."""
    with closing(sqlite3.connect(output / FOLDER / "history.sqlite3")) as connection:
        return connection.execute(query).fetchall()


def ids(output: Path) -> dict[str, int]:
    """The sorting moves of photos by name."""
    return {
        os.fsdecode(name): id_
        for id_, name in rows(output, "SELECT id, source FROM moves WHERE target IS NULL ORDER BY id")
    }


@dataclass(frozen=True)
class Answer:
    """What the server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Talks to a review as the page does, unless told otherwise."""

    def __init__(self, url: str, process: "subprocess.Popen[str]") -> None:
        self.url, self.process = url, process
        self.host, _, path = url.removeprefix("http://").partition("/")
        self.port = int(self.host.partition(":")[2])
        self.base = f"/{path}"

    def ask(
        self, path: str, body: Any = None, *, method: str = "", base: str | None = None, **changed: str | None
    ) -> Answer:
        """Send one request.

        Args:
            path: below the secret part of the address.
            body: bytes, or something to be sent as JSON.
            method: if not GET, or POST for one with a body.
            base: what to send in place of the secret part.
            changed: headers in place of the page's, with _ for -; None leaves one out.
        """
        headers = {"Host": self.host}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Origin": f"http://{self.host}"}
            headers |= {"Sec-Fetch-Site": "same-origin"}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in changed.items():
            headers.pop(name.replace("_", "-").title(), None)
            if value is not None:
                headers[name.replace("_", "-").title()] = value
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.putrequest(
                method or ("GET" if body is None else "POST"),
                (self.base if base is None else base) + path,
                skip_host=True,
                skip_accept_encoding=True,
            )
            for name, value in headers.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def deck(self, view: str = "least-sure") -> list[dict[str, Any]]:
        """All cards of a view, page after page."""
        found, after = [], ""
        while True:
            page = self.ask(f"api/deck?view={view}{after}").json
            found += page["photos"]
            if page["after"] is None:
                return found
            after = f"&after={quote(page['after'])}"

    def verdict(self, photo: int, label: str | None, how: str = "corrected") -> dict[str, Any]:
        """A verdict on a photo as it is now."""
        version = self.ask(f"api/card/{photo}").json["version"]
        return {"photo": photo, "version": version, "label": label, "how": how}


@contextmanager
def fixed(path: Path) -> Iterator[None]:
    """A file that not even its owner can move, until the end of the block."""
    if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("needs a file system with chattr +i, and the right to it")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextmanager
def reviewing(output: Path, *options: str, **environment: str) -> Iterator[Client]:
    """`sorter review` of an output in a process of its own, until the end of the block, which Ctrl-C brings about."""
    command = [sys.executable, "-m", "sorter", "review", "--inbox", str(output), *options]
    clean = {name: value for name, value in os.environ.items() if name not in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**clean, **environment}
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate()
        yield Client(url, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()
