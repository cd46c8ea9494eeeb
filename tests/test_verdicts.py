"""Verdicts as others read them: `sorter history --verdicts`, and the photos that a fit learns from and judges by."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
from conftest import photo, small_manifest
from reviewing import CAT, DOG, UNSURE, Sorted, ids, sort_as
from test_undo import sorter as in_a_process

from sorter.cli.main import main
from sorter.errors import ConfigurationError
from sorter.history.verdicts_reader import PhotoVerdict, VerdictsReader
from sorter.review.corrections import Corrections, Verdict, Version
from trainer.data import verdicts
from trainer.data.labelled import labelled_photos
from trainer.data.layouts import Sample
from trainer.data.verdicts import Verdicts
from trainer.progress import Reporter

CLASSES = small_manifest().classes
NOT_UTF8 = os.fsdecode(b"caf\xe9.jpg")


def say(output: Path, labels: Mapping[str, str | None], how: str = "corrected") -> None:
    """What a person says of photos by their names."""
    known = ids(output)
    with closing(VerdictsReader(output)) as reader, closing(Corrections(output, CLASSES)) as corrections:
        given = []
        for name, label in labels.items():
            entry = reader.photo(known[name])
            assert entry is not None
            status = os.lstat(entry.destination)
            given.append(Verdict(entry.id, Version(status.st_size, status.st_mtime_ns), label, how))  # type: ignore[arg-type]
        assert [outcome.error for outcome in corrections.decide(given)] == [""] * len(given)


def read(output: Path) -> list[PhotoVerdict]:
    with closing(VerdictsReader(output)) as reader:
        return reader.verdicts()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    names = ["cat.jpg", "dog.jpg", "unsure.jpg", NOT_UTF8]
    how = [CAT, DOG, UNSURE, CAT]
    sort_as(tmp_path / "out", {name: (photo(n), how[n]) for n, name in enumerate(names)})
    return tmp_path / "out"


def test_a_verdict_names_the_photo_where_it_is_now_and_what_was_said(output: Path) -> None:
    say(output, {"cat.jpg": "dog", "unsure.jpg": None})
    say(output, {"dog.jpg": "dog"}, "confirmed")
    found = {os.path.relpath(v.path, output): (v.label, v.how, v.label_was, v.confidence) for v in read(output)}
    assert found == {
        "dogs/cat.jpg": ("dog", "corrected", "cat", 0.9),
        "unsure/unsure.jpg": (None, "corrected", "cat", 0.6),
        "dogs/dog.jpg": ("dog", "confirmed", "dog", 0.9),
    }
    digests = {os.path.basename(v.path): v.digest for v in read(output)}
    assert digests["cat.jpg"] == hashlib.sha256(photo(0)).digest()


def test_only_the_newest_verdict_on_a_photo_counts_and_none_that_was_taken_back(output: Path) -> None:
    say(output, {"cat.jpg": "dog", "dog.jpg": "cat"})
    say(output, {"cat.jpg": "cat"})
    with closing(Corrections(output, CLASSES)) as corrections:
        corrections.take_back(ids(output)["dog.jpg"])
    assert [(os.path.relpath(v.path, output), v.label) for v in read(output)] == [("cats/cat.jpg", "cat")]


def test_a_photo_that_was_restored_and_sorted_again_is_found(output: Path, tmp_path: Path) -> None:
    say(output, {"cat.jpg": "dog"})
    in_a_process("undo", str(output / "dogs/cat.jpg"), "--inbox", tmp_path / "inbox", "--output", output)
    assert [v.path for v in read(output)] == [str(tmp_path / "inbox/cat.jpg")]
    content = (tmp_path / "inbox/cat.jpg").read_bytes()
    (tmp_path / "inbox/cat.jpg").unlink()
    sort_as(output, {"cat.jpg": (content, CAT)})
    assert [v.path for v in read(output)] == [str(output / "cats/cat.jpg")]


def test_the_csv_of_verdicts_is_what_trainer_evaluate_takes(
    output: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    say(output, {"cat.jpg": "dog", NOT_UTF8: "dog", "unsure.jpg": None})
    assert main(["history", "--verdicts", "--csv", "--inbox", str(output)]) == 0
    table = tmp_path / "verdicts.csv"
    table.write_bytes(capfdbinary.readouterr().out)
    samples = labelled_photos(table, CLASSES)
    assert samples == [Sample(output / "dogs/cat.jpg", 1), Sample(output / "dogs" / NOT_UTF8, 1)]
    assert all(sample.path.is_file() for sample in samples)
    rows = list(csv.DictReader(io.StringIO(table.read_text(errors="surrogateescape"))))
    assert [list(row)[:2] for row in rows] == [["name", "label"]] * 3
    assert sorted((row["label"], row["label_was"], row["confidence"]) for row in rows) == [
        ("", "cat", "0.6"),
        ("dog", "cat", "0.9"),
        ("dog", "cat", "0.9"),
    ]


def test_verdicts_are_shown_as_a_table_and_as_json(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["history", "--verdicts", "--inbox", str(output)]
    assert main(shown) == 0
    advice = "Photos moved by hand count once sorter review has been started since."
    assert capsys.readouterr().out == f"No verdicts match. {advice}\n"
    say(output, {"cat.jpg": "dog"})
    say(output, {"unsure.jpg": None})
    assert main(shown) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[2:] == ["dogs/cat.jpg", "dog", "corrected", "cat", "90.0%"]
    assert "none of the classes" in second
    assert main([*shown, "--json", "--limit", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["label"] is None
    assert main([*shown, "--csv", "--run", "nothing"]) == 2
    assert main(["history", "--csv", "--inbox", str(output)]) == 2
    assert "use it with --verdicts" in capsys.readouterr().err


def test_an_empty_history_gives_a_csv_with_its_header_alone(
    output: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["history", "--verdicts", "--csv", "--inbox", str(output)]) == 0
    assert capfdbinary.readouterr().out == b"name,label,how,label_was,confidence,model,time,digest\r\n"


SURE = Sorted("cat", 0.995), Sorted("dog", 0.995)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 photos with verdicts and 40 that were sorted confidently."""
    output = tmp_path_factory.mktemp("many") / "out"
    sort_as(output, {f"{n}.jpg": (photo(n), (CAT, DOG)[n % 2]) for n in range(80)})
    sort_as(output, {f"sure{n}.jpg": (photo(1000 + n), SURE[n % 2]) for n in range(40)})
    say(output, {f"{n}.jpg": "dog" if n % 3 else "cat" for n in range(80)}, "checked")
    return output


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def photos_of(output: Path, cache: Path) -> Verdicts:
    return verdicts.read(output, None, CLASSES, seed=0, cache=cache, workers=1, reporter=Reporter())


def test_a_photo_is_held_out_by_its_digest(many: Path, cache: Path) -> None:
    found = photos_of(many, cache)
    for photos in (found.judged, found.confident):
        firsts = [
            [hashlib.sha256(s.path.read_bytes()).digest()[0] for s in p] for p in (photos.training, photos.held_out)
        ]
        assert min(firsts[0]) >= 77 > max(firsts[1])
    assert len(found.judged.training) + len(found.judged.held_out) == 80
    assert len(found.confident.training) + len(found.confident.held_out) == 40
    assert {(s.path.parent.name, s.label) for s in found.judged.training} == {("cats", 0), ("dogs", 1)}
    assert {(s.path.parent.name, s.label) for s in found.confident.training} == {("cats", 0), ("dogs", 1)}


def test_photos_that_are_gone_or_changed_and_near_copies_of_held_out_ones_are_left_out(
    many: Path, cache: Path, tmp_path: Path
) -> None:
    before = photos_of(many, cache)
    gone, changed, fifo = (sample.path for sample in before.judged.training[:3])
    times = changed.stat()
    held_out = before.judged.held_out[0].path
    kept = {path: path.read_bytes() for path in (gone, changed, fifo)}
    try:
        gone.unlink()
        changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        fifo.unlink()
        os.mkfifo(fifo)
        # Other bytes, by which it would not be held out, and the same picture.
        contents = (held_out.read_bytes() + bytes([n]) for n in range(256))
        copy = next(content for content in contents if hashlib.sha256(content).digest()[0] >= 77)
        sort_as(many, {"copy.jpg": (copy, SURE[0])})
        after = photos_of(many, tmp_path / "cache")
    finally:
        fifo.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert dict(after.left_out) == {
        str(gone): "it is not there any more",
        str(changed): "it is not the photo that the verdict is on",
        str(fifo): "it is not there any more",
    }
    assert {s.path for s in before.judged.training} - {s.path for s in after.judged.training} == {gone, changed, fifo}
    assert many / "cats/copy.jpg" in after.inspected
    assert many / "cats/copy.jpg" not in {s.path for s in after.confident.training}


def test_neither_is_no_class_and_what_was_corrected_is_no_longer_confident(output: Path, cache: Path) -> None:
    sort_as(output, {f"{n}.jpg": (photo(100 + n), SURE[n % 2]) for n in range(80)})
    say(output, {f"{n}.jpg": None for n in range(5)})
    say(output, {f"{n}.jpg": "cat" for n in range(5, 75)}, "checked")
    found = photos_of(output, cache)
    assert {sample.path.name for sample in found.neither} == {f"{n}.jpg" for n in range(5)}
    assert len(found.judged.training) + len(found.judged.held_out) == 70
    assert {s.path.name for s in (*found.confident.training, *found.confident.held_out)} == {
        f"{n}.jpg" for n in range(75, 80)
    }


def test_too_few_verdicts_are_refused_with_a_sentence(output: Path, cache: Path) -> None:
    say(output, {"cat.jpg": "dog", "unsure.jpg": None})
    with pytest.raises(
        ConfigurationError,
        match=r"has 1 usable verdicts that name a class, and . of them .*sorter review; photos moved by hand count",
    ):
        photos_of(output, cache)


@pytest.mark.parametrize("shots", [80, 250])
def test_a_burst_of_one_picture_is_refused_and_its_copies_are_counted(output: Path, cache: Path, shots: int) -> None:
    # Other bytes each, and the same picture: some are held out, and all the others are near copies of them.
    sort_as(output, {f"burst{n}.jpg": (photo() + n.to_bytes(2), CAT) for n in range(shots)})
    say(output, {f"burst{n}.jpg": "dog" for n in range(shots)})
    held_out = sum(
        hashlib.sha256(path.read_bytes()).digest()[0] < 77
        for path in (output / "dogs").iterdir()
        if "burst" in path.name
    )
    assert held_out >= verdicts.MIN_HELD_OUT
    sentence = (
        f"has {held_out} usable verdicts that name a class, and {held_out} of them would be held out, "
        f"without {shots - held_out} near copies of these: at least 50 and 15 are needed, and 15 to learn from"
    )
    with pytest.raises(ConfigurationError, match=sentence):
        photos_of(output, cache)


def test_near_copies_of_held_out_photos_with_a_verdict_are_listed(output: Path, cache: Path) -> None:
    sort_as(output, {f"{n}.jpg": (photo(100 + n), CAT) for n in range(80)})
    say(output, {f"{n}.jpg": "dog" for n in range(80)})
    before = photos_of(output, cache)
    assert before.left_out == ()
    held_out = before.judged.held_out[0].path
    contents = (held_out.read_bytes() + bytes([n]) for n in range(256))
    copy = next(content for content in contents if hashlib.sha256(content).digest()[0] >= 77)
    sort_as(output, {"copy.jpg": (copy, CAT)})
    say(output, {"copy.jpg": "dog"})
    after = photos_of(output, cache)
    assert after.left_out == ((str(output / "dogs/copy.jpg"), f"it is a near copy of {held_out}, which is held out"),)
    assert after.judged == before.judged
