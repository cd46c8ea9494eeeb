"""Programs that pause in the middle of a file which already decodes: no byte that they write is lost."""

import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from conftest import Running, photo, read_tree
from PIL import Image

PAUSES_SECONDS = (0.5, 1.0, 1.9, 2.1, 3.0, 4.5, 6.0, 10.0, 20.0, 30.0)
TRAILER = np.random.default_rng(1).bytes(1_500_000)


def _mpo() -> bytes:
    file, pictures = io.BytesIO(), [Image.open(io.BytesIO(photo(n))) for n in (1, 2)]
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def _heic() -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.open(io.BytesIO(photo(3)))).save(file)
    return file.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "jpg": lambda: photo(4),  # a Motion Photo has its film behind the picture
    "mpo": _mpo,
    "tif": lambda: photo(5, kind="TIFF"),
    "heic": _heic,
    "webp": lambda: photo(6, kind="WEBP"),
}


def _send(path: Path, content: bytes, written_first: int, pause_seconds: float) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(content[:written_first])
        time.sleep(pause_seconds)
        file.write(content[written_first:])


@pytest.fixture(params=["one file system", "two file systems"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "one file system":
        yield tmp_path / "out"
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.timeout(230)
@pytest.mark.parametrize(
    ("pauses_seconds", "settle_seconds"),
    [((0.1, 0.5, 1.5), 0.2), pytest.param(PAUSES_SECONDS, 2.0, marks=pytest.mark.torture)],
)
def test_a_sender_that_pauses_loses_nothing(
    tmp_path: Path,
    output: Path,
    pauses_seconds: tuple[float, ...],
    settle_seconds: float,
    start: Callable[..., Running],
    proved: Callable[[str], None],
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    settle = ["--settle-seconds", str(settle_seconds), "--rescan-seconds", "3"]
    sorter = start("run", "--inbox", inbox, "--output", output, "--log-format", "json", *settle)
    (inbox / "first.jpg").write_bytes(photo(7))
    sorter.wait_for_event("photo.sorted")
    contents: dict[str, bytes] = {}
    senders = []
    for extension, make in KINDS.items():
        for pause_seconds in pauses_seconds:
            name, picture = f"{extension}-{pause_seconds}.{extension}", make()
            contents[name] = picture + TRAILER
            complete_picture = len(picture) + len(TRAILER) // 4
            senders.append(
                threading.Thread(target=_send, args=(inbox / name, contents[name], complete_picture, pause_seconds))
            )
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    sorter.wait_for(lambda: not [path for path in inbox.iterdir() if not path.name.startswith(".")], seconds=120)
    sorter.process.terminate()
    assert sorter.finish()[0] == 0
    found = {Path(name).name: content for name, content in read_tree(output).items() if not name.startswith(".sorter")}
    lost = [name for name, content in contents.items() if found.get(name) != content]
    assert lost == []
    proved(f"{len(contents)} senders that paused up to {max(pauses_seconds)} s in a photo: no byte lost")
