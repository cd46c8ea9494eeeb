"""`sorter review` as a server: who may talk to it, what it shows, and what it takes; all as real requests."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import photo, read_tree
from fuzzing import generated, mutant
from pictures import encoded, every_format, turned
from PIL import ExifTags, Image
from reviewing import CAT, DOG, UNSURE, Client, Sorted, fixed, ids, reviewing, rows, sort_as

from sorter.classifier import manifest
from sorter.cli.main import main
from sorter.files import lock
from sorter.files.lock import Lock
from sorter.settings import SHIPPED_MODEL

for module in ("starlette", "uvicorn", "jinja2"):
    pytest.importorskip(module, reason="needs the extra review")

_MARKUP = "<img src=x onerror=alert(1)>.jpg"
_LATIN = os.fsdecode(b"caf\xe9 \xe2\x80\xae.jpg")  # not UTF-8, with a character that turns text around


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("review") / "out"
    names = {f"{n}.jpg": (photo(n), CAT if n % 2 else DOG) for n in range(8)}
    names |= {"perhaps.jpg": (photo(8), UNSURE), "broken.jpg": (photo(9)[:99], Sorted("cat", 0, "failed", "truncated"))}
    sort_as(folder, names)
    return folder


@pytest.fixture(scope="module")
def client(output: Path) -> Iterator[Client]:
    with reviewing(output) as found:
        yield found


def state(output: Path) -> Any:
    """All that a request could change."""
    return read_tree(output), rows(output, "SELECT * FROM moves"), rows(output, "SELECT * FROM verdicts")


def test_only_the_page_itself_is_answered(output: Path, client: Client) -> None:
    verdict = [client.verdict(ids(output)["1.jpg"], "dog")]
    port = client.port
    reads: list[tuple[int, dict[str, Any]]] = [
        (403, {"host": "attacker.example"}),
        (403, {"host": f"attacker.example:{port}"}),
        (403, {"host": f"127.0.0.1.attacker.example:{port}"}),
        (403, {"host": "127.0.0.1"}),
        (403, {"host": f"[::1]:{port}"}),
        (403, {"host": ""}),
        (404, {"base": "/"}),
        (404, {"base": f"{client.base[:-2]}/"}),
        (404, {"base": f"{client.base[:-1]}A/"}),
        (404, {"base": "/%C3%A9%FF/"}),
        (404, {"base": f"//{client.base[1:]}"}),
    ]
    writes: list[tuple[int, dict[str, Any]]] = [
        *reads,
        (405, {"method": "GET"}),
        (405, {"method": "PUT"}),
        (403, {"content_type": "text/plain"}),
        (403, {"content_type": "application/x-www-form-urlencoded"}),
        (403, {"content_type": None}),
        (403, {"origin": "http://attacker.example"}),
        (403, {"origin": f"http://127.0.0.1:{port + 1}"}),
        (403, {"origin": f"https://127.0.0.1:{port}"}),
        (403, {"origin": f"http://localhost:{port}"}),
        (403, {"origin": "null"}),
        (403, {"origin": None}),
        (403, {"sec_fetch_site": "cross-site"}),
        (403, {"sec_fetch_site": "same-site"}),
        (403, {"sec_fetch_site": "none"}),
        (403, {"sec_fetch_site": None}),
    ]
    before = state(output)
    picture = f"photo/{verdict[0]['photo']}/1600?version={verdict[0]['version']}"
    for path in ("", "static/review.js", "api/deck", "api/views", "api/failed", picture):
        for status, changed in reads:
            answer = client.ask(path, **changed)
            assert answer.status == status, (path, changed)
            assert b"jpg" not in answer.body
    for path, body in (("api/decide", verdict), ("api/take-back", [verdict[0]["photo"]])):
        for status, changed in writes:
            assert client.ask(path, body, **changed).status == status, (path, changed)
    assert state(output) == before
    assert client.ask("", host=f"localhost:{port}").status == 200
    local = {"host": f"localhost:{port}", "origin": f"http://localhost:{port}"}
    assert client.ask("api/decide", verdict, **local).json["outcomes"][0]["error"] == ""
    assert client.ask("api/take-back", [verdict[0]["photo"]], **local).status == 200


def test_what_is_sent_is_checked(output: Path, client: Client) -> None:
    good = client.verdict(ids(output)["1.jpg"], "dog")
    bad: list[tuple[int, Any]] = [
        (400, []),
        (400, good),
        (400, b""),
        (400, b"[" * 100_000),
        (400, b"\xff\xfe"),
        (400, [good | {"more": 1}]),
        (400, [good | {"photo": "1"}]),
        (400, [good | {"photo": True}]),
        (400, [good | {"photo": 1 << 64}]),
        (400, [good | {"photo": -1}]),
        (200, [good | {"label": "horse"}]),
        (400, [good | {"label": "x" * 201}]),
        (400, [good | {"label": ["cat"]}]),
        (400, [good | {"how": "guessed"}]),
        (400, [good | {"version": "1"}]),
        (400, [good | {"version": f"{'9' * 5000}-1"}]),
        (400, [good] * 501),
        (413, [good | {"label": "x" * 1_000_000}]),
        (409, [good | {"photo": 10**9}]),
        (409, [good | {"version": "1-1"}]),
    ]
    before = state(output)
    for status, body in bad:
        answer = client.ask("api/decide", body)
        assert answer.status == status, (str(body)[:200], answer.body)
        if status == 200:
            assert "no class of the model" in answer.json["outcomes"][0]["error"]
        assert "Traceback" not in answer.body.decode()
    for path in (
        "api/deck?view=tomorrow",
        "api/deck?view=folder:",
        "api/deck?view=day:2026-99-99",
        "api/deck?view=day:9999-12-31",
        "api/deck?after=nonsense",
        "api/deck?after=[1]",
        f"api/deck?after={'[' * 5000}",
        f"api/failed?after={'[' * 5000}",
        "api/deck?after=[NaN,1,1]",
        f"api/deck?after=[1,1,{10**30}]",
        "api/failed?after={}",
        "api/failed?after=[1,2]",
    ):
        assert client.ask(path).status == 400, path
    assert state(output) == before


def test_every_answer_says_that_it_stays_with_the_page(output: Path, client: Client) -> None:
    card = client.ask(f"api/card/{ids(output)['2.jpg']}").json
    picture = f"photo/{card['id']}/320?version={card['version']}"
    for path, changed in (("", {}), ("nothing", {}), ("", {"host": "x"}), ("", {"base": "/"}), (picture, {})):
        headers = client.ask(path, **changed).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cache-control"] == ("private, max-age=600" if path == picture else "no-store")
        assert {"set-cookie", "server", "access-control-allow-origin"}.isdisjoint(headers)


def test_only_this_machine_can_connect(client: Client) -> None:
    listening = Path(f"/proc/{client.process.pid}/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    places = {line.split()[1] for line in listening.splitlines() if f":{client.port:04X} " in line and " 0A " in line}
    assert places == {f"0100007F:{client.port:04X}"}


def test_an_answer_does_not_wait_for_its_own_acknowledgement() -> None:
    from sorter.review import server  # not where the extra is missing

    with server.listen(0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_was_taken_back_before_an_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sorter.review import app, corrections, deck  # not where the extra is missing

    output, known = tmp_path / "out", manifest.read(SHIPPED_MODEL)
    sort_as(output, {f"{n}.jpg": (photo(n), CAT) for n in range(3)})
    with closing(corrections.Corrections(output, known.classes)) as reviewed, closing(deck.Deck(output)) as cards:
        seen = {card.id: card.file for card in cards.page("least-sure")[0]}
        versions = {n: corrections.Version(f.identity.size, f.identity.mtime_ns) for n, f in seen.items() if f}
        reviewed.decide([corrections.Verdict(n, version, "dog", "corrected") for n, version in versions.items()])
        take_back, undoing = reviewed.take_back, Lock(output, lock.UNDOING)

        def beside_an_undo(number: int) -> corrections.Outcome:
            if number != min(seen):
                undoing.take()
            return take_back(number)

        monkeypatch.setattr(lock, "UNDOING_PATIENCE_SECONDS", 0.1)
        monkeypatch.setattr(reviewed, "take_back", beside_an_undo)
        routes = app._Routes(app.Review("", {}, {}, cards, reviewed, pictures=cast(Any, None)))
        outcomes = json.loads(bytes(routes._take_back(sorted(seen)).body))["outcomes"]
        undoing.release()
    assert [bool(outcome["error"]) for outcome in outcomes] == [False, True, True]
    assert sorted(Path(name).parent.name for name in read_tree(output)) == ["cats", "dogs", "dogs"]


def test_a_picture_has_nothing_of_the_file_but_what_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "SECRET"
    exif[ExifTags.Base.Orientation] = 6
    large = encoded(Image.new("RGB", (4000, 1000), "teal"), "JPEG", exif=exif, comment=b"SECRET") + b"SECRET"
    contents = {f"{kind}.jpg": content for kind, (content, _) in every_format().items()}
    contents |= {f"turned-{n}.jpg": turned("JPEG", n) for n in range(1, 9)} | {"large.jpg": large}
    output = tmp_path / "out"
    sort_as(output, {name: (content, CAT) for name, content in contents.items()})
    with reviewing(output) as client:
        sizes = {}
        for card in client.deck():
            for side in (320, 1600):
                answer = client.ask(f"photo/{card['id']}/{side}?version={card['version']}")
                assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg"), card
                assert b"SECRET" not in answer.body
                with Image.open(io.BytesIO(answer.body)) as picture:
                    picture.load()
                    assert picture.format == "JPEG"
                    assert not picture.getexif()
                    assert {"exif", "comment", "icc_profile"}.isdisjoint(picture.info)
                    sizes[card["name"], side] = picture.size
    assert sizes["large.jpg", 320] == (80, 320)
    assert sizes["large.jpg", 1600] == (400, 1600)
    assert sizes["gif.jpg", 1600] == (64, 48)
    assert {sizes[f"turned-{n}.jpg", 320] for n in range(1, 9)} == {(96, 64)}
    assert len(sizes) == 2 * len(contents)


def test_what_has_taken_a_photos_place_is_neither_shown_nor_moved(tmp_path: Path) -> None:
    output, secret = tmp_path / "out", tmp_path / "secret.jpg"
    names = ("link", "pipe", "folder", "other", "edited", "gone", "in/link", "fine")
    sort_as(output, {f"{name}.jpg": (photo(n), CAT) for n, name in enumerate(names)})
    secret.write_bytes(photo(99))
    with reviewing(output) as client:
        cards = {card["name"]: card for card in client.deck()}
        assert len(cards) == len(names)
        cats = output / "cats"
        for name in ("link", "pipe", "folder", "other", "edited", "gone"):
            (cats / f"{name}.jpg").unlink()
        (cats / "link.jpg").symlink_to(secret)
        os.mkfifo(cats / "pipe.jpg")
        (cats / "folder.jpg").mkdir()
        (cats / "other.jpg").write_bytes(photo(99))
        (cats / "edited.jpg").write_bytes(photo(4) + b"more")
        (cats / "in").rename(tmp_path / "in")
        (cats / "in").symlink_to(tmp_path / "in")
        before = read_tree(tmp_path)
        for name, card in cards.items():
            expected = 200 if name == "fine.jpg" else 404
            assert client.ask(f"photo/{card['id']}/1600?version={card['version']}").status == expected, name
            verdict = {"photo": card["id"], "version": card["version"], "label": "dog", "how": "corrected"}
            if name != "fine.jpg":
                assert client.ask("api/decide", [verdict]).status == 409, name
        assert read_tree(tmp_path) == before
        assert {card["name"] for card in client.deck()} == {"fine.jpg"}


def test_a_photo_that_changed_since_it_was_shown_is_shown_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    with reviewing(output) as client:
        (card,) = client.deck()
        verdict = client.verdict(card["id"], "dog")
        later = int(card["version"].partition("-")[2]) + 10**9  # as a copy on another file system might have it
        os.utime(output / "cats" / "a.jpg", ns=(later, later))
        assert client.ask(f"photo/{card['id']}/320?version={card['version']}").status == 409
        answer = client.ask("api/decide", [verdict])
        (outcome,) = answer.json["outcomes"]
        assert answer.status == 409
        assert outcome["card"]["version"].endswith(str(later))
        again = client.ask("api/decide", [verdict | {"version": outcome["card"]["version"]}])
        assert (again.status, again.json["outcomes"][0]["error"]) == (200, "")
    assert set(read_tree(output)) == {"dogs/a.jpg"}


def test_only_sorted_photos_have_pictures(output: Path, client: Client) -> None:
    for number in (ids(output)["broken.jpg"], 0, 10**6, 1 << 62, 1 << 70):
        for path in (f"photo/{number}/320?version=1-1", f"api/card/{number}"):
            assert client.ask(path).status == 404, path
    assert client.ask(f"photo/{ids(output)['2.jpg']}/9999").status == 404
    for path in (
        "static/../app.py",
        "static/%2e%2e%2fapp.py",
        "static//etc/passwd",
        "static/page.html",
        "photo/1/../x",
    ):
        assert client.ask(path).status == 404, path


def test_names_are_text_whatever_they_contain(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {_MARKUP: (photo(1), CAT), _LATIN: (photo(2), CAT)})
    with reviewing(output) as client:
        cards = client.deck()
        assert {card["name"] for card in cards} == {_MARKUP, r"caf\xe9 \u202e.jpg"}
        for card in cards:
            assert client.ask(f"photo/{card['id']}/320?version={card['version']}").status == 200
        answer = client.ask("api/decide", [client.verdict(card["id"], "dog") for card in cards])
        assert [outcome["error"] for outcome in answer.json["outcomes"]] == ["", ""]
    assert set(read_tree(output)) == {f"dogs/{_MARKUP}", f"dogs/{_LATIN}"}


def test_what_is_decided_is_moved_recorded_and_never_shown_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {"c.jpg": (photo(1), CAT), "d.jpg": (photo(2), DOG), "n.jpg": (photo(3), CAT)})
    sort_as(output, {"u.jpg": (photo(4), UNSURE), "later.jpg": (photo(5), CAT)})
    by_name = ids(output)
    with reviewing(output) as client:
        assert next(card["name"] for card in client.deck()) == "u.jpg"
        given = [("c.jpg", "dog", "corrected"), ("d.jpg", "dog", "confirmed"), ("n.jpg", None, "corrected")]
        given.append(("u.jpg", "cat", "corrected"))
        answer = client.ask("api/decide", [client.verdict(by_name[name], label, how) for name, label, how in given])
        assert [outcome["card"]["folder"] for outcome in answer.json["outcomes"]] == ["dogs", "dogs", "unsure", "cats"]
        assert [card["name"] for card in client.deck()] == ["later.jpg"]
        assert client.ask("api/deck").json["left"] == 1
        assert client.ask("api/take-back", [by_name["n.jpg"], by_name["d.jpg"]]).status == 200
        assert client.ask("api/take-back", [by_name["later.jpg"]]).json["outcomes"][0]["error"] != ""
    with reviewing(output) as client:
        assert {card["name"] for card in client.deck()} == {"later.jpg", "n.jpg", "d.jpg"}
    assert set(read_tree(output)) == {"dogs/c.jpg", "dogs/d.jpg", "cats/n.jpg", "cats/u.jpg", "cats/later.jpg"}
    assert rows(output, "SELECT label, how FROM verdicts ORDER BY id") == [("dog", "corrected"), ("cat", "corrected")]


@pytest.mark.parametrize("options", [(), ("--check", "1")])
def test_a_photo_whose_sidecar_stays_behind_is_decided_and_can_be_taken_back(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    sidecar = output / "cats" / "a.jpg.xmp"
    sidecar.write_bytes(b"about a")
    with reviewing(output, *options) as client, fixed(sidecar):
        verdict = client.verdict(ids(output)["a.jpg"], "dog", "checked")
        (outcome,) = client.ask("api/decide", [verdict]).json["outcomes"]
        assert outcome["error"] == ""
        assert str(sidecar) in outcome["warning"]
        assert (outcome["card"]["folder"], outcome["card"]["label"]) == ("dogs", "cat")
        (back,) = client.ask("api/take-back", [verdict["photo"]]).json["outcomes"]
        assert (back["error"], back["card"]["folder"]) == ("", "cats")
    assert set(read_tree(output)) == {"cats/a.jpg", "cats/a.jpg.xmp"}


def test_while_an_undo_moves_photos_nothing_is_decided_and_that_is_said(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    with reviewing(output) as client:
        verdict = client.verdict(ids(output)["a.jpg"], "dog")
        undoing = Lock(output, lock.UNDOING)
        undoing.take()
        refused = client.ask("api/decide", [verdict])
        undoing.release()
        assert refused.status == 503
        assert "undo" in refused.json["error"]
        assert set(read_tree(output)) == {"cats/a.jpg"}
        assert client.ask("api/decide", [verdict]).status == 200


def test_what_failed_is_listed_with_its_reason(client: Client) -> None:
    assert client.ask("api/failed").json == {
        "photos": [{"name": "failed/broken.jpg", "why": "truncated"}],
        "after": None,
    }


def test_a_check_hides_what_the_model_says_and_ends_with_an_interval(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {f"{n}.jpg": (photo(n), CAT if n % 2 else DOG) for n in range(12)})
    sort_as(output, {"u.jpg": (photo(20), UNSURE)})
    with reviewing(output, "--check", "10") as client:
        cards = client.deck()
        assert len(cards) == 10
        hidden = client.ask("").body + client.ask("api/deck").body + client.ask(f"api/card/{cards[0]['id']}").body
        for word in (b"cats", b"dogs", b"confidence", b"0.9"):
            assert word not in hidden.replace(b'"folder": "cats"', b"").replace(b'"folder": "dogs"', b""), word
        wrong, *right = cards
        truth = dict(rows(output, "SELECT id, label FROM moves WHERE target IS NULL"))
        for card in (wrong, *right):
            label = truth[card["id"]] if card is not wrong else {"cat": "dog", "dog": "cat"}[truth[card["id"]]]
            verdict = {"photo": card["id"], "version": card["version"], "label": label, "how": "checked"}
            (outcome,) = client.ask("api/decide", [verdict]).json["outcomes"]
            assert outcome["card"]["label"] == truth[card["id"]]
        assert client.deck() == []
        said = client.ask("api/check").json["sentence"]
        assert said == (
            "9 of 10 photos drawn at random are right: 90.0% (95% interval 59.6% to 98.2%). The model claims 90.0%."
        )
    assert rows(output, "SELECT DISTINCT how FROM verdicts") == [("checked",)]


def test_the_browser_gets_the_address_through_a_file_of_its_own(tmp_path: Path) -> None:
    output, seen = tmp_path / "out", tmp_path / "seen"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    browser = tmp_path / "browser"
    browser.write_text(
        '#!/bin/sh\nfile="${1#file://}"\n'
        f'{{ echo "$*"; stat -c %a "$file"; cat "$file"; }} > {seen}.new\nmv {seen}.new {seen}\n'
    )
    browser.chmod(0o755)
    with reviewing(output, BROWSER=str(browser), TMPDIR=str(tmp_path)) as client:
        deadline = time.monotonic() + 30
        while not seen.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        arguments, mode, *page = seen.read_text().splitlines()
        token = client.base.strip("/")
        assert len(token) >= 43
        assert token not in arguments
        assert token not in Path(f"/proc/{client.process.pid}/cmdline").read_text()
        assert mode == "600"
        assert client.url in "\n".join(page)
        assert Path(arguments.removeprefix("file://")).exists()
    assert not Path(arguments.removeprefix("file://")).exists()


def test_a_port_that_is_taken_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sort_as(tmp_path / "out", {"a.jpg": (photo(1), CAT)})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["review", "--inbox", str(tmp_path / "out"), "--port", port]) == 2
    assert f"sorter: --port {port} cannot be used" in capsys.readouterr().err


def test_two_reviews_have_two_addresses(tmp_path: Path) -> None:
    output = tmp_path / "out"
    sort_as(output, {"a.jpg": (photo(1), CAT)})
    with reviewing(output) as one, reviewing(output) as other:
        assert one.port != other.port
        assert one.base != other.base
        assert other.ask("", base=one.base).status == 404


def test_an_output_without_a_history_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["review", "--inbox", str(tmp_path)]) == 2
    assert "there is no history" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'starlette' else find(name, *rest)\n"
    )
    root = Path(__file__).resolve().parents[1]
    refused = subprocess.run(
        [sys.executable, "-m", "sorter", "review", "--inbox", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    needs = "sorter review needs the extra 'review': run pip install '.[review]' in sorter's folder\n"
    assert refused.stderr == f"sorter: {needs}"


@pytest.mark.shared
def test_broken_files_give_a_picture_or_a_sentence_and_never_their_bytes(tmp_path: Path, shared: Path) -> None:
    output = tmp_path / "out"
    bad = {path.name: path.read_bytes() for path in sorted((shared / "bad").iterdir()) if path.is_file()}
    sort_as(output, {name: (content, CAT) for name, content in bad.items()})
    with reviewing(output) as client:
        statuses = []
        for card in client.deck():
            for side in (320, 1600):
                answer = client.ask(f"photo/{card['id']}/{side}?version={card['version']}")
                statuses.append(answer.status)
                if answer.status == 200:
                    assert answer.body.startswith(b"\xff\xd8\xff")
                    assert not any(len(part) > 40 and part in answer.body for part in _parts(bad[card["name"]]))
                else:
                    assert answer.status == 422
                    assert re.match(r"the photo cannot be shown \(", answer.json["error"]), answer.json
        assert len(statuses) == 2 * len(bad)
        assert 422 in statuses
        children = Path(f"/proc/{client.process.pid}/task/{client.process.pid}/children").read_text().split()
        assert len(children) <= 3
    assert read_tree(output) == {f"cats/{name}": content for name, content in bad.items()}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "mutants", [pytest.param(300, marks=pytest.mark.long), pytest.param(4500, marks=pytest.mark.torture)]
)
def test_pictures_of_mutants_leave_no_decoder_and_no_memory_behind(
    tmp_path: Path, mutants: int, proved: Callable[[str], None]
) -> None:
    output, sources = tmp_path / "out", generated()
    tried = {one.name: (one.content, CAT) for one in (mutant(seed, sources) for seed in range(mutants))}
    sort_as(output, tried | {"good.jpg": (photo(1), CAT)})
    good = ids(output)["good.jpg"]
    statuses: Counter[int] = Counter()
    with reviewing(output) as client:
        version = client.ask(f"api/card/{good}").json["version"]
        for card in client.deck():
            answer = client.ask(f"photo/{card['id']}/{(320, 1600)[card['id'] % 2]}?version={card['version']}")
            statuses[answer.status] += 1
            assert answer.status in (200, 422), (card, answer)
            assert (answer.status == 200) == answer.body.startswith(b"\xff\xd8\xff"), card
            assert client.ask(f"photo/{good}/320?version={version}").status == 200
        decoders = Path(f"/proc/{client.process.pid}/task/{client.process.pid}/children").read_text().split()
        status = Path(f"/proc/{client.process.pid}/status").read_text()
    memory = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    proved(f"pictures of {mutants} broken files: {dict(statuses)}; then {memory / 1e6:.0f} MB")
    assert len(decoders) <= 3
    assert memory < 250e6
    assert {name.partition("/")[0] for name in read_tree(output)} == {"cats"}


def _parts(content: bytes) -> list[bytes]:
    # Many JPEGs begin with the same tables.
    return [content[start : start + 64] for start in range(2000, len(content), 997)]
