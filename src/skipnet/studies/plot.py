"""A sweep's plots: accuracy against computation, and how each run found its computation."""

import io
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipnet.errors import extras_named
from skipnet.files import write_atomically
from skipnet.studies.paper import DENSE, POINTS, data_set
from skipnet.studies.results import Results, by_label, mean_and_spread

if TYPE_CHECKING:  # of the extra `report`, which may be absent
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, told apart by all eyes, and greys.
OURS, PAPER = "#0072B2", "#D55E00"
INK, FAINT, GRID = "#333333", "#8A8A8A", "#E6E6E6"
# Of viridis: its bright end is not seen on white.
DARKEST, BRIGHTEST = 0.0, 0.78

# Paper's points further from ours than this many percent are told in words: they would press the
# curve into a line.
NEAR = 4.0

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.hashsalt": "skipnet",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write curve.png and path.png (where a run has a path), and .svg of both.

    Args:
        results: See `results.collect`; with at least one run.
        folder: Where to.

    Returns:
        The files.

    Raises:
        UserError: When matplotlib is not installed, or a file cannot be written.
    """
    with extras_named():
        import matplotlib

    files = []
    with matplotlib.rc_context(_STYLE):
        figures = {"curve": _curve(results)}
        routed = [
            run for run in results["runs"] if run["stage"] == "hrl" and len(run["path"]["step"]) > 1
        ]
        if routed:
            figures["path"] = _paths(results, routed)
        for name, figure in figures.items():
            for suffix in ("png", "svg"):
                stream = io.BytesIO()
                # No date, so that the same results give the same file.
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(stream, format=suffix, dpi=200, metadata=metadata)
                files.append(folder / f"{name}.{suffix}")
                write_atomically(files[-1], stream.getvalue())
    return files


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _title(axes: "Axes", text: str, detail: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", pad=22)
    axes.text(0, 1.025, detail, transform=axes.transAxes, color=FAINT, fontsize=8.5)


def _curve(results: Results) -> "Figure":
    """Accuracy against the share of dense multiply-adds."""
    figure = _figure(6.4, 4.4)
    axes = figure.subplots()
    groups = by_label(results["runs"])
    config = results["config"]
    points = [_point(runs) for runs in groups.values() if runs[0]["stage"] == "hrl"]
    points.sort()
    singles = [run for run in results["runs"] if run["stage"] == "hrl"]
    if len(singles) > len(points):
        axes.plot(
            [100 * run["evaluation"]["macs_fraction"] for run in singles],
            [run["evaluation"]["accuracy"] for run in singles],
            "o",
            color=OURS,
            alpha=0.35,
            markersize=4,
            markeredgewidth=0,
        )
    axes.errorbar(
        [x for x, *_ in points],
        [y for _, y, *_ in points],
        xerr=[dx for *_, dx, _ in points],
        yerr=[dy for *_, dy in points],
        color=OURS,
        marker="o",
        markersize=6,
        linewidth=1.8,
        elinewidth=1.0,
        zorder=3,
    )
    levels = [run["evaluation"]["accuracy"] for run in results["runs"] if run["stage"] != "sp"]
    shares = [100 * run["evaluation"]["macs_fraction"] for run in singles] or [100.0]
    sp = [_point(runs) for runs in groups.values() if runs[0]["stage"] == "sp"]
    if points:
        x, y, *_ = points[0]
        axes.annotate(
            "SkipNet",
            (x, y),
            (10, -2),
            textcoords="offset points",
            color=OURS,
            va="top",
            fontweight="bold",
        )
    dense = [run["evaluation"]["accuracy"] for run in results["runs"] if run["stage"] == "dense"]
    if dense:
        _level(axes, dense)
    low, high = (min(levels), max(levels)) if levels else (sp[0][1], sp[0][1])
    for x, y, *_ in sp:
        if low - NEAR <= y <= high + NEAR:
            axes.plot([x], [y], "D", color=OURS, markerfacecolor="white", markersize=6, zorder=4)
            _label(axes, "SP", x, y, OURS)
            levels.append(y)
            shares.append(x)
    far = _paper(axes, config, low, high, levels, shares)
    far += [f"SP: {y:.2f} % at {x:.0f} %" for x, y, *_ in sp if not low - NEAR <= y <= high + NEAR]
    if far:
        words = textwrap.fill("Off the scale: " + "; ".join(far) + ".", 105)
        figure.text(0.01, 0.01, words, color=FAINT, fontsize=8, va="bottom")
        foot = 0.04 * (1 + words.count("\n"))
        figure.set_layout_engine("constrained", rect=(0, foot, 1, 1 - foot))
    margin = max(0.3, 0.12 * (max(levels) - min(levels)))
    axes.set_ylim(min(levels) - margin, max(levels) + 1.3 * margin)
    axes.set_xlim(min(shares) - 6, max(102.0, *shares) + 2)
    axes.set_xlabel("computation, % of the dense network's multiply-adds")
    axes.set_ylabel("test accuracy, %")
    seeds = results["settings"]["seeds"]
    spread = f"mean ± std of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    model = config["model"]
    _title(
        axes,
        "Accuracy against computation",
        f"{model['name']}, gate {model['gate']}, {config['data']['name']}; thresholded; {spread}",
    )
    return figure


def _point(runs: Sequence[dict[str, Any]]) -> tuple[float, float, float, float]:
    """Computation and accuracy in percent, and their spreads."""
    x, dx = mean_and_spread([100 * run["evaluation"]["macs_fraction"] for run in runs])
    y, dy = mean_and_spread([run["evaluation"]["accuracy"] for run in runs])
    return x, y, dx, dy


def _level(axes: "Axes", dense: Sequence[float]) -> None:
    """The dense network's accuracy as a line, its spread as a band."""
    mean, spread = mean_and_spread(dense)
    axes.axhline(mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    if spread:
        axes.axhspan(mean - spread, mean + spread, color=FAINT, alpha=0.12, linewidth=0, zorder=0)
    axes.annotate(
        f"dense, trained alike  {mean:.2f}",
        (0.0, mean),
        (6, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=FAINT,
    )


def _paper(
    axes: "Axes",
    config: dict[str, Any],
    low: float,
    high: float,
    levels: list[float],
    shares: list[float],
) -> list[str]:
    """Draw the paper's points that are near ours; return the others in words."""
    key = config["model"]["name"], data_set(config["data"]["name"])
    far = []
    points = [(p.label, p.accuracy, 100 * p.share, p.counted) for p in POINTS.get(key, ())]
    if key in DENSE:
        points.append(("paper, dense", DENSE[key], 100.0, "MACs"))
    for label, accuracy, share, counted in points:
        unit = "of blocks" if counted == "blocks" else ""
        if not low - NEAR <= accuracy <= high + NEAR:
            at = f" at {share:.0f} % {unit}".rstrip() if share < 100 else ""
            far.append(f"{label}: {accuracy:.2f} %{at}")
            continue
        filled = PAPER if counted == "MACs" else "white"
        axes.plot([share], [accuracy], "s", color=PAPER, markerfacecolor=filled, markersize=6)
        _label(axes, f"{label}\n(% {unit})" if unit else label, share, accuracy, PAPER)
        levels.append(accuracy)
        shares.append(share)
    return far


def _label(axes: "Axes", text: str, x: float, y: float, color: str) -> None:
    axes.annotate(
        text,
        (x, y),
        (-7, 0),
        textcoords="offset points",
        color=color,
        ha="right",
        va="center",
        fontsize=8.5,
    )


def _paths(results: Results, runs: Sequence[dict[str, Any]]) -> "Figure":
    """Computation and alpha over the steps of every HRL run, a colour a target or alpha."""
    from matplotlib import colormaps

    figure = _figure(6.4, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    groups = by_label(runs)
    aims = {label: _aim(group[0]) for label, group in groups.items()}
    order = sorted(groups, key=lambda label: aims[label])
    shades = [
        DARKEST + (BRIGHTEST - DARKEST) * index / max(1, len(order) - 1)
        for index in range(len(order))
    ]
    colours = {
        label: colormaps["viridis"](shade) for label, shade in zip(order, shades, strict=True)
    }
    ends = []
    for label, group in groups.items():
        for run in group:
            path, colour = run["path"], colours[label]
            shares = [100 * share for share in path["macs_thresholded"]]
            upper.plot(path["step"], shares, color=colour, linewidth=1.3, alpha=0.85)
            lower.plot(path["step"], path["alpha"], color=colour, linewidth=1.3, alpha=0.85)
        if group[0]["target"] is not None:
            upper.axhline(
                100 * group[0]["target"], color=colours[label], linewidth=0.8, linestyle=(0, (1, 2))
            )
            end = 100 * group[0]["target"]
        else:
            end = statistics.mean(100 * run["path"]["macs_thresholded"][-1] for run in group)
        ends.append((end, label))
    # Labels at the right ends of the lines, from below, each clear of the one before.
    bottom, top = upper.get_ylim()
    apart, place = 0.055 * (top - bottom), -float("inf")
    for end, label in sorted(ends):
        place = max(end, place + apart)
        upper.annotate(
            _name(groups[label][0]),
            (1.0, place),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=colours[label],
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )
    targeted = all(run["target"] is not None for run in runs)
    _title(
        upper,
        "How each run found its computation",
        "thresholded decisions in HRL, each line a run"
        + ("; dotted: its target" if targeted else ""),
    )
    upper.set_ylabel("computation,\n% of dense multiply-adds")
    lower.set_ylabel("alpha, weight of skipping")
    lower.set_xlabel("optimizer steps of HRL")
    lower.set_xlim(0, max(run["path"]["step"][-1] for run in runs))
    figure.align_ylabels()
    return figure


def _aim(run: dict[str, Any]) -> tuple[int, float]:
    """What orders the colours: targets from low to high, alphas from high to low."""
    if run["target"] is not None:
        return 0, run["target"]
    return 1, -run["alpha"]


def _name(run: dict[str, Any]) -> str:
    return f"{100 * run['target']:g} %" if run["target"] is not None else f"alpha {run['alpha']:g}"
