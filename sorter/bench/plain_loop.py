"""The loop that anyone would write: torchvision's transforms, ResNet50 in eager mode, `shutil.move`.

    python tests/benchmarks/plain_loop.py MODEL FOLDER BATCH

Sorts the photos in FOLDER and prints a line of JSON: how many, in how many seconds, without the start. It gets what
is fair: batches, inference mode, all processors, a network that has answered once. `sorter bench` compares with it.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps

from sorter.classifier import manifest, network
from sorter.processors import available_cpus


def main(model: Path, folder: Path, batch_size: int) -> None:
    """Sort a folder into `sorted/` beside it, one batch after another."""
    network.torchvision_models()  # so that torchvision can be imported also where it was built for another torch
    from torchvision import transforms  # type: ignore[import-untyped]

    described = manifest.read(model)
    side = described.input.size
    to_tensor = transforms.Compose(
        [
            transforms.Resize((side, side)),
            transforms.ToTensor(),
            transforms.Normalize(described.input.mean, described.input.std),
        ]
    )
    torch.set_num_threads(available_cpus())
    net = network.load(model, described)
    photos = sorted(path for path in folder.iterdir() if path.is_file())
    with torch.inference_mode():
        net(torch.zeros(batch_size, 3, side, side))
        started = time.perf_counter()
        for start in range(0, len(photos), batch_size):
            paths = photos[start : start + batch_size]
            pictures = [to_tensor(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in paths]
            for path, best in zip(paths, net(torch.stack(pictures)).argmax(1).tolist(), strict=True):
                target = folder / described.classes[best].folder
                os.makedirs(target, exist_ok=True)
                shutil.move(path, target / path.name)
        seconds = time.perf_counter() - started
    print(json.dumps({"photos": len(photos), "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
