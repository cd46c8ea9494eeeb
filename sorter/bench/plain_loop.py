"""The loop one would write first: torchvision's transforms, ResNet50 in eager mode, `shutil.move`.

    python sorter/bench/plain_loop.py MODEL FOLDER BATCH WORKERS

Sorts the photos in FOLDER and prints a line of JSON with their number and the seconds without the start. To be fair, it
works in batches, in inference mode, with all CPU cores and a warmed-up network. Photos are decoded by WORKERS processes
of PyTorch's data loader, or by this process if it is 0. `sorter bench` compares with both.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from sorter.classifier import manifest as manifests
from sorter.classifier import network
from sorter.processors import available_cpus


class _Photos(Dataset[torch.Tensor]):
    """Decoded photos, float (3, S, S)."""

    def __init__(self, paths: list[Path], to_tensor: Callable[[Image.Image], torch.Tensor]) -> None:
        self._paths, self._to_tensor = paths, to_tensor

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._to_tensor(ImageOps.exif_transpose(Image.open(self._paths[number])).convert("RGB"))


def main(model: Path, folder: Path, batch_size: int, workers: int) -> None:
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
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    # Forked workers start in a moment; others would import PyTorch again while the clock runs.
    context = "fork" if workers else None
    loader = DataLoader(_Photos(paths, to_tensor), batch_size, num_workers=workers, multiprocessing_context=context)
    with torch.inference_mode():
        net(torch.zeros(batch_size, 3, side, side))
        started = time.perf_counter()
        unsorted = iter(paths)
        for pictures in loader:
            for best in net(pictures).argmax(1).tolist():
                path, target = next(unsorted), folder / manifest.classes[best].folder
                os.makedirs(target, exist_ok=True)
                shutil.move(path, target / path.name)
        seconds = time.perf_counter() - started
    print(json.dumps({"photos": len(paths), "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
