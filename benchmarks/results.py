"""Turn run directories into the JSON that is kept, and the JSON into tables.

    python benchmarks/results.py collect RUN… --out benchmarks/<theme>_<hardware>_<date>.json
    python benchmarks/results.py tables          # writes the tables in both READMEs again

A table stands between `<!-- results: FILE -->` and `<!-- end -->`, in README.md or in
benchmarks/README.md; a test holds it against its file.
"""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

BENCHMARKS = Path(__file__).parent
PAGES = (BENCHMARKS.parent / "README.md", BENCHMARKS / "README.md")
STAGES = {"dense": "dense", "sp": "SkipNet, SP", "hrl": "SkipNet, SP + HRL"}
TABLE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(paths: tyro.conf.Positional[tuple[Path, ...]], *, out: Path) -> None:
    """Write configuration, environment, results and curves of runs of one recipe to one file.

    Args:
        paths: Finished run directories that differ in their seed alone, or the one directory of a
            sweep or of ablations.
        out: The JSON file.
    """
    study = len(paths) == 1 and (paths[0] / "study.json").exists()
    found = _read_study(paths[0]) if study else _read_runs(paths)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def tables() -> None:
    """Write the tables of all pages again from their files."""
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")


def with_tables(page: Path) -> str:
    """Return the text of a page with its tables made again."""
    text = page.read_text(encoding="utf-8")
    return TABLE.sub(lambda m: m[1] + table(BENCHMARKS / m[2], page.parent) + m[3], text)


def table(path: Path, origin: Path) -> str:
    """Return the Markdown table of a results file, with a link to it from a directory."""
    results = json.loads(path.read_text(encoding="utf-8"))
    first = results["runs"][0] if "runs" in results else results
    engines = ""
    if "kind" in results:
        lines, name = _study(results), f"skipnet {results['kind']} {results['recipe']}"
        seeds = results["settings"]["seeds"]
    elif "runs" in results:
        lines, name = _trainings(results), results["recipe"]
        seeds = [run["seed"] for run in results["runs"]]
    elif "stages" in results["cases"][0]:
        lines, name = _steps(results["cases"]), "benchmarks/training.py"
        seeds = [results["settings"]["seed"]]
    else:
        lines, name, seeds = _times(results["cases"]), "skipnet benchmark", [results["seed"]]
        used = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
        there = results["cases"][0]["versions"]
        engines = "".join(f", {title} {there[key]}" for key, title in used.items() if key in there)
    environment = first["environment"]
    found = [run["environment"]["commit"] for run in results.get("runs", [])]
    known = [commit for commit in found or [environment["commit"]] if commit is not None]
    commits = ", ".join(dict.fromkeys(known)) or "unknown"
    hardware, versions = environment["hardware"], environment["versions"]
    lines += [
        "",
        f"`{name}`, seed {', '.join(map(str, seeds))}; "
        f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, torch "
        f"{versions['torch']}{engines}, commit {commits}, "
        f"{environment['time'][:10]} ([JSON]({path.relative_to(origin)})).",
    ]
    return "\n".join(lines) + "\n"


def _study(results: dict[str, Any]) -> list[str]:
    """A line a target or variant, over the seeds."""
    lines = [
        "| | accuracy | of dense | sampled | of dense | by input | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(run["label"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["label"] == label]
        cells = [f"`{label}`"]
        for kind in ("evaluation", "sampled"):
            evaluations = [run[kind] for run in runs if run[kind] is not None]
            cells += [
                _spread([e["accuracy"] for e in evaluations]) + " %" if evaluations else "",
                _spread([100 * e["macs_fraction"] for e in evaluations], 1) + " %"
                if evaluations
                else "",
            ]
        cells.append(_by_input([run["evaluation"] for run in runs]))
        cells.append(_duration(statistics.mean(run["seconds"] for run in runs)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _steps(cases: list[dict[str, Any]]) -> list[str]:
    """A line a case of `training.py`: seconds of a step, and ratios within the case."""
    titles = {"dense": "dense step", "sp": "SP", "hrl": "HRL, half of the blocks"}
    lines = [
        "| network | threads | "
        + " | ".join(titles[row["stage"]] for row in cases[0]["stages"])
        + " |",
        "|---" * (2 + len(cases[0]["stages"])) + "|",
    ]
    for case in cases:
        cells = [f"`{case['model']}`", str(case["threads"])]
        for row in case["stages"]:
            shown = f"{row['median_s']:.2f} s, {row['images_per_s']:.0f} images/s"
            if row["stage"] != "dense":
                shown += f": **{row['ratio_to_dense']:.2f}** ×"
            cells.append(shown + (f" (aim ≤ {row['target']:.2f})" if row["target"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(cases: list[dict[str, Any]]) -> list[str]:
    """A line a case of `execution.py`, milliseconds."""
    shown = ["dense-torch", "dense-onnx", "compacted", "portable", "optimized", "bound"]
    lines = [
        f"| network | batch | threads | MACs | {' | '.join(shown)} | optimized is | aim |",
        "|---" * (len(shown) + 6) + "|",
    ]
    for case in cases:
        times = {row["engine"]: row["median_ms"] for row in case["rows"]}
        against = "dense-onnx" if case["keep"] == 1 else "bound"
        aim = f"≤ {case['target']:.2f}" if case["target"] else ""
        cells = [
            f"`{case['model']}`",
            case["batch_size"],
            case["threads"],
            f"{100 * case['macs_fraction']:.0f} %",
            *(
                f"{times[name]:.3g}" if times[name] < 1000 else f"{times[name]:.0f}"
                for name in shown
            ),
            f"**{times['optimized'] / times[against]:.2f}** × {against}",
            aim,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _trainings(results: dict[str, Any]) -> list[str]:
    """A line a stage, over the seeds."""
    runs = results["runs"]
    lines = [
        "| network | accuracy | sampled | MACs | of dense | blocks run | by input | images/s "
        "| training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in results["config"]["stages"]:
        evaluations = [run["results"][stage]["evaluation"] for run in runs]
        sampled = [run["results"][stage]["sampled"] for run in runs if stage != "dense"]
        rates = [run["results"][stage].get("images_per_s") for run in runs]
        # Missing where the stages were not timed taking turns.
        rate = "" if None in rates else f"{statistics.mean(rates):,.0f}"
        seconds = statistics.mean(run["results"][stage]["seconds"] for run in runs)
        cells = [
            STAGES[stage],
            _spread([e["accuracy"] for e in evaluations]) + " %",
            _spread([e["accuracy"] for e in sampled]) + " %" if sampled else "",
            f"{statistics.mean(e['macs'] for e in evaluations) / 1e6:.1f}M",
            _spread([100 * e["macs_fraction"] for e in evaluations], 1) + " %",
            _spread([100 * e["blocks_fraction"] for e in evaluations], 1) + " %",
            _by_input(evaluations),
            f"{rate}",
            _duration(seconds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _by_input(evaluations: list[dict[str, Any]]) -> str:
    """How many gates are open for 5 to 95 % of the images, a seed."""
    if not evaluations[0]["keep_rates"]:
        return ""
    counts = [sum(0.05 <= rate <= 0.95 for rate in e["keep_rates"]) for e in evaluations]
    return f"{', '.join(map(str, counts))} of {len(evaluations[0]['keep_rates'])}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"


def _read_study(path: Path) -> dict[str, Any]:
    found = _json(path / "results.json")
    if found["missing"]:
        raise SystemExit(f"{path} lacks {', '.join(found['missing'])}: go on with it")
    return dict(found)


def _read_runs(paths: Sequence[Path]) -> dict[str, Any]:
    entries = [_read_run(path) for path in paths]
    configs = [entry.pop("config") for entry in entries]
    for entry, config in zip(entries, configs, strict=True):
        entry["seed"] = config.pop("seed")
    if any(config != configs[0] for config in configs):
        raise SystemExit("the runs differ in more than their seed")
    return {"recipe": configs[0]["recipe"], "config": configs[0], "runs": entries}


def _read_run(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json")
    # What is local is named for what it holds, not for where it lay.
    config["data"]["name"] = Path(config["data"]["name"]).name
    for field in ("start", "teacher"):
        config[field] = config.get(field) and Path(config[field]).name
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = []
    for line in map(json.loads, lines):
        if "evaluation" in line:
            result = line.pop("evaluation")
            line |= {key: result[key] for key in ("accuracy", "macs_fraction", "blocks_fraction")}
        curve.append({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()})
    return {
        "config": config,
        "environment": _json(path / "environment.json"),
        "results": _json(path / "results.json"),
        "curve": curve,
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _spread(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"collect": collect, "tables": tables})
