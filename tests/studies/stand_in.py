"""Stands in for `skipnet train --resume RUN`: what a run leaves, made up, in no time.

STAND_IN says by run what else to do: fail, wait (for a file `go` in the study's directory, as a
training does for its end), or both deaf (a signal does nothing) and wait.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

run = Path(sys.argv[1])
study = run.parent.parent
name = f"{run.parent.name}/{run.name}"
orders = json.loads(os.environ.get("STAND_IN", "{}")).get(name, "")
config = json.loads((run / "config.json").read_text())
stage = config["stages"][-1]


def stop(number: int, frame: object) -> None:
    with open(run / "signals", "a") as file:
        file.write(f"{number}\n")
    if "deaf" not in orders:
        (run / "checkpoint.safetensors").write_text("as far as it went")
        print("stopped", file=sys.stderr)
        sys.exit(130)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
with open(study / "begun", "a") as log:
    variables = [os.environ.get(key, "-") for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
    log.write(f"{name} {' '.join(variables)}\n")
print(f"training {name}", flush=True)
if "fail" in orders:
    for line in range(20):
        print(f"line {line}")
    print("skipnet: error: no luck", file=sys.stderr)
    sys.exit(2)
end = time.monotonic() + 60
while "wait" in orders and not (study / "go").exists() and time.monotonic() < end:
    time.sleep(0.02)

target = config["hrl"]["target_compute"] if stage == "hrl" else None
share = target if target is not None else 0.95 if stage == "hrl" else 1.0
evaluation = {
    "accuracy": 90.0 + 5 * share + config["seed"],
    "macs": 1e6 * share,
    "macs_fraction": share,
    "blocks_fraction": share,
    "gates_by_input": 2,
    "keep_rates": [] if stage == "dense" else [share] * 5,
}
sampled = None if stage == "dense" else evaluation | {"accuracy": 80.0}
steps = [{"stage": stage, "step": s, "epoch": s / 10, "loss": 1.0} for s in (10, 20, 30)]
if stage == "hrl":
    moved = {"alpha": 0.25, "macs_fraction": share, "macs_thresholded": share, "accuracy": 0.9}
    steps = [line | moved for line in steps]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
(run / "environment.json").write_text(json.dumps({"commit": "abc", "versions": {"torch": "2"}}))
(run / f"{stage}.safetensors").write_text("weights")
result = {"evaluation": evaluation, "seconds": 12.5}
if sampled is not None:
    result["sampled"] = sampled
(run / "results.json").write_text(json.dumps({stage: result}))
