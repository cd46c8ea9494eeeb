"""The history on a real disk, with real SQLite."""

import sqlite3
from pathlib import Path

import pytest
from conftest import GREEN, LONG_AGO, RED, RedGreenEngine, make_tree, pipeline_to, plain

from sorter.classifier.manifest import Manifest
from sorter.cli import preflight
from sorter.errors import ConfigurationError, StorageError
from sorter.files import FOLDER, file_systems
from sorter.files.photo import Identity
from sorter.history import store as history_module
from sorter.history.reader import HistoryReader
from sorter.history.store import NAME, History, Move, Run
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
    connection = sqlite3.connect(output / FOLDER / NAME)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_intents_come_back_as_they_were_whatever_their_bytes(output: Path) -> None:
    failed = move(2, kind="failed", label=None, confidence=None, reason="truncated", detail="ends early")
    history = History(output)
    history.begin(RUN)
    history.intend([move(1), failed])
    history.close()
    assert History(output).unfinished() == [move(1), failed]


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


def test_a_batch_is_recorded_whole_or_not_at_all(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    with pytest.raises(StorageError):
        history.intend([move(1), move(2), move(1)])
    assert history.unfinished() == []


def test_intents_are_synced_and_what_is_done_follows_with_the_next_ones(output: Path) -> None:
    history = History(output)
    assert history._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    full, normal = (2,), (1,)
    planned = move(1)
    seen = []

    def note() -> None:
        seen.append(history._connection.execute("PRAGMA synchronous").fetchone())

    history.begin(RUN)
    note()
    history.intend([planned])
    note()
    history.settle([planned], [])
    note()
    history.intend([move(2)])
    note()
    history.finish(RUN)
    note()
    assert seen == [full, full, normal, full, full]


def test_on_a_network_file_system_the_journal_is_rolled_back(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "is_network", lambda _: True)
    history = History(output)
    assert history._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    history.begin(RUN)
    history.intend([move(1)])
    assert sorted(p.name for p in (output / FOLDER).iterdir()) == [NAME]


def test_a_newer_history_is_refused(output: Path) -> None:
    History(output).close()
    connection = sqlite3.connect(output / FOLDER / NAME)
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
    monkeypatch.setattr(history_module, "_MIGRATIONS", (*history_module._MIGRATIONS, added))
    assert History(output).unfinished() == [move(1)]
    assert rows(output, "PRAGMA user_version") == [(history_module.VERSION + 1,)]
    assert rows(output, "SELECT stars FROM moves") == [(None,)]


@pytest.fixture
def version_3(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output whose history is from before sidecars were called that: one photo, and its sidecar."""
    with monkeypatch.context() as patch:
        patch.setattr(history_module, "_MIGRATIONS", history_module._MIGRATIONS[:3])
        history = History(output)
        history.begin(RUN)
        moves = [move(1, name="a.jpg"), move(2, name="a.xmp", source="a.xmp", kind="companion", follows="a.jpg")]
        history.intend(moves[:1])
        history.settle(moves[:1], [])
        history.intend(moves[1:])
        history.settle(moves[1:], [])
        history.close()
    assert rows(output, "PRAGMA user_version") == [(3,)]
    return output


def test_the_companions_of_version_3_become_sidecars(version_3: Path) -> None:
    History(version_3).close()
    assert rows(version_3, "SELECT kind, follows FROM moves ORDER BY id") == [("sorted", None), ("sidecar", 1)]
    indexes = rows(version_3, "SELECT name FROM sqlite_schema WHERE type = 'index'")
    assert ("moves_sidecars",) in indexes
    assert ("moves_companions",) not in indexes


def test_a_reader_that_opens_a_history_of_version_3_takes_its_companions_for_sidecars(version_3: Path) -> None:
    reader = HistoryReader(version_3)
    assert [(entry.kind, entry.follows) for entry in reader.entries()] == [("sorted", None), ("sidecar", 1)]
    assert reader.counts().folders == {"cats": 1}
    assert [entry.kind for entry in reader.undoable()] == ["sorted", "sidecar"]
    reader.close()


def test_a_reader_takes_companions_for_sidecars_also_where_an_old_history_came_back_meanwhile(
    version_3: Path,
) -> None:
    old = (version_3 / FOLDER / NAME).read_bytes()
    reader = HistoryReader(version_3)
    for path in (version_3 / FOLDER).iterdir():
        path.unlink()
    make_tree(version_3, {f"{FOLDER}/new": old})
    (version_3 / FOLDER / "new").rename(version_3 / FOLDER / NAME)
    assert [entry.kind for entry in reader.entries()] == ["sorted", "sidecar"]
    reader.close()


def test_dates_that_need_more_than_64_bits_come_back(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    moves = [move(n, identity=Identity(1, 2, 3, mtime, 0)) for n, mtime in enumerate((1 << 80, -(1 << 70)))]
    history.intend(moves)
    assert history.unfinished() == moves


@pytest.mark.parametrize("name", [NAME, f"{NAME}-wal"])
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
    with (output / FOLDER / NAME).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(ConfigurationError, match="move it elsewhere"):
        History(output).unfinished()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_history_is_refused_with_what_to_do(output: Path, content: bytes) -> None:
    make_tree(output, {f"{FOLDER}/{NAME}": content})
    with pytest.raises(ConfigurationError, match="move it elsewhere"):
        History(output)
    assert (output / FOLDER / NAME).read_bytes() == content


def test_another_programs_database_is_refused(output: Path) -> None:
    connection = sqlite3.connect(output / FOLDER / NAME)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(ConfigurationError, match="another program"):
        History(output)
    assert rows(output, "SELECT name FROM sqlite_schema") == [("theirs",)]


def test_a_history_that_was_taken_away_is_begun_anew(output: Path) -> None:
    history = History(output)
    history.begin(RUN)
    history.intend([move(1)])
    (output / FOLDER).rename(output / "away")
    history.settle([move(1)], [])
    history.intend([move(2)])
    assert history.unfinished() == [move(2)]
    assert rows(output, "SELECT token FROM moves WHERE done IS NOT NULL") == [(move(1).token,)], (
        "what did happen is told"
    )
    assert rows(output, "SELECT id FROM runs") == [("r1",)]


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
