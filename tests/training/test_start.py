"""A run that starts from another run's weights."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from harness import STAGES, Command, Trap, flags, metrics, run_command, tiny_config, weights

import skipnet
from skipnet import TrainConfig, UserError, train
from skipnet.models.weights import load, save
from skipnet.training.config import StageName
from skipnet.training.run import RunDirectory
from skipnet.training.start import locate_start


def started(stage: StageName, start: Path | str) -> TrainConfig:
    """A stage whose steps are too small to move a weight."""
    config = tiny_config(stages=(stage,), start=Path(start))
    for optimizer in (config.dense.optimizer, config.sp.optimizer, config.hrl.optimizer):
        optimizer.lr = optimizer.gate_lr = 1e-30
        optimizer.weight_decay = 0.0
    config.hrl.sharpen_to, config.hrl.land = None, False
    for part in (config.dense, config.sp, config.hrl):
        part.ema_decay = None
    return config


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(path).items() if "running" not in name}


def without_statistics(path: Path, *, gates: bool = True) -> dict[str, torch.Tensor]:
    found = {k: v for k, v in parameters(path).items() if "num_batches" not in k}
    return {k: v for k, v in found.items() if gates or not k.startswith("gate.")}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other) and one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stage", "model"), [("dense", "dense"), ("sp", "dense"), ("hrl", "sp")])
def test_a_stage_takes_the_weights_of_the_one_before(
    digits_run: Path, tmp_path: Path, stage: StageName, model: StageName
) -> None:
    assert locate_start(digits_run, stage) == digits_run / f"{model}.safetensors"
    run = train(started(stage, digits_run), output=tmp_path / "run")
    gates = model != "dense"
    assert_equal(
        without_statistics(run.model_path(stage), gates=gates),
        without_statistics(digits_run / f"{model}.safetensors", gates=gates),
    )


def test_a_model_file_says_itself_which_weights(digits_run: Path, tmp_path: Path) -> None:
    file = digits_run / "hrl.safetensors"
    run = train(started("hrl", file), output=tmp_path / "run")
    assert_equal(without_statistics(run.model_path("hrl")), without_statistics(file))
    saved = RunDirectory.open(run.path)[1]
    assert saved.start == file, "the configuration survives the file"


def test_gates_are_new_where_the_weights_have_none(digits_run: Path, tmp_path: Path) -> None:
    """As new as those of a run without a start: the seed's."""
    run = train(started("sp", digits_run), output=tmp_path / "run")
    fresh_config = started("sp", digits_run)
    fresh_config.start = None
    fresh = train(fresh_config, output=tmp_path / "fresh")

    def gates(run: RunDirectory) -> dict[str, torch.Tensor]:
        tensors = weights(run.model_path("sp"))
        return {name: tensor for name, tensor in tensors.items() if name.startswith("gate.")}

    assert_equal(gates(run), gates(fresh))


def test_the_next_stage_follows_the_run_s_own(digits_run: Path, tmp_path: Path) -> None:
    """Only the first stage starts elsewhere."""
    config = started("sp", digits_run)
    config.stages = ("sp", "hrl")
    run = train(config, output=tmp_path / "run")
    assert_equal(
        without_statistics(run.model_path("hrl")), without_statistics(run.model_path("sp"))
    )
    assert any(
        not torch.equal(value, weights(digits_run / "sp.safetensors")[name])
        for name, value in without_statistics(run.model_path("hrl")).items()
    )


def test_hrl_from_a_start_is_hrl_in_one_run(digits_run: Path, tmp_path: Path) -> None:
    """Bit for bit: what a sweep trains from one SP run is what each run of its own would have."""
    run = train(tiny_config(stages=("hrl",), start=digits_run), output=tmp_path / "run")
    assert_equal(weights(run.model_path("hrl")), weights(digits_run / "hrl.safetensors"))
    assert metrics(run.path) == [line for line in metrics(digits_run) if line["stage"] == "hrl"]


def test_a_killed_run_continues_without_its_start(digits_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    file.write_bytes((digits_run / "sp.safetensors").read_bytes())
    words = flags(tiny_config(stages=("hrl",), start=file))
    batch = "skipnet.data.loaders:TrainLoader.batch"
    killed = Command(
        ("train", "digits", *words, "--output", "run"), tmp_path, before=[Trap(batch, 4)]
    )
    assert killed.wait() < 0
    file.unlink()
    run_command("train", "--resume", "run", folder=tmp_path, name="resumed-")
    assert_equal(
        weights(tmp_path / "run" / "hrl.safetensors"), weights(digits_run / "hrl.safetensors")
    )


def refused(config: TrainConfig, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(caught.value)


class TestRefused:
    """Before anything is made."""

    def test_nothing_there(self, tmp_path: Path) -> None:
        message = refused(started("hrl", tmp_path / "none"), tmp_path)
        assert message == (
            f"there is no run directory or model file {tmp_path / 'none'} to start from (skipnet "
            "list runs and skipnet list weights show what there is)"
        )

    def test_no_run_directory(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        assert "no run directory" in refused(started("hrl", tmp_path / "folder"), tmp_path)

    def test_a_run_without_the_stage(self, cifar_run: Path, tmp_path: Path) -> None:
        message = refused(started("dense", cifar_run), tmp_path)
        assert "has no finished stage dense that dense could start from" in message

    def test_other_network(self, digits_run: Path, tmp_path: Path) -> None:
        config = started("hrl", digits_run)
        config.model.name = "tiny_plain"
        assert "its network is tiny_resnet, not tiny_plain" in refused(config, tmp_path)

    def test_other_gate(self, digits_run: Path, tmp_path: Path) -> None:
        config = started("hrl", digits_run)
        config.model.gate = "ff1"
        assert "its gate is rnn, not ff1" in refused(config, tmp_path)

    def test_gates_for_a_dense_network(self, digits_run: Path, tmp_path: Path) -> None:
        message = refused(started("dense", digits_run / "sp.safetensors"), tmp_path)
        assert "its gate is rnn, not None" in message

    def test_other_data(self, cifar_run: Path, tmp_path: Path) -> None:
        message = refused(started("sp", cifar_run), tmp_path)
        assert "its number of channels is 3, not 1" in message
        assert "its classes are airplane, automobile, bird … (10), not 0, 1, 2 … (10)" in message

    def test_other_normalisation(self, digits_run: Path, tmp_path: Path) -> None:
        network, info = load(digits_run / "sp.safetensors")
        info.mean = (info.mean[0] + 0.01,)
        save(network, tmp_path / "other.safetensors", info)
        message = refused(started("hrl", tmp_path / "other.safetensors"), tmp_path)
        assert "normalised by mean" in message and "--data.mean" in message
        config = started("hrl", tmp_path / "other.safetensors")
        config.data.mean, config.data.std = info.mean, info.std
        assert train(config, output=tmp_path / "taken").finished("hrl")

    def test_no_model_file(self, tmp_path: Path) -> None:
        (tmp_path / "text.safetensors").write_text("no weights")
        message = refused(started("sp", tmp_path / "text.safetensors"), tmp_path)
        assert "truncated or not a safetensors file" in message


def test_configurations_hold_a_path_or_none(tmp_path: Path) -> None:
    config = skipnet.recipe("digits")
    assert config.start is None and set(config.stages) == set(STAGES)
    run = RunDirectory.create(started("sp", "a/run"), tmp_path / "run")
    assert RunDirectory.open(run.path)[1].start == Path("a/run")


class TestFromAnotherLibrary:
    """torchvision's ResNet-18, on digits in colour."""

    @staticmethod
    def config(stage: StageName, weights: Path | None = None) -> TrainConfig:
        config = started(stage, "")
        config.start = None
        config.data.channels = 3
        config.model = replace(
            config.model,
            name="torchvision/resnet18",
            gate="rnn",
            weights=None if weights is None else str(weights),
        )
        return config

    @staticmethod
    def without(tensors: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
        parts = ("running", "num_batches", *parts)
        return {k: v for k, v in sorted(tensors.items()) if not any(p in k for p in parts)}

    @pytest.mark.parametrize("classes", [10, 3])
    def test_weights_of_a_file(self, tmp_path: Path, classes: int) -> None:
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(num_classes=classes).state_dict()
        safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
        run = train(self.config("sp", tmp_path / "theirs.safetensors"), output=tmp_path / "run")
        network, info = load(run.model_path("sp"))
        assert (info.architecture.name, network.num_gates) == ("torchvision/resnet18", 7)
        new = ("fc",) if classes == 3 else ()
        torch.testing.assert_close(
            self.without(network.original_state_dict(), *new), self.without(theirs, *new)
        )
        assert len(network.original_state_dict()["fc.bias"]) == 10

    def test_from_dense(self, tmp_path: Path) -> None:
        config = self.config("dense")
        config.stages, config.from_dense = ("dense", "sp"), True
        run = train(config, output=tmp_path / "run")
        dense, sp = (load(run.model_path(name))[0] for name in ("dense", "sp"))
        torch.testing.assert_close(
            self.without(sp.original_state_dict()), self.without(dense.original_state_dict())
        )

    def test_weights_of_another_network(self, tmp_path: Path) -> None:
        theirs = torchvision.models.resnet34(num_classes=10).state_dict()
        safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
        message = refused(self.config("sp", tmp_path / "theirs.safetensors"), tmp_path)
        assert re.search(r"layer\d.*is left over; .* and \d+ more", message)

    def test_every_stage_that_would_start_anew_takes_the_weights(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(num_classes=10).state_dict()
        safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
        config = self.config("dense", tmp_path / "theirs.safetensors")
        config.stages = ("dense", "sp")
        run = train(config, output=tmp_path / "run")
        for name in config.stages:
            found = load(run.model_path(name))[0].original_state_dict()
            torch.testing.assert_close(self.without(found), self.without(theirs))

    def test_hrl_from_dense(self, tmp_path: Path) -> None:
        config = self.config("dense")
        config.stages, config.from_dense = ("dense", "hrl"), True
        run = train(config, output=tmp_path / "run")
        dense, hrl = (load(run.model_path(name))[0] for name in ("dense", "hrl"))
        torch.testing.assert_close(
            self.without(hrl.original_state_dict()), self.without(dense.original_state_dict())
        )

    def test_a_start_wins_and_says_how_images_are_normalised(self, tmp_path: Path) -> None:
        config = self.config("dense")
        config.data.mean, config.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        dense = train(config, output=tmp_path / "dense").path
        config = self.config("sp", tmp_path / "nothing.safetensors")
        config.start = dense
        run = train(config, output=tmp_path / "run")
        found, info = load(run.model_path("sp"))
        assert (info.mean, info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert RunDirectory.open(run.path)[1].data.mean == info.mean, "for a resume"
        torch.testing.assert_close(
            self.without(found.original_state_dict()),
            self.without(load(dense / "dense.safetensors")[0].original_state_dict()),
        )

    def test_a_start_of_other_blocks(self, tmp_path: Path) -> None:
        start = train(self.config("sp"), output=tmp_path / "start").path
        config = self.config("sp")
        config.start = start
        config.model = replace(config.model, blocks=(2, 3))
        assert "its choice of blocks is None, not (2, 3)" in refused(config, tmp_path)
