"""README's tables come from the JSON under benchmarks/, and that from run directories."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import skipnet
from skipnet.training.config import HybridConfig, ModelConfig, StageConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "least"), [("README.md", 3), ("benchmarks/README.md", 1)])
def test_tables_are_those_of_their_files(results: ModuleType, page: str, least: int) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(results.TABLE.findall(text)) >= least
    assert results.with_tables(ROOT / page) == text


def test_collected_runs_of_two_seeds_make_a_table_with_spread(
    results: ModuleType, tmp_path: Path
) -> None:
    short = StageConfig(iterations=2, batch_size=32)
    config = replace(
        skipnet.recipe("digits"),
        model=ModelConfig(name="cifar_resnet20", gate="rnn"),
        stages=("dense", "hrl"),
        dense=short,
        hrl=HybridConfig(iterations=2, batch_size=32),
        tensorboard=False,
    )
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, path in enumerate(runs):
        skipnet.train(replace(config, seed=seed), output=path)
    out = tmp_path / "digits_cpu_today.json"
    results.collect(tuple(runs), out=out)

    collected = json.loads(out.read_text(encoding="utf-8"))
    assert [run["seed"] for run in collected["runs"]] == [0, 1]
    accuracies = [run["results"]["dense"]["evaluation"]["accuracy"] for run in collected["runs"]]
    table = results.table(out, tmp_path)
    assert f"{sum(accuracies) / 2:.2f} ± " in table
    assert "seed 0, 1" in table


def test_runs_of_different_recipes_are_not_collected(results: ModuleType, tmp_path: Path) -> None:
    config = replace(
        skipnet.recipe("digits"),
        model=ModelConfig(name="cifar_resnet20", gate="rnn"),
        stages=("dense",),
        dense=StageConfig(iterations=1, batch_size=32),
        tensorboard=False,
    )
    skipnet.train(config, output=tmp_path / "one")
    skipnet.train(replace(config, log_every=7), output=tmp_path / "two")
    with pytest.raises(SystemExit, match="more than their seed"):
        results.collect((tmp_path / "one", tmp_path / "two"), out=tmp_path / "out.json")


def test_a_study_is_kept_whole_or_not_at_all(results: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    found = {"kind": "sweep", "runs": [], "missing": ["seed0/target-0.5"]}
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=r"lacks seed0/target-0\.5: go on with it"):
        results.collect((tmp_path,), out=tmp_path / "out.json")
    found["missing"] = []
    (tmp_path / "results.json").write_text(json.dumps(found))
    results.collect((tmp_path,), out=tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == found
