"""The dense CIFAR ResNet against one put together from torchvision's own basic blocks."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1

import skipnet


def torchvision_resnet(depth: int) -> nn.Module:
    """He et al. 2015, section 4.2, with projections where shapes change."""
    blocks, channels = [], 16
    for stage, width in enumerate((16, 32, 64)):
        for index in range((depth - 2) // 6):
            stride = 2 if stage and not index else 1
            downsample = None
            if stride == 2:
                downsample = nn.Sequential(conv1x1(channels, width, 2), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(channels, width, stride, downsample))
            channels = width
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(*blocks),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def with_our_weights(reference: nn.Module, network: skipnet.SkipNet) -> nn.Module:
    ours = network.state_dict()
    theirs = {}
    for name, tensor in reference.state_dict().items():
        part, rest = name.split(".", 1)
        own = {"0": "stem", "1": "blocks", "2": "head"}[part] + "." + rest
        if "downsample" in rest:
            own = own.replace("blocks", "shortcuts").replace("downsample.", "")
        assert ours[own].shape == tensor.shape
        theirs[name] = ours.pop(own)
    assert not [name for name in ours if not name.startswith("gate.")]
    reference.load_state_dict(theirs)
    return reference


@pytest.mark.parametrize("depth", [20, 38])
def test_dense_network_is_torchvisions_in_training_and_evaluation(depth: int) -> None:
    torch.manual_seed(0)
    network = skipnet.create(f"cifar_resnet{depth}").double()
    reference = with_our_weights(torchvision_resnet(depth).double(), network)
    images = torch.randn(3, 3, 12, 16, dtype=torch.float64)
    for training in (True, False):
        logits, _ = network.train(training)(images)
        expected = reference.train(training)(images)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    logits.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(
        network.stem[0].weight.grad, reference[0][0].weight.grad, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2"])
def test_routed_network_that_runs_every_block_is_the_dense_one(gate: str) -> None:
    torch.manual_seed(0)
    network = skipnet.create("cifar_resnet20", gate=gate).double().eval()
    reference = with_our_weights(torchvision_resnet(20).double(), network).eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    logits, _ = network(images, decide=skipnet.Fixed(torch.ones(8)))
    torch.testing.assert_close(logits, reference(images), rtol=1e-9, atol=1e-9)


def test_initial_weights_follow_he() -> None:
    torch.manual_seed(0)
    network = skipnet.create("cifar_resnet38")
    blocks = [b for b in network.blocks if b.conv1.weight.shape[:2] == (64, 64)]
    weights = torch.cat([b.conv1.weight.flatten() for b in blocks])
    # Normal with variance 2 / fan-out; the bound is five standard deviations of the estimate.
    expected = (2 / (64 * 9)) ** 0.5
    assert abs(weights.std().item() / expected - 1) < 5 / (2 * len(weights)) ** 0.5
    assert abs(weights.mean().item()) < 5 * expected / len(weights) ** 0.5
    for name, value in network.state_dict().items():
        if "bn" in name and name.endswith("weight"):
            assert (value == 1).all(), name
