"""Compiled training: the same losses, no trace of the compiler in files, the same resume."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import metrics, tiny_config, weights

import skipnet
from skipnet import TrainConfig
from skipnet.data.loaders import TrainLoader

NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
    reason="torch.compile needs a C++ compiler",
)


def config_of(stage: str, **changes: Any) -> TrainConfig:
    config = tiny_config(stages=(stage,), log_every=1, checkpoint_seconds=1000, **changes)
    config.stage(stage).iterations = 4
    return config


@pytest.mark.slow  # compiles forward and backward
@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore")  # The compiler's own, which differ from version to version.
@pytest.mark.parametrize("stage", ["dense", "sp"])
def test_compiled_stages_train_alike_and_resume(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = skipnet.train(config_of(stage), output=tmp_path / "eager").path
    config = config_of(stage, compile=True)
    batch = TrainLoader.batch

    def stop_at_2(self: TrainLoader, step: int) -> Any:
        if step == 2 and not (tmp_path / "compiled" / "checkpoint.safetensors").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(TrainLoader, "batch", stop_at_2)
    with pytest.raises(skipnet.Interrupted):
        skipnet.train(config, output=tmp_path / "compiled")
    keys = list(weights(tmp_path / "compiled" / "checkpoint.safetensors"))
    assert keys and not any("_orig_mod" in key for key in keys)
    compiled = skipnet.train(config, resume=tmp_path / "compiled").path
    for one, other in zip(metrics(eager), metrics(compiled), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-2)
    file = f"{stage}.safetensors"
    assert list(weights(compiled / file)) == list(weights(eager / file))


def test_compile_has_no_effect_where_decisions_are_drawn(tmp_path: Path) -> None:
    plain = skipnet.train(config_of("hrl"), output=tmp_path / "plain").path
    with pytest.warns(UserWarning, match="compile has no effect on hrl: it draws decisions"):
        path = skipnet.train(config_of("hrl", compile=True), output=tmp_path / "run").path
    assert metrics(path) == metrics(plain)
    gumbel = config_of("sp", compile=True)
    gumbel.sp = replace(gumbel.sp, decide="gumbel")
    with pytest.warns(UserWarning, match="compile has no effect on sp"):
        skipnet.train(gumbel, output=tmp_path / "gumbel")
