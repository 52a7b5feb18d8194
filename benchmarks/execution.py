"""Saved computation as saved time: `skipnet benchmark` on the cases that README's table shows.

    python benchmarks/execution.py --out benchmarks/execution_<hardware>_<date>.json
    python benchmarks/results.py tables

About a quarter of an hour on two cores, with nothing else on them. The file is written after every
case, and the same command again adds the cases it lacks.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from skipnet.files import write_atomically
from skipnet.training.run import environment

DENSE = ("dense-torch", "dense-compile", "dense-onnx", "dense-openvino")
SKIPPING = ("masked", "compacted", "portable", "optimized", "bound")
ALL, FEWER = DENSE + SKIPPING, ("dense-torch", "dense-onnx", *SKIPPING)

# Model, batch size, threads, keep rate, turns, engines, and what optimized may take of bound: for
# keep 1.0 of dense-onnx.
CASES: list[tuple[str, int, int, float, int, tuple[str, ...], float | None]] = [
    ("cifar_resnet110", 1, 1, 0.5, 200, ALL, 1.15),
    ("cifar_resnet110", 1, 2, 0.5, 200, FEWER, None),
    ("cifar_resnet110", 1, 1, 1.0, 200, FEWER, 1.25),
    ("resnet50", 1, 1, 0.5, 30, ALL, 1.08),
    ("resnet50", 1, 2, 0.5, 30, FEWER, 1.08),
    ("resnet50", 1, 1, 1.0, 30, FEWER, 1.08),
    ("resnet101", 1, 1, 0.5, 20, FEWER, 1.08),
    ("resnet101", 1, 2, 0.5, 20, FEWER, 1.08),
    ("cifar_resnet110", 64, 1, 0.5, 15, FEWER, 1.20),
    ("cifar_resnet110", 64, 2, 0.5, 15, FEWER, 1.20),
    ("resnet50", 16, 1, 0.5, 7, FEWER, 1.10),
    ("resnet50", 16, 2, 0.5, 7, FEWER, 1.10),
]


def main(*, out: Path, seed: int = 0) -> None:
    """Time every case and write one file.

    Args:
        out: The JSON file; cases that it has are not timed again.
        seed: Of weights and decisions.
    """
    # Once, before the file that is written makes the working tree a changed one.
    here = environment()
    kept = {"environment": here, "seed": seed, "cases": []}
    if out.exists():
        kept = json.loads(out.read_text())
        if (kept["environment"]["commit"], kept["seed"]) != (here["commit"], seed):
            raise SystemExit(f"{out} is of another commit or seed: move it away, or name another")
    cases: list[dict[str, Any]] = kept["cases"]
    for model, batch_size, threads, keep, repeats, engines, target in CASES:
        if any(_is(case, model, batch_size, threads, keep) for case in cases):
            continue
        settings = {"batch-size": batch_size, "threads": threads, "keep": keep}
        settings |= {"repeats": repeats, "seed": seed}
        words = [model, *(f"--{name}={value}" for name, value in settings.items())]
        words += ["--engines", *engines]
        # A process each: what one leaves in memory or in thread pools is not the next one's.
        done = subprocess.run(
            [sys.executable, "-m", "skipnet.cli", "benchmark", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        *table, line = done.stdout.splitlines()
        print("\n".join(table), flush=True)
        cases.append(json.loads(line) | {"target": target})
        cases.sort(key=lambda case: [_is(case, *known[:4]) for known in CASES].index(True))
        write_atomically(out, (json.dumps(kept, indent=1) + "\n").encode())


def _is(case: dict[str, Any], model: str, batch_size: int, threads: int, keep: float) -> bool:
    found = (case["model"], case["batch_size"], case["threads"], case["keep"])
    return found == (model, batch_size, threads, keep)


if __name__ == "__main__":
    tyro.cli(main)
