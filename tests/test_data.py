"""Datasets as they lie on people's disks."""

import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tree
from PIL import Image

from sorter.errors import ConfigurationError
from trainer.data import inspection, layouts, near_copies, split
from trainer.data.layouts import Sample
from trainer.data.split import Dataset


def picture(seed: int, *, brightness: float = 1.0, quality: int = 95) -> bytes:
    """A different picture for each seed; the other arguments make near copies."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((90, 90), Image.Resampling.BICUBIC).point(lambda v: v * brightness)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cats_and_dogs(pattern: str, count: int = 20, first: int = 0) -> dict[str, bytes]:
    """Files `pattern.format(kind="cat", n=0)` and so on, each a different picture."""
    return {
        pattern.format(kind=kind, n=n, Kind=kind.capitalize()): picture(1000 * side + n + first)
        for side, kind in enumerate(("cat", "dog"))
        for n in range(count)
    }


def load(root: Path, cache: Path, calibration: tuple[Sample, ...] = (), seed: int = 0) -> Dataset:
    found = layouts.find(root, cache)
    inspected = inspection.inspect_all([s.path for s in found.samples], cache, 1, lambda results, _count: results)
    return split.divide(found, inspected, calibration, seed)


def labels(dataset: Dataset) -> set[str]:
    return {c.folder for c in dataset.classes}


def all_samples(dataset: Dataset) -> list[Sample]:
    return [*dataset.training, *dataset.validation, *dataset.calibration, *dataset.test]


def labels_match_names(dataset: Dataset) -> bool:
    """Whether the label of each photo is in its name or folder."""
    words = [c.label for c in dataset.classes]
    return all(words[s.label] in str(s.path.relative_to(s.path.parents[1])).lower() for s in all_samples(dataset))


def test_kaggles_cat_and_dog_layout_is_recognised(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("training_set/training_set/{kind}s/{kind}.{n}.jpg"))
    make_tree(tmp_path / "d", cats_and_dogs("test_set/test_set/{kind}s/{kind}.{n}.jpg", 5, first=500))
    make_tree(tmp_path / "d", {"training_set/training_set/cats/_DS_Store": b"x"})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert dataset.layout == "cat-and-dog"
    assert labels(dataset) == {"cats", "dogs"}
    assert (len(dataset.test), len(all_samples(dataset))) == (10, 50)
    assert labels_match_names(dataset)


def test_a_zip_is_unpacked_once_and_gives_the_same_parts_as_its_folder(tmp_path: Path) -> None:
    files = cats_and_dogs("training_set/training_set/{kind}s/{kind}.{n}.jpg")
    make_tree(tmp_path / "d", files)
    with zipfile.ZipFile(tmp_path / "cat-and-dog.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    names = [[s.path.name for s in load(tmp_path / source, tmp_path / "c").training] for source in ("d",)]
    names.append([s.path.name for s in load(tmp_path / "cat-and-dog.zip", tmp_path / "c").training])
    assert names[0] == names[1]
    before = os.stat(next((tmp_path / "c/unpacked").iterdir())).st_mtime_ns
    load(tmp_path / "cat-and-dog.zip", tmp_path / "c")
    assert os.stat(next((tmp_path / "c/unpacked").iterdir())).st_mtime_ns == before


@pytest.mark.parametrize("packed", [False, True])
def test_the_competitions_flat_layout_is_recognised_packed_or_not(packed: bool, tmp_path: Path) -> None:
    files = cats_and_dogs("train/{kind}.{n}.jpg")
    make_tree(tmp_path / "d", {"test1/1.jpg": picture(7777)})
    if packed:
        with zipfile.ZipFile(tmp_path / "d/train.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        make_tree(tmp_path / "d", files)
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert dataset.layout == "dogs-vs-cats"
    assert labels(dataset) == {"cats", "dogs"}
    assert len(all_samples(dataset)) == 40
    assert labels_match_names(dataset)


def test_microsofts_pet_images_are_recognised_and_their_broken_files_listed(tmp_path: Path) -> None:
    make_tree(tmp_path / "d/PetImages", cats_and_dogs("{Kind}/{n}.jpg"))
    make_tree(tmp_path / "d/PetImages", {"Cat/666.jpg": b"", "Dog/11702.jpg": picture(3)[:90], "Cat/Thumbs.db": b"x"})
    make_tree(tmp_path / "d", {"readme[1].txt": b"hello"})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert dataset.layout == "pet-images"
    assert labels(dataset) == {"cats", "dogs"}
    assert {path.name: reason.split(":")[0] for path, reason in dataset.unreadable} == {
        "666.jpg": "empty",
        "11702.jpg": "truncated",
    }


def test_an_image_folder_of_other_classes_keeps_their_names(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("val", 4), ("test", 5)):
        for index, name in enumerate(("ant", "bee", "wasp")):
            first = {"train": 0, "val": 100, "test": 200}[part] + 1000 * index
            make_tree(tmp_path / "d", {f"{part}/{name}/{n}.png": picture(first + n) for n in range(count)})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert [(c.label, c.folder) for c in dataset.classes] == [("ant", "ant"), ("bee", "bee"), ("wasp", "wasp")]
    assert (len(dataset.validation), len(dataset.test)) == (12, 15)


def test_parts_are_disjoint_stratified_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("{kind}s/{n}.jpg", 50))
    one, same, other = (load(tmp_path / "d", tmp_path / "c", seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.validation != other.validation
    paths = [s.path for s in all_samples(one)]
    assert len(paths) == len(set(paths)) == 100
    for part in (one.validation, one.calibration, one.test):
        assert [sum(s.label == label for s in part) for label in (0, 1)] == [5, 5]


def test_copies_of_test_photos_are_left_out_of_training_and_listed(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("train/{kind}s/{n}.jpg"))
    make_tree(tmp_path / "d", cats_and_dogs("test/{kind}s/{n}.jpg", 5, first=500))
    make_tree(tmp_path / "d", {"train/cats/copy.jpg": picture(500)})
    make_tree(tmp_path / "d", {"train/cats/near.jpg": picture(501, brightness=0.97, quality=70)})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert {(d.path.name, d.of.name, d.kind) for d in dataset.duplicates} >= {
        ("copy.jpg", "0.jpg", "exact"),
        ("near.jpg", "1.jpg", "near"),
    }
    assert not {"copy.jpg", "near.jpg"} & {s.path.name for s in all_samples(dataset)}


def test_copies_of_validation_photos_are_left_out_of_training_and_listed(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("train/{kind}s/{n}.jpg"))
    make_tree(tmp_path / "d", cats_and_dogs("val/{kind}s/{n}.jpg", 5, first=500))
    make_tree(tmp_path / "d", {"train/cats/near.jpg": picture(501, brightness=0.97, quality=70)})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert ("near.jpg", "1.jpg", "near") in {(d.path.name, d.of.name, d.kind) for d in dataset.duplicates}
    assert "near.jpg" not in {s.path.name for s in all_samples(dataset)}
    assert len(dataset.validation) == 10


def test_photos_of_one_burst_are_drawn_into_one_part(tmp_path: Path) -> None:
    for side, kind in enumerate(("cat", "dog")):
        for burst in range(20):
            shots = {
                f"{kind}s/{burst}-{n}.jpg": picture(1000 * side + burst, brightness=1 - n / 50, quality=90 - n)
                for n in range(4)
            }
            make_tree(tmp_path / "d", shots)
    dataset = load(tmp_path / "d", tmp_path / "c")
    parts: dict[str, set[str]] = {}
    for sample in all_samples(dataset):
        burst_name = f"{sample.label} {sample.path.name.split('-')[0]}"
        parts.setdefault(burst_name, set()).add(sample.part)
    assert {len(found) for found in parts.values()} == {1}
    assert len(all_samples(dataset)) == 160, "no shot is left out as a copy of another part's"
    for part in (dataset.validation, dataset.calibration, dataset.test):
        assert [sum(s.label == label for s in part) for label in (0, 1)] == [8, 8]


def test_a_burst_is_a_chain_of_photos_that_are_near_to_the_next() -> None:
    chain = [0, 0b1111, 0b1111_1111, 0b1111 << 40, 0xFFFF_FFFF_FFFF_FFFF, 0]
    groups = near_copies.groups(np.array(chain, np.uint64)).tolist()
    assert len({groups[i] for i in (0, 1, 2, 3, 5)}) == 1
    assert groups[4] != groups[0]
    hashes = np.random.default_rng(0).integers(0, 2**63, 400).astype(np.uint64)
    hashes[200:] = hashes[:200] ^ np.uint64(1 << 63 | 1 << 33 | 1 << 17 | 1)
    found = near_copies.groups(hashes)
    assert (found[200:] == found[:200]).all()
    assert len(set(found.tolist())) == 200


def test_many_photos_under_two_labels_are_refused(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("{kind}s/{n}.jpg"))
    make_tree(tmp_path / "d", {"cats/same.jpg": picture(9), "dogs/same.jpg": picture(9)})
    with pytest.raises(ConfigurationError, match="under two labels"):
        load(tmp_path / "d", tmp_path / "c")


def test_one_photo_under_two_labels_among_many_is_left_out_and_listed(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", cats_and_dogs("{kind}s/{n}.jpg", 110))
    make_tree(tmp_path / "d", {"cats/same.jpg": picture(9999), "dogs/same.jpg": picture(9999)})
    dataset = load(tmp_path / "d", tmp_path / "c")
    assert [{one.name, other.name} for one, other in dataset.contradictions] == [{"same.jpg"}]
    assert "same.jpg" not in {s.path.name for s in all_samples(dataset)}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "no known layout"),
        ({"notes.txt": b"x"}, "no known layout"),
        ({"cats/a.jpg": picture(1)}, "one class only"),
        ({"cats/a.jpg": b"", "dogs/b.jpg": b""}, "no readable photo"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused_with_a_sentence(
    files: dict[str, bytes], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    make_tree(tmp_path / "d", files)
    with pytest.raises(ConfigurationError, match=sentence):
        load(tmp_path / "d", tmp_path / "c")


def test_a_missing_folder_and_a_broken_zip_are_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--data"):
        layouts.find(tmp_path / "missing", tmp_path / "c")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(ConfigurationError, match="download it again"):
        layouts.find(tmp_path / "broken.zip", tmp_path / "c")


def test_a_file_is_inspected_once_until_it_changes(tmp_path: Path) -> None:
    make_tree(tmp_path / "d", {"a.jpg": picture(1), "b.jpg": picture(2)})
    paths = [tmp_path / "d/a.jpg", tmp_path / "d/b.jpg"]
    counts: list[int] = []

    def track(results: Iterable[inspection.Inspection], count: int) -> Iterable[inspection.Inspection]:
        counts.append(count)
        return results

    def run() -> dict[Path, inspection.Inspection]:
        return inspection.inspect_all(paths, tmp_path / "c", 1, track)

    first = run()
    assert run() == first
    make_tree(tmp_path / "d", {"a.jpg": picture(3)})
    assert run()[paths[0]] != first[paths[0]]
    assert counts == [2, 1]


def test_copies_of_test_photos_are_left_out_of_calibration(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "d", cats_and_dogs("train/{kind}s/{n}.jpg"))
    make_tree(root, cats_and_dogs("test/{kind}s/{n}.jpg", count=4, first=100))
    index = {"cats": 0, "dogs": 1}
    photos = [Sample(path, index[path.parent.name]) for path in sorted((root / "test").rglob("*.jpg"))]
    with pytest.raises(ConfigurationError, match="calibration part"):
        load(root, tmp_path / "c", calibration=tuple(photos))


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "d", {f"train/{n}.jpg": picture(n) for n in range(20)})
    make_tree(root, {f"plane/{n}.jpg": picture(100 + n) for n in range(20)})
    assert [c.folder for c in load(root, tmp_path / "c").classes] == ["plane", "train"]


def test_two_trainers_that_inspect_at_the_same_time_keep_what_both_found(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": picture(1), "b.jpg": picture(2)})
    cache, first, second = tmp_path / "cache", tmp_path / "a.jpg", tmp_path / "b.jpg"

    def meanwhile(results: Iterable[inspection.Inspection], _count: int) -> Iterable[inspection.Inspection]:
        inspection.inspect_all([second], cache, 1, lambda inspected, _: inspected)
        return results

    inspection.inspect_all([first], cache, 1, meanwhile)

    def nothing_new(_results: Iterable[inspection.Inspection], count: int) -> Iterable[inspection.Inspection]:
        raise AssertionError(f"{count} files were inspected again")

    assert set(inspection.inspect_all([first, second], cache, 1, nothing_new)) == {first, second}


def test_photos_are_inspected_in_processes_that_are_not_forks(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.jpg": picture(1)})
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))  # a fork of a process with threads may hang
    inspection.inspect_all([tmp_path / "a.jpg"], tmp_path / "cache", 1, lambda inspected, _: inspected)
    assert forks == []


def test_a_sorted_output_is_a_dataset_without_its_unsure_failed_and_hidden_folders(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "d", cats_and_dogs("{kind}s/{n}.jpg"))
    make_tree(root, {"unsure/1.jpg": picture(5001), "Failed/2.jpg": picture(5002), ".trash/3.jpg": picture(5003)})
    found = layouts.find(root, tmp_path / "c")
    assert [c.folder for c in found.classes] == ["cats", "dogs"]
    assert found.reserved == ("Failed", "unsure")
    make_tree(tmp_path / "split/train", cats_and_dogs("{kind}s/{n}.jpg"))
    make_tree(tmp_path / "split/train", {"unsure/1.jpg": picture(5001)})
    found = layouts.find(tmp_path / "split", tmp_path / "c")
    assert ([c.folder for c in found.classes], found.reserved) == (["cats", "dogs"], ("unsure",))
