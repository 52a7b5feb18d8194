"""What `skipnet sweep` and `skipnet ablations` share: arguments, and the way through a study."""

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from skipnet.commands.train import resume_argument
from skipnet.data.sources import load
from skipnet.errors import Interrupted, UserError
from skipnet.models.registry import Architecture
from skipnet.recipes import list_recipes, recipe
from skipnet.studies.children import Failure, places, run_children
from skipnet.studies.results import Results, collect, results_table
from skipnet.studies.study import Child, Settings, Study, study_of
from skipnet.studies.view import View
from skipnet.training.config import TrainConfig
from skipnet.training.train import demand_possible, network_info

Number = TypeVar("Number", int, float)


def read_arguments(
    command: Callable[..., Any],
    words: Sequence[str],
    example: str,
    lists: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Read `RECIPE [flags]`, or `--resume DIR`, which reads its configuration, and call a command.

    Args:
        command: Takes a configuration and keywords; its name is the command's.
        words: What stands after the command.
        example: Its last help line.
        lists: More names that its help explains, by title.
    """
    name = command.__name__
    if not words or words[0] in ("-h", "--help"):
        print(_usage(command, example, lists or {}))
        return
    if words[0].startswith("-"):
        resume, title = resume_argument(words), "--resume"
        if resume is None:
            raise UserError(
                f"{name} needs a recipe ({', '.join(list_recipes())}) or --resume DIR; see "
                f"skipnet {name} -h"
            )
        config = Study.read(resume).config
    else:
        config, title, words = recipe(words[0]), words[0], words[1:]

    def call(**arguments: Any) -> None:
        command(**arguments)

    # The same parameters, with the recipe's configuration as the default.
    signature = inspect.signature(command)
    parameters = [
        parameter.replace(default=config, kind=parameter.KEYWORD_ONLY)
        if parameter.name == "config"
        else parameter
        for parameter in signature.parameters.values()
    ]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=None
    )
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__doc__ = command.__doc__
    tyro.cli(call, prog=f"skipnet {name} {title}", args=words)


def numbers(name: str, text: str | None, kind: type[Number]) -> list[Number]:
    """Read numbers between commas; none if there is no text.

    Raises:
        UserError: When one is no number.
    """
    if text is None:
        return []
    found = []
    for word in text.split(","):
        try:
            found.append(kind(word))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise UserError(
                f"{name} are {what} with commas between, and {word.strip()!r} is none"
            ) from None
    return found


def words_of(text: str | None) -> list[str]:
    """Read names between commas; none if there is no text."""
    return [] if text is None else [word.strip() for word in text.split(",")]


def run_study(
    kind: str,
    config: TrainConfig,
    settings: Settings,
    lay_out: Callable[[TrainConfig, Settings], list[Child]],
    *,
    jobs: int | None,
    output: Path | None,
    resume: Path | None,
    draw: Callable[[Results, Path], list[Path]] | None = None,
) -> Results:
    """Make or go on with a study: run what is left, write results.json, show them.

    Args:
        kind: The command.
        config: What the runs share.
        settings: What is asked for.
        lay_out: Configuration and settings to runs.
        jobs: Runs at once.
        output: The directory; `runs/RECIPE-KIND` if None and `resume` is None.
        resume: The directory of a study that is there.
        draw: Makes plots of the results.

    Raises:
        UserError: On a mistake, or when a run failed; the others are kept.
        Interrupted: When stopped; the same command continues.
    """
    if resume is not None and output is not None:
        raise UserError("give --resume (a directory that is there) or --output, not both")
    console = Console(highlight=False)
    environments = places(config, jobs)
    path = resume or output or Path("runs") / f"{config.recipe}-{kind}"
    study = study_of(path, kind, config, settings)
    children = lay_out(study.config, study.settings)
    _demand_possible(study, children)
    with study.locked():
        done = sum(study.finished(child) is not None for child in children)
        with View(console, study, len(children), done) as view:
            view.say(f"{path}: {len(children)} runs, {done} of them finished already")
            outcome = run_children(
                study,
                children,
                environments=environments,
                view=view,
                finished=lambda: collect(study, children),
            )
        results = collect(study, children)
    if results["runs"]:
        console.print(results_table(results))
        console.print(f"Results: {path / 'results.json'}", soft_wrap=True, markup=False)
        _draw(console, results, path, draw)
    again = f"skipnet {kind} --resume {shlex.quote(str(path))}"
    if outcome.stopped:
        finished = len(children) - len(results["missing"])
        raise Interrupted(
            f"stopped with {finished} of {len(children)} runs finished; continue with: {again}"
        )
    if outcome.failures:
        _report(path, outcome.failures)
        raise UserError(
            f"{len(outcome.failures)} of {len(children)} runs failed, the others are kept: mend "
            f"the cause, and continue with: {again}"
        )
    return results


def _demand_possible(study: Study, children: Sequence[Child]) -> None:
    """Say before anything is trained what cannot be."""
    left = [child for child in children if study.finished(child) is None]
    for child in left:
        model = child.config.model
        Architecture(name=model.name, gate=model.gate).demand_known()
    if not left:
        return
    training_set, _ = load(study.config.data)
    shared = network_info(study.config, training_set)
    for child in left:
        begun = (study.path / child.name / "config.json").exists()
        try:
            model = child.config.model
            architecture = replace(shared.architecture, name=model.name, gate=model.gate)
            info = replace(shared, architecture=architecture)
            demand_possible(child.config, info, start=child.after is None and not begun)
        except UserError as error:
            raise UserError(f"{child.label}: {error}") from None


def _draw(
    console: Console,
    results: Results,
    path: Path,
    draw: Callable[[Results, Path], list[Path]] | None,
) -> None:
    if draw is None:
        return
    try:
        files = draw(results, path)
    except UserError as error:  # A plot is worth no failure: everything is in results.json.
        text = f"No plot: {error}; then run the same command again"
        console.print(text, soft_wrap=True, markup=False)
        return
    console.print(f"Plots: {', '.join(map(str, files))}", soft_wrap=True, markup=False)


def _report(path: Path, failures: Sequence[Failure]) -> None:
    for failure in failures:
        how = "did not begin" if failure.code is None else f"ended with exit code {failure.code}"
        print(f"\n{failure.name} {how}:", file=sys.stderr)
        for line in failure.text.splitlines():
            print(f"  {line}", file=sys.stderr)
        if failure.code is not None:
            print(f"  (log: {path / failure.name}.log)", file=sys.stderr)


def _usage(
    command: Callable[..., Any], example: str, lists: Mapping[str, Mapping[str, str]]
) -> str:
    name = command.__name__
    lines = [
        f"usage: skipnet {name} RECIPE [--field value …] [--output DIR]",
        f"       skipnet {name} --resume DIR",
        "",
        (command.__doc__ or "").split("\n")[0],
    ]
    for title, entries in lists.items():
        width = max(map(len, entries))
        lines += ["", f"{title}:", *(f"  {key:{width}s}  {text}" for key, text in entries.items())]
    return "\n".join(
        [
            *lines,
            "",
            "skipnet list recipes shows the recipes, and",
            f"skipnet {name} RECIPE --help every field with the recipe's value.  Example:",
            f"  {example}",
        ]
    )
