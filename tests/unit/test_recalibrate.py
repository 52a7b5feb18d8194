"""Running statistics estimated anew are those of the rows that run a block at inference."""

import torch
from torch import Tensor, nn

import skipnet
from skipnet import SkipNet
from skipnet.training.recalibrate import recalibrate


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
