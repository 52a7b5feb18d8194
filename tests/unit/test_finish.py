"""What is adjusted when a stage ends."""

import pytest
import torch
from torch import Tensor, nn

import skipnet
from skipnet import SkipNet, StaticGate
from skipnet.routing.gates import GateName
from skipnet.training.finish import land, recalibrate


def network() -> SkipNet:
    """Runs some blocks for some of the images, with statistics that are far off."""
    torch.manual_seed(0)
    model = skipnet.create("cifar_resnet20", gate="rnn")
    assert model.gate is not None
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.fill_(5.0)
                layer.running_var.fill_(9.0)
        model.gate.project.bias.zero_()
        _, routing = model.eval()(batches()[0])
        model.gate.project.bias.sub_(routing.logits.mean())
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(3)]


def test_statistics_are_means_over_the_rows_that_run() -> None:
    model = network()
    seen: dict[nn.Module, list[Tensor]] = {}
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = {norm: norm.running_mean.clone() for norm in norms}
    for norm in norms:
        norm.register_forward_hook(
            lambda layer, inputs, _: seen.setdefault(layer, []).append(inputs[0].detach())
        )
    recalibrate(model, batches())
    assert not model.training and all(not norm.training for norm in norms)
    rows = [len(x) for inputs in seen.values() for x in inputs]
    assert min(rows) < 16, "no block was skipped by any image: the test shows nothing"
    for norm in norms:
        if norm in seen:
            means = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen[norm]])
            torch.testing.assert_close(norm.running_mean, means.mean(dim=0))
        else:
            assert torch.equal(norm.running_mean, before[norm])
        assert norm.momentum == 0.1


def test_a_block_that_nothing_runs_keeps_its_statistics() -> None:
    model = network()
    assert model.gate is not None
    with torch.no_grad():
        model.gate.project.weight.zero_()
        model.gate.project.bias.fill_(-1.0)
    recalibrate(model, batches())
    means = [block.bn1.running_mean for block in model.blocks]  # type: ignore[union-attr]
    assert not (means[0] == 5.0).all()
    assert all((mean == 5.0).all() for mean in means[1:])


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_lands_on_the_target_from_above_and_below(gate: GateName, target: float) -> None:
    for keep in (0.01, 0.99):
        torch.manual_seed(0)
        model = skipnet.create("cifar_resnet20", gate=gate)
        assert model.gate is not None
        model.gate.set_keep_(keep)
        before = [p.clone() for p in model.parameters()]
        noise = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        many = [noise * torch.linspace(0.1, 3, 256).view(-1, 1, 1, 1)]
        said = land(model, many, target)
        assert model.training, "it trains on"
        _, routing = model.eval()(many[0])
        assert said == pytest.approx(routing.macs_fraction)
        assert said == pytest.approx(target, abs=0.02)
        changed = [
            name
            for (name, parameter), old in zip(model.named_parameters(), before, strict=True)
            if not torch.equal(parameter, old)
        ]
        assert changed and all(name.endswith("bias") and "gate" in name for name in changed)


def test_static_gates_land_on_the_nearest_block() -> None:
    model = skipnet.create("cifar_resnet20", gate="static")
    assert isinstance(model.gate, StaticGate)
    with torch.no_grad():
        model.gate.logits.copy_(torch.linspace(-1, 1, 8))
    many = [torch.randn(4, 3, 8, 8)]
    cost = model.cost(3, 8, 8)
    steps = [(cost.always + sum(cost.blocks[9 - k :])) / cost.dense for k in range(9)]
    said = land(model, many, 0.5)
    assert said == pytest.approx(min(steps, key=lambda step: abs(step - 0.5)))


def test_a_computation_that_is_near_enough_is_left_alone() -> None:
    model, many = network(), batches()
    now = sum(model(images)[1].macs_fraction for images in many) / 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert land(model, many, now + 0.001) == pytest.approx(now)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_computation_that_is_too_far_off_is_left_alone() -> None:
    model, many = network(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    now = sum(model(images)[1].macs_fraction for images in many) / 3
    assert land(model, many, now - 0.06, reach=0.05) == pytest.approx(now)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
