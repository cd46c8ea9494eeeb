"""The history on a real disk, with real SQLite."""

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import GREEN, LONG_AGO, RED, RedGreenEngine, make_tree, pipeline_to, plain

from sorter.classifier.manifest import Manifest
from sorter.cli import preflight
from sorter.errors import ConfigurationError, StorageError
from sorter.files import FOLDER, HISTORY, file_systems
from sorter.files.photo import Identity
from sorter.history import schema, store
from sorter.history.reader import HistoryReader
from sorter.history.store import History, Judgement, Move, Run
from sorter.settings import Settings

RUN = Run("r1", "1.0", "model")


def move(number: int, **values: object) -> Move:
    given: dict[str, object] = {
        "token": f"{number:016x}",
        "run": "r1",
        "root": Path("/in\udcff"),
        "source": f"deep/caf\udce9 {number}\n.jpg",
        "folder": "cats",
        "name": f"caf\udce9 {number}\n.jpg",
        "identity": Identity((1 << 64) - 2, (1 << 63) + number, 3, -4, 0),
        "kind": "sorted",
        "label": "cat",
        "confidence": 0.75,
    }
    return Move(**{**given, **values})  # type: ignore[arg-type]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    return tmp_path


def rows(output: Path, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(output / FOLDER / HISTORY)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def python(code: str, output: Path, *command: str) -> "subprocess.Popen[str]":
    """Start code that uses the history of an output in a process of its own."""
    setup = "import sys, pathlib; from sorter.history.store import History; output = pathlib.Path(sys.argv[1])\n"
    return subprocess.Popen(
        [*command, sys.executable, "-c", setup + code, str(output)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_intents_come_back_as_they_were_whatever_their_bytes(output: Path) -> None:
    failed = move(2, kind="failed", label=None, confidence=None, reason="truncated", detail="ends early")
    history = History(output)
    history.begin(RUN)
    history.intend([move(1), failed, move(3, linked=True)])
    history.close()
    assert History(output).unfinished() == [move(1), failed, move(3, linked=True)]


def test_what_is_done_is_no_intent_any_more_and_what_was_withdrawn_leaves_no_row(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1), move(2), move(3)])
    history.settle([move(1)], [move(2)])
    assert history.unfinished() == [move(3)]
    assert rows(output, "SELECT token FROM moves WHERE done IS NOT NULL") == [(move(1).token,)]
    assert rows(output, "SELECT count(*) FROM moves") == [(2,)]


def test_a_done_move_is_never_withdrawn(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1)])
    history.settle([move(1)], [])
    history.settle([], [move(1)])
    assert rows(output, "SELECT count(*) FROM moves") == [(1,)]


def test_a_batch_is_recorded_completely_or_not_at_all(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    with pytest.raises(StorageError):
        history.intend([move(1), move(2), move(1)])
    assert history.unfinished() == []


STEPS = """
import os
from test_history import RUN, move
history = History(output)
steps = {
    "begin": lambda: history.begin(RUN),
    "intend": lambda: history.intend([move(1)]),
    "settle": lambda: history.settle([move(1)], []),
    "intend again": lambda: history.intend([move(2)]),
    "finish": lambda: history.finish(),
}
for name, step in steps.items():
    os.write(2, f"step {name}.".encode())
    step()
os.write(2, b"step end.")
os._exit(0)
"""
WITHOUT_SHARED_MEMORY = """
import sqlite3
connect = sqlite3.connect
sqlite3.connect = lambda path, **kwargs: connect(f"file:{path}?vfs=unix-dotfile", uri=True, **kwargs)
"""


def syncs(output: Path, code: str) -> dict[str, int]:
    """How often the history waited for the disk, for each step during which it did."""
    if shutil.which("strace") is None or subprocess.run(["strace", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs strace, and the right to use it")
    trace = output / "trace"
    strace = ("strace", "-f", "-y", "-e", "trace=fsync,fdatasync,write", "-o", str(trace))
    with python(code, output, *strace) as process:
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0
    step, found = "", Counter[str]()
    for line in trace.read_text(errors="replace").splitlines():
        if started := re.search(r'write\(2<.*"step (.*)\."', line):
            step = started[1]
        elif "sync(" in line and f"{FOLDER}/{HISTORY}" in line:
            found[step] += step != ""
    return +found


def test_intents_are_synced_and_what_is_done_follows_with_the_next_ones(output: Path) -> None:
    assert list(syncs(output, STEPS)) == ["begin", "intend", "intend again", "finish"]
    assert rows(output, "PRAGMA journal_mode") == [("wal",)]


def test_where_sqlite_refuses_a_write_ahead_log_everything_is_synced_as_intents_are(output: Path) -> None:
    found = syncs(output, WITHOUT_SHARED_MEMORY + STEPS)
    assert found["settle"] == found["intend again"] > 2
    assert rows(output, "PRAGMA journal_mode") == [("delete",)]


def test_on_a_network_file_system_the_journal_is_rolled_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "is_network", lambda _: True)
    history = History(output)
    history.begin(RUN)
    history.intend([move(1)])
    assert rows(output, "PRAGMA journal_mode") == [("delete",)]
    assert sorted(p.name for p in (output / FOLDER).iterdir()) == [HISTORY]


def test_too_old_an_sqlite_is_refused_before_anything_is_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    with pytest.raises(ConfigurationError, match=r"needs SQLite 3\.37"):
        History(output)
    assert (output / FOLDER / HISTORY).stat().st_size == 0


def test_a_newer_history_is_refused(output: Path) -> None:
    History(output).close()
    connection = sqlite3.connect(output / FOLDER / HISTORY)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigurationError, match="upgrade"):
        History(output)


def test_the_next_version_of_the_schema_keeps_what_is_there(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1)])
    history.close()
    added = "ALTER TABLE moves ADD COLUMN stars INTEGER;\nCREATE TABLE extra (x INTEGER) STRICT;\n"
    monkeypatch.setattr(schema, "_MIGRATIONS", (*schema._MIGRATIONS, added))
    monkeypatch.setattr(schema, "NEWEST", schema.NEWEST + 1)
    assert History(output).unfinished() == [move(1)]
    assert rows(output, "PRAGMA user_version") == [(schema.NEWEST,)]
    assert rows(output, "SELECT stars FROM moves") == [(None,)]


OLD_COLUMNS = "token, run, root, source, folder, name, device, inode, size, mtime_ns, kind, label, confidence, done"


def old_history(output: Path, monkeypatch: pytest.MonkeyPatch, version: int, *moves: Move) -> None:
    """Make a history of an older version, in which moves are done."""
    with monkeypatch.context() as patch, contextlib.closing(sqlite3.connect(output / FOLDER / HISTORY)) as connection:
        patch.setattr(schema, "_MIGRATIONS", schema._MIGRATIONS[:version])
        patch.setattr(schema, "NEWEST", version)
        connection.execute("PRAGMA journal_mode = WAL")
        schema.upgrade(connection, output / FOLDER / HISTORY)
        connection.execute("INSERT INTO runs (id, started, version, model) VALUES ('r1', 1.0, '1.0', 'model')")
        marks = ", ".join(f":{column}" for column in OLD_COLUMNS.split(", "))
        for done in moves:
            row = {**store._row(done), "done": 2.0}
            connection.execute(f"INSERT INTO moves ({OLD_COLUMNS}) VALUES ({marks})", row)
        connection.commit()
    assert rows(output, "PRAGMA user_version") == [(version,)]


@pytest.fixture
def version_3(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output whose history is from before sidecars were called that: one photo, and its sidecar."""
    photo, companion = move(1, name="a.jpg"), move(2, name="a.xmp", source="a.xmp", kind="companion")
    old_history(output, monkeypatch, 3, photo, companion)
    with contextlib.closing(sqlite3.connect(output / FOLDER / HISTORY)) as connection:
        connection.execute("UPDATE moves SET follows = 1 WHERE id = 2")
        connection.commit()
    return output


def test_two_processes_that_upgrade_a_history_at_once_both_open_it(version_3: Path) -> None:
    with contextlib.closing(sqlite3.connect(version_3 / FOLDER / HISTORY, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        both = [python("print('opening', flush=True); History(output).close()", version_3) for _ in range(2)]
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "opening\n"
        time.sleep(0.3)  # both have looked at the version by now, if they look before they may write
        connection.execute("ROLLBACK")
    assert [process.communicate(timeout=60)[1] for process in both] == ["", ""]
    assert rows(version_3, "SELECT kind, follows FROM moves ORDER BY id") == [("sorted", None), ("sidecar", 1)]


def test_the_companions_of_version_3_become_sidecars(version_3: Path) -> None:
    History(version_3).close()
    assert rows(version_3, "SELECT kind, follows FROM moves ORDER BY id") == [("sorted", None), ("sidecar", 1)]
    indexes = rows(version_3, "SELECT name FROM sqlite_schema WHERE type = 'index'")
    assert ("moves_sidecars",) in indexes
    assert ("moves_companions",) not in indexes


def test_what_was_sorted_before_there_were_links_was_moved(version_3: Path) -> None:
    reader = HistoryReader(version_3)
    assert [entry.linked for entry in reader.entries()] == [False, False]
    reader.close()
    History(version_3).close()
    assert rows(version_3, "SELECT linked FROM moves") == [(0,), (0,)]


def test_a_reader_that_opens_a_history_of_version_3_takes_its_companions_for_sidecars(version_3: Path) -> None:
    reader = HistoryReader(version_3)
    assert [(entry.kind, entry.follows) for entry in reader.entries()] == [("sorted", None), ("sidecar", 1)]
    assert reader.counts().folders == {"cats": 1}
    assert [entry.kind for entry in reader.undoable()] == ["sorted", "sidecar"]
    reader.close()


def test_reading_a_history_of_version_3_changes_nothing(version_3: Path) -> None:
    def files() -> dict[str, tuple[bytes, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (version_3 / FOLDER).iterdir()}

    before = files()
    reader = HistoryReader(version_3)
    assert len(reader.entries()) == 2
    reader.close()
    assert files() == before


def test_a_reader_of_a_history_of_version_3_sees_what_is_sorted_after_its_upgrade(version_3: Path) -> None:
    reader = HistoryReader(version_3)
    history = History(version_3)
    history.intend([move(3)])
    history.settle([move(3)], [])
    assert [entry.kind for entry in reader.entries()] == ["sorted", "sidecar", "sorted"]
    history.close()
    reader.close()


def test_a_reader_takes_companions_for_sidecars_also_where_an_old_history_came_back_meanwhile(
    version_3: Path,
) -> None:
    old = (version_3 / FOLDER / HISTORY).read_bytes()
    reader = HistoryReader(version_3)
    for path in (version_3 / FOLDER).iterdir():
        path.unlink()
    make_tree(version_3, {f"{FOLDER}/new": old})
    (version_3 / FOLDER / "new").rename(version_3 / FOLDER / HISTORY)
    assert [entry.kind for entry in reader.entries()] == ["sorted", "sidecar"]
    reader.close()


def test_a_photo_of_version_5_is_where_it_was_sorted_and_can_be_corrected(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_history(output, monkeypatch, 5, move(1, name="a.jpg"))
    with contextlib.closing(HistoryReader(output)) as reader:  # of a copy
        assert [entry.place for entry in reader.photos()] == ["cats/a.jpg"]
    history = History(output)
    history.begin(RUN)
    corrected = move(2, name="a.jpg", source="cats/a.jpg", folder="dogs", target=output, corrects=1)
    history.intend([corrected])
    assert rows(output, "SELECT now_folder FROM moves WHERE id = 1") == [("cats",)]
    history.settle([corrected], [])
    history.close()
    query = "SELECT folder, CAST(now_folder || '/' || now_name AS TEXT), placed_by FROM moves ORDER BY id"
    assert rows(output, query) == [("cats", "dogs/a.jpg", 2), ("dogs", "dogs/a.jpg", 2)]
    with contextlib.closing(HistoryReader(output)) as reader:
        assert [(entry.place, entry.corrected) for entry in reader.photos()] == [("dogs/a.jpg", True)]


def test_a_verdict_goes_with_the_move_that_is_withdrawn_and_stays_with_the_one_that_is_done(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1), move(2)])
    history.settle([move(1), move(2)], [])
    corrections = [move(n + 2, folder="dogs", target=output, corrects=n) for n in (1, 2)]
    digest = bytes(32)
    judgements = [Judgement(n, "dog", "corrected", digest, "cat", 0.75, "model", move(n + 2).token) for n in (1, 2)]
    history.intend(corrections, judgements)
    assert history.unfinished() == corrections
    history.settle(corrections[:1], corrections[1:])
    assert rows(output, "SELECT move, label, confidence, correction FROM verdicts") == [(1, "dog", 0.75, 3)]
    taking_back = [move(n, folder="cats", target=output, corrects=1, takes_back=1) for n in (5, 6)]
    history.intend(taking_back[:1])
    history.settle([], taking_back[:1])
    assert rows(output, "SELECT move, reversal FROM verdicts") == [(1, None)]
    history.intend(taking_back[1:])
    history.settle(taking_back[1:], [])
    assert rows(output, "SELECT count(*) FROM verdicts") == [(0,)]
    assert rows(output, "SELECT now_folder FROM moves WHERE id = 1") == [("cats",)]


@pytest.mark.long
def test_a_page_of_a_million_photos_comes_in_50_ms(output: Path) -> None:
    History(output).close()
    connection = sqlite3.connect(output / FOLDER / HISTORY)
    connection.execute("INSERT INTO runs (id, started, version, model) VALUES ('r1', 1.0, '1.0', 'model')")
    values = {**store._row(move(0)), "done": 1.0}
    insert = f"INSERT INTO moves ({', '.join(values)}) VALUES ({', '.join(f':{key}' for key in values)})"
    connection.executemany(
        insert,
        (
            {**values, "token": f"{n:016x}", "folder": ("cats", "dogs", "unsure")[n % 3], "name": b"%d.jpg" % n}
            | {"source": b"%d.jpg" % n, "confidence": n * 7919 % 1_000_003 / 1_000_003}
            | {"kind": "sidecar" if n % 10 == 0 else "sorted"}
            for n in range(1_000_000)
        ),
    )
    connection.commit()
    connection.close()
    reader, seconds, found = HistoryReader(output), [], 0
    for folder in ("cats", "unsure"):
        after = (0.0, 0)
        for _ in range(20):
            began = time.perf_counter()
            condition = " AND m.now_folder = ? AND (m.confidence, m.id) > (?, ?)"
            page = reader.photos(condition, (folder, *after), order="m.confidence, m.id", limit=100)
            seconds.append(time.perf_counter() - began)
            keys = [(entry.confidence or 0.0, entry.id) for entry in page]
            assert keys == sorted(keys)
            assert keys[0] > after
            after, found = keys[-1], found + len(page)
    reader.close()
    assert found == 4000
    assert sorted(seconds)[-2] < 0.05


def test_dates_that_need_more_than_64_bits_come_back(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    moves = [move(n, identity=Identity(1, 2, 3, mtime, 0)) for n, mtime in enumerate((1 << 80, -(1 << 70)))]
    history.intend(moves)
    assert history.unfinished() == moves


@pytest.mark.parametrize("name", [HISTORY, f"{HISTORY}-wal"])
def test_a_history_that_is_a_link_is_refused(output: Path, name: str) -> None:
    (output / FOLDER / name).symlink_to(output / "elsewhere")
    with pytest.raises(ConfigurationError, match="not a file of the sorter"):
        History(output)
    assert not (output / "elsewhere").exists()


def test_a_history_whose_moves_are_damaged_is_refused_with_what_to_do(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(n) for n in range(200)])
    history.close()
    ((page,),) = rows(output, "SELECT rootpage FROM sqlite_schema WHERE name = 'moves_unfinished'")
    ((size,),) = rows(output, "PRAGMA page_size")
    assert isinstance(page, int)
    assert isinstance(size, int)
    with (output / FOLDER / HISTORY).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(ConfigurationError, match="move it elsewhere"):
        History(output).unfinished()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_history_is_refused_with_what_to_do(output: Path, content: bytes) -> None:
    make_tree(output, {f"{FOLDER}/{HISTORY}": content})
    with pytest.raises(ConfigurationError, match="move it elsewhere"):
        History(output)
    assert (output / FOLDER / HISTORY).read_bytes() == content


def test_another_programs_database_is_refused(output: Path) -> None:
    connection = sqlite3.connect(output / FOLDER / HISTORY)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    content = (output / FOLDER / HISTORY).read_bytes()
    with pytest.raises(ConfigurationError, match="another program"):
        History(output)
    with pytest.raises(ConfigurationError, match="another program"):
        HistoryReader(output)
    assert (output / FOLDER / HISTORY).read_bytes() == content


def test_a_history_that_was_removed_is_started_again(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1)])
    (output / FOLDER).rename(output / "away")
    history.settle([move(1)], [])
    history.intend([move(2)])
    assert history.unfinished() == [move(2)]
    assert rows(output, "SELECT token FROM moves WHERE done IS NOT NULL") == [(move(1).token,)], "it was moved"
    assert rows(output, "SELECT id FROM runs") == [("r1",)]


def test_a_writer_keeps_its_log_when_another_writer_ends_although_it_also_reads(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    reader = HistoryReader(output, beside_writer=True)
    assert python("History(output).close()", output).communicate(timeout=60) == ("", "")
    history.intend([move(1)])
    history.settle([move(1)], [])
    assert rows(output, "SELECT token FROM moves") == [(move(1).token,)]
    assert [entry.name for entry in reader.entries()] == [move(1).source]
    reader.close()
    history.close()


def test_the_folders_of_a_model_that_was_used_before_are_not_sorted_again(tmp_path: Path, manifest: Manifest) -> None:
    make_tree(tmp_path, {"a.jpg": plain(RED), "mine/b.jpg": plain(GREEN)})
    settings = Settings(inbox=tmp_path, recursive=True, settle_seconds=0)
    pipeline = pipeline_to(tmp_path, RedGreenEngine(), manifest, settings)
    pipeline.submit(next(preflight.watched(settings, manifest).scan(LONG_AGO + 10)))
    assert [outcome.kind for outcome in pipeline.outcomes(timeout_seconds=10)] == ["sorted"]
    pipeline.close()
    assert (tmp_path / "cats/a.jpg").is_file()
    classes = tuple(c.model_copy(update={"folder": f"my-{c.folder}"}) for c in manifest.classes)
    other = manifest.model_copy(update={"classes": classes})
    assert [found.name for found in preflight.watched(settings, other).scan(LONG_AGO + 10)] == ["mine/b.jpg"]
