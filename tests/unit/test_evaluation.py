"""Evaluation: what depends on the input, against scikit-learn's mutual information."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

import skipnet
from skipnet import Fixed
from skipnet.analysis.evaluate import class_information, evaluate
from skipnet.data.sources import ImageSet


def images(count: int = 40) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % 10, tuple("abcdefghij"))


def test_class_information_is_the_mutual_information() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (400,), generator=generator)
    executed = (
        torch.rand(400, 6, generator=generator) < torch.rand(6, 5, generator=generator)[:, labels].T
    )
    executed[:, 0], executed[:, 1], executed[:, 2] = True, False, labels < 2
    told = class_information(executed, labels)
    for gate in range(6):
        expected = mutual_info_score(labels.tolist(), executed[:, gate].tolist()) / math.log(2)
        assert told[gate].item() == pytest.approx(expected, abs=1e-12)
    assert told[:2].tolist() == [0, 0]


def test_what_is_said_of_a_known_policy() -> None:
    """Even images run gates 0 and 2, odd ones gate 2 alone; nobody runs another."""
    network, data = skipnet.create("cifar_resnet20", gate="rnn"), images()
    mask = torch.zeros(40, 8, dtype=torch.bool)
    mask[::2, 0] = mask[:, 2] = True
    result = evaluate(
        network, data, mean=(0.5,) * 3, std=(0.2,) * 3, decide=Fixed(mask), batch_size=40
    )
    cost = network.cost(3, 8, 8)
    one, two = cost.blocks[1], cost.blocks[3]
    assert result.macs == cost.always + two + one / 2
    assert result.macs_fraction == result.macs / cost.dense
    assert result.macs_spread == pytest.approx(one / 2 / cost.dense)
    assert result.keep_rates == [0.5, 0, 1, 0, 0, 0, 0, 0]
    assert result.gate_information == [1, 0, 0, 0, 0, 0, 0, 0]
    # Even images have even labels: gate 0 tells whether the class is one of five.
    assert result.class_information == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0])
    assert result.gates_by_input == 1
    assert result.num_paths == 2
    assert result.blocks_fraction == pytest.approx((1 + 1.5) / 9)


def test_a_dense_network_has_one_path() -> None:
    result = evaluate(
        skipnet.create("cifar_resnet20"), images(), mean=(0.5,) * 3, std=(0.2,) * 3, batch_size=7
    )
    assert (result.num_paths, result.gates_by_input, result.macs_spread) == (1, 0, 0)
    assert result.gate_information == result.class_information == []


def test_the_mode_of_the_network_is_restored_even_after_an_error() -> None:
    network = skipnet.create("cifar_resnet20").train()
    network.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        evaluate(network, images(), mean=(0.5,) * 3, std=(0.2,) * 3)
    assert network.training
