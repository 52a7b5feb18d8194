"""Images a second of the training loader at CIFAR's size: crop, flip and normalise, on the CPU.

python benchmarks/loader.py --out benchmarks/loader_<hardware>_<date>.json
"""

import json
import statistics
import time
from pathlib import Path

import torch
import tyro

from skipnet import ImageSet
from skipnet.data.loaders import TrainLoader
from skipnet.training.run import environment


def measure(*, batch_size: int = 128, batches: int = 200, out: Path | None = None) -> None:
    """Time batches of generated 32x32 images with the paper's augmentation.

    Args:
        batch_size: Images a batch.
        batches: How many to time, after ten that warm up.
        out: The JSON file; printed only if not given.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = ImageSet(pixels, torch.zeros(50_000, dtype=torch.int64), ("one",))
    loader = TrainLoader(
        images,
        batch_size=batch_size,
        seed=0,
        padding=4,
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    times = []
    for step in range(batches + 10):
        start = time.perf_counter()
        loader.batch(step)
        times.append(time.perf_counter() - start)
    times = sorted(times[10:])
    result = {
        "batch_size": batch_size,
        "images_per_s": round(batch_size / statistics.median(times)),
        "median_ms": round(1e3 * statistics.median(times), 3),
        "p95_ms": round(1e3 * times[int(0.95 * len(times))], 3),
        "environment": environment(),
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(measure)
