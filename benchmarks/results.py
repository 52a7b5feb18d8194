"""Turn run directories into the JSON that is kept, and the JSON into README's tables.

    python benchmarks/results.py collect RUN… --out benchmarks/<theme>_<hardware>_<date>.json
    python benchmarks/results.py tables          # writes the tables in README.md again

A table in README stands between `<!-- results: FILE -->` and `<!-- end -->`; a test holds it
against its file.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
STAGES = {"dense": "dense", "sp": "SkipNet, SP", "hrl": "SkipNet, SP + HRL"}
TABLE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path) -> None:
    """Write configuration, environment, results and curves of runs of one recipe to one file.

    Args:
        runs: Finished run directories that differ in their seed alone.
        out: The JSON file.
    """
    entries = [_read_run(path) for path in runs]
    configs = [entry.pop("config") for entry in entries]
    for entry, config in zip(entries, configs, strict=True):
        entry["seed"] = config.pop("seed")
    if any(config != configs[0] for config in configs):
        raise SystemExit("the runs differ in more than their seed")
    merged = {"recipe": configs[0]["recipe"], "config": configs[0], "runs": entries}
    out.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def tables() -> None:
    """Write README.md's tables again from their files."""
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """Return a Markdown text with its tables made again."""
    return TABLE.sub(lambda m: m[1] + table(ROOT / "benchmarks" / m[2]) + m[3], text)


def table(path: Path) -> str:
    """Return the Markdown table of a results file."""
    results = json.loads(path.read_text(encoding="utf-8"))
    lines = _times(results["cases"]) if "cases" in results else _trainings(results)
    environment = (results["runs"][0] if "runs" in results else results)["environment"]
    hardware, versions = environment["hardware"], environment["versions"]
    if "cases" in results:
        shown = f"seed {results['seed']}"
        used = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
        found = results["cases"][0]["versions"]
        engines = "".join(f", {title} {found[key]}" for key, title in used.items() if key in found)
    else:
        shown = f"seed {', '.join(str(run['seed']) for run in results['runs'])}"
        engines = ""
    lines += [
        "",
        f"`{results.get('recipe', 'skipnet benchmark')}`, {shown}; "
        f"{hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, torch "
        f"{versions['torch']}{engines}, commit {environment['commit']}, "
        f"{environment['time'][:10]} ([JSON](benchmarks/{path.name})).",
    ]
    return "\n".join(lines) + "\n"


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


def _ms(time: float | None) -> str:
    if time is None:  # An engine that could not be had.
        return ""
    return f"{time:.3g}" if time < 1000 else f"{time:.0f}"


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
        minutes = statistics.mean(run["results"][stage]["seconds"] for run in runs) / 60
        cells = [
            STAGES[stage],
            _spread([e["accuracy"] for e in evaluations]) + " %",
            _spread([e["accuracy"] for e in sampled]) + " %" if sampled else "",
            f"{statistics.mean(e['macs'] for e in evaluations) / 1e6:.1f}M",
            _spread([100 * e["macs_fraction"] for e in evaluations], 1) + " %",
            _spread([100 * e["blocks_fraction"] for e in evaluations], 1) + " %",
            _by_input(evaluations),
            f"{rate}",
            f"{minutes:.0f} min" if minutes >= 10 else f"{60 * minutes:.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _by_input(evaluations: list[dict[str, Any]]) -> str:
    """How many gates are open for 5 to 95 % of the images, a seed."""
    if not evaluations[0]["keep_rates"]:
        return ""
    counts = [sum(0.05 <= rate <= 0.95 for rate in e["keep_rates"]) for e in evaluations]
    return f"{', '.join(map(str, counts))} of {len(evaluations[0]['keep_rates'])}"


def _read_run(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json")
    # A local folder is named for what it holds, not for where it lay.
    config["data"]["name"] = Path(config["data"]["name"]).name
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
