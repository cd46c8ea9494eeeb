"""The loop one would write first: torchvision's transforms, ResNet50 in eager mode, `shutil.move`.

    python sorter/bench/plain_loop.py MODEL FOLDER BATCH

Sorts the photos in FOLDER and prints a line of JSON with their number and the seconds without the start. To be fair, it
works in batches, in inference mode, with all CPU cores and a warmed-up network. `sorter bench` compares with it.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps

from sorter.classifier import manifest as manifests
from sorter.classifier import network
from sorter.processors import available_cpus


def main(model: Path, folder: Path, batch_size: int) -> None:
    """Sort the photos in a folder into its subfolders, one batch after another."""
    network.torchvision_models()  # lets torchvision load even if it was built for another torch
    from torchvision import transforms  # type: ignore[import-untyped]

    manifest = manifests.read(model)
    side = manifest.input.size
    to_tensor = transforms.Compose(
        [
            transforms.Resize((side, side)),
            transforms.ToTensor(),
            transforms.Normalize(manifest.input.mean, manifest.input.std),
        ]
    )
    torch.set_num_threads(available_cpus())
    net = network.load(model, manifest)
    photos = sorted(path for path in folder.iterdir() if path.is_file())
    with torch.inference_mode():
        net(torch.zeros(batch_size, 3, side, side))
        started = time.perf_counter()
        for start in range(0, len(photos), batch_size):
            paths = photos[start : start + batch_size]
            pictures = [to_tensor(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in paths]
            for path, best in zip(paths, net(torch.stack(pictures)).argmax(1).tolist(), strict=True):
                target = folder / manifest.classes[best].folder
                os.makedirs(target, exist_ok=True)
                shutil.move(path, target / path.name)
        seconds = time.perf_counter() - started
    print(json.dumps({"photos": len(photos), "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
