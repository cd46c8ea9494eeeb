"""Pictures that show neither a cat nor a dog: from installed packages, and generated ones, the same on each machine.

Python packages: scikit-image, scikit-learn, matplotlib. Debian packages: mate-backgrounds,
plasma-workspace-wallpapers, opencv-doc, tuxpaint-stamps-default, either installed or unpacked with `dpkg -x`.

In: where to look, and a folder to draw in. Out: paths by group. Each photograph was checked by eye: none shows a cat or
a dog.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Random = np.random.Generator

_SKIMAGE = """astronaut.png brick.png camera.png cell.png clock_motion.png coffee.png coins.png grass.png gravel.png
hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg text.png"""
_MATE = """Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"""
_PLASMA = """BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path
summer_1am"""
_OPENCV_DATA = """aero1.jpg aloeL.jpg apple.jpg basketball1.png board.jpg box_in_scene.png building.jpg cards.png
ela_original.jpg fruits.jpg graf1.png home.jpg left.jpg left06.jpg leuvenA.jpg licenseplate_motion.jpg messi5.jpg
orange.jpg pca_test1.jpg rubberwhale1.png smarties.png stuff.jpg sudoku.png text_motion.jpg"""
_OPENCV_TEXT = " ".join(f"scenetext0{number}.jpg" for number in range(1, 7))
_OPENCV_PAGES = """227943776_1.jpg 230501201_1.jpg 4_barcodes.jpg feature_building.jpg handSrc.jpg newspaper.jpg
pexels_double_decker_bus.jpg retina_TreeHdr_small.jpg space_shuttle.jpg yolo.jpg"""
_OPENCV = "share/doc/opencv-doc"
_STAMPS = "share/tuxpaint/stamps"
_THINGS = ("food", "hobbies", "household", "plants", "vehicles")

_PHOTOGRAPHS: tuple[tuple[str, str], ...] = (
    ("share/backgrounds/mate/nature", " ".join(f"{name}.jpg" for name in _MATE.split())),
    ("share/wallpapers", " ".join(f"{name}/contents/images/2560x1600.jpg" for name in _PLASMA.split())),
    (f"{_OPENCV}/examples/data", _OPENCV_DATA),
    (f"{_OPENCV}/examples/hfs/data", "001.jpg 002.jpg"),
    (f"{_OPENCV}/examples/text", _OPENCV_TEXT),
    (f"{_OPENCV}/opencv4/html", _OPENCV_PAGES),
)
_OTHER_ANIMALS = (
    (f"{_OPENCV}/examples/data", "baboon.jpg butterfly.jpg squirrel_cls.jpg"),
    (f"{_OPENCV}/examples/hfs/data", "000.jpg"),
)


def gather(root: Path, scratch: Path) -> dict[str, list[Path]]:
    """Find the photographs and draw the other pictures.

    Args:
        root: where the Debian packages are unpacked, `/usr` or a copy of it.
        scratch: folder to draw in.

    Returns:
        Paths by group; files that are not installed are left out.
    """
    shipped = [
        *_existing(_package("skimage") / "data", _SKIMAGE),
        *_existing(_package("sklearn") / "datasets" / "images", "china.jpg flower.jpg"),
        *_existing(_package("matplotlib") / "mpl-data" / "sample_data", "grace_hopper.jpg"),
    ]
    photographs = [path for folder, names in _PHOTOGRAPHS for path in _existing(root / folder, names)]
    animals = [path for folder, names in _OTHER_ANIMALS for path in _existing(root / folder, names)]
    return {
        "photographs": shipped + photographs,
        "photographs of other animals": animals + list(_stamps(root, "animals")),
        "photographs of things, cut out": [path for kind in _THINGS for path in _stamps(root, kind)],
        "generated": list(_generated(scratch)) + list(_screenshots(scratch)),
    }


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    return Path("/nonexistent") if found is None or found.origin is None else Path(found.origin).parent


def _existing(folder: Path, names: str) -> list[Path]:
    return [folder / name for name in names.split() if (folder / name).is_file()]


def _stamps(root: Path, kind: str) -> Iterator[Path]:
    for path in sorted((root / _STAMPS / kind).rglob("*.png")):
        if not {"cartoon", "cats", "dogs", "toys"} & set(path.parts):
            yield path


def _generated(folder: Path) -> Iterator[Path]:
    random = np.random.default_rng(0)
    kinds: dict[str, tuple[Callable[[Random], Image.Image], int]] = {
        "gradient": (_gradient, 6),
        "noise": (_noise, 6),
        "colours": (_colours, 8),
        "pattern": (_pattern, 6),
        "shapes": (_shapes, 8),
        "face": (_face, 6),
        "document": (_document, 8),
        "terminal": (_terminal, 4),
        "plot": (_plot, 10),
    }
    for kind, (draw, count) in kinds.items():
        for number in range(count):
            path = folder / f"{kind}-{number}.png"
            draw(random).convert("RGB").save(path)
            yield path


def _colour(random: Random) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def _gradient(random: Random) -> Image.Image:
    corners = np.array([_colour(random) for _ in range(4)], np.uint8).reshape(2, 2, 3)
    return Image.fromarray(corners).resize((640, 480), Image.Resampling.BILINEAR)


def _noise(random: Random) -> Image.Image:
    coarse = 2 ** int(random.integers(0, 5))
    grains = random.integers(0, 256, (480 // coarse, 640 // coarse, 3), np.uint8)
    return Image.fromarray(grains).resize((640, 480), Image.Resampling.BICUBIC)


def _colours(random: Random) -> Image.Image:
    spots = random.integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(spots).resize((640, 480), Image.Resampling.BICUBIC)
    return picture.filter(ImageFilter.GaussianBlur(40))


def _pattern(random: Random) -> Image.Image:
    y, x = np.mgrid[0:480, 0:640] // int(random.integers(8, 80))
    which = (x + y) % 2 if random.integers(2) else x % 2
    return Image.fromarray(np.array([_colour(random), _colour(random)], np.uint8)[which])


def _shapes(random: Random) -> Image.Image:
    picture = Image.new("RGB", (640, 480), _colour(random))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(3, 15))):
        x, y, size = random.integers(20, 400, 3).tolist()
        draw = pen.ellipse if random.integers(2) else pen.rectangle
        draw((x, y, x + size, y + size), fill=_colour(random))
    return picture


def _face(random: Random) -> Image.Image:
    picture = Image.new("RGB", (480, 480), _colour(random))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((90, 90, 390, 390), fill=_colour(random), outline="black", width=6)
    for x in (180, 300):
        pen.ellipse((x - 25, 190, x + 25, 240), fill="white", outline="black", width=4)
        pen.ellipse((x - 8, 207, x + 8, 223), fill="black")
    pen.arc((170, 240, 310, 340), 20, 160, fill="black", width=6)
    return picture


_SENTENCE = "the photo of a folder that was moved to another place is never replaced and one line says why"
_WORDS = _SENTENCE.split()


def _text(random: Random, words: int) -> str:
    return " ".join(_WORDS[int(i)] for i in random.integers(0, len(_WORDS), words))


def _document(random: Random) -> Image.Image:
    picture = Image.new("RGB", (620, 877), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((60, 50), _text(random, 4).title(), fill="black", font=ImageFont.load_default(28))
    size, left = int(random.integers(10, 18)), 60 + 250 * int(random.integers(2))
    for line in range(110, 820, int(size * 1.5)):
        if random.random() > 0.12:
            pen.text((left, line), _text(random, 60)[: (560 - left) * 2 // size], fill="black", font_size=size)
    return picture


def _terminal(random: Random) -> Image.Image:
    picture = Image.new("RGB", (800, 480), (20, 20, 24))
    pen = ImageDraw.Draw(picture)
    for line in range(10, 470, 18):
        pen.text((10, line), "$ " + _text(random, int(random.integers(1, 14))), fill=(120, 230, 120), font_size=14)
    return picture


def _plot(random: Random) -> Image.Image:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    values = random.normal(size=(3, 60))
    kind = int(random.integers(5))
    if kind == 0:
        axes.plot(values.T.cumsum(0))
    elif kind == 1:
        axes.scatter(values[0], values[1], c=values[2])
    elif kind == 2:
        axes.hist(values.T, bins=12)
    elif kind == 3:
        axes.imshow(random.random((12, 12)))
    else:
        axes.pie(random.random(6), labels=list("abcdef"))
    axes.set_title(_text(random, 4))
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))  # type: ignore[attr-defined]
    plt.close(figure)
    return picture


_STYLE = "body{font:16px sans-serif;margin:0}main{max-width:44em;margin:2em auto}td{border:1px solid #999;padding:6px}"
_PARAGRAPH = "<p>" + " ".join(_WORDS * 5) + ".</p>"
_PAGES = {
    "article": f"<main><h1>How a photo is moved</h1>{_PARAGRAPH * 4}</main>",
    "table": "<main><h1>Prices</h1><table>"
    + "".join(f"<tr><td>Article {n}</td><td>{n * 37 % 91}.50</td><td>in stock</td></tr>" for n in range(18))
    + "</table></main>",
    "chat": "<main>"
    + "".join(
        f"<p style='background:{'#d7f5d0' if n % 2 else '#eee'};border-radius:12px;padding:10px;width:60%;"
        f"margin-left:{40 * (n % 2)}%'>{' '.join(_WORDS[n : n + 9])}</p>"
        for n in range(9)
    )
    + "</main>",
    "code": "<pre style='background:#1e1e2e;color:#cdd6f4;padding:2em;height:800px;margin:0'>"
    + "\n".join(f"{n:3} {'    ' * (n % 3)}for word in words[{n}:]: print(word)  # {_WORDS[n % 9]}" for n in range(34))
    + "</pre>",
    "dashboard": "<main style='display:grid;grid-template-columns:1fr 1fr 1fr;gap:1em'>"
    + "".join(
        f"<div style='background:hsl({n * 40},60%,55%);color:white;height:150px;padding:1em'><h2>{n * 713}</h2></div>"
        for n in range(9)
    )
    + "</main>",
    "form": "<main><h1>Settings</h1>"
    + "".join(f"<p><label>{word} <input value='{word}'></label> <button>change</button></p>" for word in _WORDS[:12])
    + "</main>",
}


def _screenshots(folder: Path) -> Iterator[Path]:
    """Pages in Chromium, if it is installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return
    for name, body in _PAGES.items():
        page, path = folder / f"{name}.html", folder / f"screenshot-{name}.png"
        page.write_text(f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style>{body}", encoding="utf-8")
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    chromium,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    f"--user-data-dir={profile}",
                    "--window-size=1280,800",
                    f"--screenshot={path}",
                    page.as_uri(),
                ],
                check=False,
                capture_output=True,
                timeout=60,
            )
        if path.is_file():
            yield path
