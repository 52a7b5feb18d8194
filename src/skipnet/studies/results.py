"""What a study found: one JSON, and a table of means over the seeds."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from skipnet.studies.study import Child, Study, write_json
from skipnet.training.config import to_dict

Results = dict[str, Any]


def collect(study: Study, children: Sequence[Child]) -> Results:
    """Gather the results of the runs that are finished, and write results.json.

    Returns:
        kind, recipe, config (which the runs share), settings, runs, and missing, the names of those
        not finished. A run has name, label, stage, seed, target, alpha (None where it has none),
        evaluation, sampled (None for a dense network), seconds, environment (versions, commit,
        hardware), and path: step, alpha, macs_fraction (of sampled decisions) and macs_thresholded
        of every line that HRL logged.

    Raises:
        UserError: When a run's file cannot be read, or results.json cannot be written.
    """
    config = to_dict(study.config)
    # What is local is named for what it holds, not for where it lies.
    if Path(config["data"]["name"]).exists():
        config["data"]["name"] = Path(config["data"]["name"]).resolve().name
    for field in ("start", "teacher"):
        config[field] = config[field] and Path(config[field]).resolve().name
    runs = [entry for child in children if (entry := _entry(study, child)) is not None]
    names = {run["name"] for run in runs}
    results = {
        "kind": study.kind,
        "recipe": study.config.recipe,
        "config": config,
        "settings": study.settings,
        "runs": runs,
        "missing": [child.name for child in children if child.name not in names],
    }
    write_json(study.path / "results.json", results)
    return results


def _entry(study: Study, child: Child) -> dict[str, Any] | None:
    run = study.finished(child)
    if run is None:
        return None
    stage = child.config.stages[-1]
    found = run.results[stage]
    hrl = child.config.hrl
    return {
        "name": child.name,
        "label": child.label,
        "stage": stage,
        "seed": child.config.seed,
        "target": hrl.target_compute if stage == "hrl" else None,
        "alpha": hrl.alpha if stage == "hrl" and hrl.target_compute is None else None,
        "evaluation": found["evaluation"],
        "sampled": found.get("sampled"),
        "seconds": found["seconds"],
        "environment": json.loads((run.path / "environment.json").read_text(encoding="utf-8")),
        "path": _path(run.path / "metrics.jsonl"),
    }


def _path(metrics: Path) -> dict[str, list[float]]:
    """How computation, of sampled and of thresholded decisions, and alpha moved in training."""
    path: dict[str, list[float]] = {
        name: [] for name in ("step", "alpha", "macs_fraction", "macs_thresholded")
    }
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if path.keys() <= line.keys():
            for key, values in path.items():
                values.append(round(line[key], 5))
    return path


def by_label(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Put the runs of several seeds together, in the order of their first one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return groups


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1); 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def results_table(results: Results) -> Table:
    """Return a row a label: percent, mean ± standard deviation over its seeds.

    "by input" is the number of gates that open for 5 to 95 % of the images.
    """
    model = results["config"]["model"]
    seeds = results["settings"]["seeds"]
    table = Table(
        title=f"{results['recipe']}: {model['name']}, gate {model['gate']}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
        box=box.SIMPLE,
    )
    table.add_column("", no_wrap=True)
    for title in ("accuracy", "of dense", "sampled", "of dense", "MACs", "by input", "time"):
        table.add_column(title, justify="right")
    for label, runs in by_label(results["runs"]).items():
        hard = [run["evaluation"] for run in runs]
        sampled = [run["sampled"] for run in runs if run["sampled"] is not None]
        gates = len(hard[0]["keep_rates"])
        by_input = f"{statistics.mean(e['gates_by_input'] for e in hard):.3g} of {gates}"
        table.add_row(
            label if len(runs) == len(seeds) else f"{label} ({len(runs)} of {len(seeds)})",
            _percent([e["accuracy"] for e in hard], 2),
            _percent([100 * e["macs_fraction"] for e in hard]),
            _percent([e["accuracy"] for e in sampled], 2),
            _percent([100 * e["macs_fraction"] for e in sampled]),
            f"{statistics.mean(e['macs'] for e in hard) / 1e6:.1f}M",
            by_input if gates else "",
            _duration(statistics.mean(run["seconds"] for run in runs)),
        )
    return table


def _percent(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    shown = f"{mean:.{digits}f}"
    return f"{shown} ± {spread:.{digits}f}" if len(values) > 1 else shown


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"
