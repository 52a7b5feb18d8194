"""Executors agree with each other, and with a plain loop that takes every row alone."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import skipnet
from skipnet import Fixed, Random, Sample, SkipNet, StraightThrough
from skipnet.execution.compacted import _Gather, _Scatter, compacted
from skipnet.execution.masked import masked
from skipnet.execution.rows import gather_rows, scatter_rows

GATES = ("rnn", "ff1", "ff2")
EXECUTORS = ("masked", "compacted")
NUM_GATES = 8


def images_of(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Noise, of a different contrast and brightness an image."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)
    contrast, brightness = torch.randn(2, batch, 1, 1, 1, dtype=torch.float64, generator=generator)
    return contrast.exp() * noise + brightness


@functools.cache
def lively(gate: str | None) -> SkipNet:
    """A ResNet-20 in float64 whose gates disagree about images; do not change it."""
    torch.manual_seed(0)
    network = skipnet.create("cifar_resnet20", gate=gate).double()
    decide = Random(0.5, torch.Generator().manual_seed(0))
    for seed in range(3):
        _, routing = network(images_of(8, (8, 8), seed + 10), decide=decide)
    network.eval()
    if network.gate is not None:
        network.gate.scale_logits_(20)
        _, routing = network(images_of(8, (8, 8), 20), decide=decide)
        with torch.no_grad():
            if gate == "rnn":
                for embed in network.gate.embed:
                    embed.weight *= 4
                _, routing = network(images_of(8, (8, 8), 20), decide=decide)
                network.gate.project.bias -= routing.logits.mean()
            else:
                for unit, logits in zip(network.gate.units, routing.logits.T, strict=True):
                    unit.linear.bias[1] -= logits.mean()
    return network


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, variance, weight, bias = (
        v.view(1, -1, 1, 1) for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def basic_block(x: Tensor, shortcut: Tensor, block: nn.Module) -> Tensor:
    stride = block.conv1.stride
    x = batch_norm(functional.conv2d(x, block.conv1.weight, None, stride, 1), block.bn1).relu()
    return (
        batch_norm(functional.conv2d(x, block.conv2.weight, None, 1, 1), block.bn2) + shortcut
    ).relu()


def gate_logits(network: SkipNet) -> Iterator[float]:
    """A generator to send each gate's features to, one row at a time."""
    gate = network.gate
    hidden = cell = torch.zeros(10, dtype=torch.float64)
    logit = math.nan
    for index in range(network.num_gates):
        x = yield logit
        if hasattr(gate, "lstm"):
            embedded = gate.embed[index].weight @ x.mean(dim=(2, 3))[0] + gate.embed[index].bias
            four = gate.lstm.weight_ih @ embedded + gate.lstm.bias_ih
            four = four + gate.lstm.weight_hh @ hidden + gate.lstm.bias_hh
            into, forget, new, out = four.view(4, 10)
            cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
            hidden = out.sigmoid() * cell.tanh()
            logit = (gate.project.weight[0] @ hidden + gate.project.bias[0]).item()
        else:
            unit = gate.units[index]
            if unit.pool and min(x.shape[2:]) > 1:
                x = functional.max_pool2d(x, 2)
            for conv, norm in zip(unit.layers[0::3], unit.layers[1::3], strict=True):
                x = batch_norm(functional.conv2d(x, conv.weight, None, conv.stride, 1), norm).relu()
            pair = unit.linear.weight @ x.mean(dim=(2, 3))[0] + unit.linear.bias
            logit = (pair[1] - pair[0]).item()
    yield logit


def one_row(
    network: SkipNet, image: Tensor, mask: Sequence[int] | None = None
) -> tuple[Tensor, list[float], list[int]]:
    """Class logits, gate logits and decisions of one image; only its own blocks are computed."""
    stem = network.stem
    x = functional.conv2d(image[None], stem[0].weight, None, 1, 1)
    x = batch_norm(x, stem[1]).relu()
    gate = gate_logits(network)
    next(gate)
    logits, decisions = [], []
    for index, block in enumerate(network.blocks):
        run = True
        if index > 0:
            logits.append(gate.send(x))
            run = logits[-1] > 0 if mask is None else bool(mask[index - 1])
            decisions.append(int(run))
        shortcut = x
        if len(x[0]) != block.conv2.out_channels:
            conv, norm = network.shortcuts[index]
            shortcut = batch_norm(functional.conv2d(x, conv.weight, None, 2), norm)
        x = basic_block(x, shortcut, block) if run else shortcut
    linear = network.head[-1]
    return linear.weight @ x.mean(dim=(2, 3))[0] + linear.bias, logits, decisions


def assert_rows_alone(
    network: SkipNet, images: Tensor, batches: Sequence[int], mask: Tensor | None = None
) -> None:
    with torch.no_grad():
        rows = [
            one_row(network, image, None if mask is None else mask[row].tolist())
            for row, image in enumerate(images)
        ]
        classes, logits, decisions = (
            torch.stack([torch.as_tensor(row[part], dtype=torch.float64) for row in rows])
            for part in range(3)
        )
        for batch in batches:
            for execute in EXECUTORS:
                decide = "threshold" if mask is None else Fixed(mask[:batch])
                out, routing = network(images[:batch], decide=decide, execute=execute)
                assert torch.equal(routing.decisions, decisions[:batch])
                torch.testing.assert_close(routing.logits, logits[:batch], rtol=1e-8, atol=1e-8)
                torch.testing.assert_close(out, classes[:batch], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (4, 4)], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_every_row_goes_the_way_it_goes_alone(gate: str, size: tuple[int, int]) -> None:
    assert_rows_alone(lively(gate), images_of(7, size), batches=(1, 2, 7))


@pytest.mark.parametrize("gate", GATES)
def test_every_row_goes_the_way_it_goes_alone_at_the_size_of_cifar(gate: str) -> None:
    assert_rows_alone(lively(gate), images_of(3, (32, 32)), batches=(3,))


@pytest.mark.parametrize("gate", GATES)
def test_the_network_of_these_tests_decides_one_way_and_the_other(gate: str) -> None:
    _, routing = lively(gate)(images_of(16, (8, 8)))
    assert 0.2 < routing.decisions.mean() < 0.8
    assert ((routing.keep_rates > 0) & (routing.keep_rates < 1)).sum() >= 3


MASKS = {
    "none": torch.zeros(7, NUM_GATES),
    "all": torch.ones(7, NUM_GATES),
    "one": torch.eye(NUM_GATES)[:7],
    "one row runs all": torch.eye(7)[:, 3:4].expand(7, NUM_GATES),
    "some": (torch.arange(7 * NUM_GATES) % 3 == 0).view(7, NUM_GATES),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gate", GATES)
def test_forced_rows_go_their_way(gate: str, mask: Tensor) -> None:
    assert_rows_alone(lively(gate), images_of(7, (8, 8)), batches=(1, 2, 7), mask=mask)


@functools.cache
def single_precision(gate: str) -> SkipNet:
    return copy.deepcopy(lively(gate)).float()


def gradients(network: SkipNet) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in network.named_parameters()
    }


@settings(max_examples=15, deadline=None)
@given(
    gate=st.sampled_from(GATES),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mask=st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=5),
)
def test_masked_and_compacted_give_the_same_outputs(
    gate: str, size: tuple[int, int], mask: list[list[bool]]
) -> None:
    images = images_of(len(mask), size).float()
    with torch.no_grad():
        outputs = [
            single_precision(gate)(images, decide=Fixed(torch.tensor(mask)), execute=execute)
            for execute in EXECUTORS
        ]
    (first, one), (second, other) = outputs
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(one.decisions, other.decisions) and torch.equal(one.macs, other.macs)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_and_compacted_give_the_same_gradients(mask: Tensor) -> None:
    found = []
    for execute in EXECUTORS:
        network = copy.deepcopy(lively("rnn"))
        images = images_of(7, (8, 8)).requires_grad_()
        logits, routing = network(images, decide=Fixed(mask), execute=execute)
        (logits.square().sum() + routing.logits.square().sum()).backward()
        found.append(gradients(network) | {"images": images.grad})
    assert found[0]["images"].abs().sum() > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_executors_draw_the_same_samples(gate: str) -> None:
    first, second = (
        lively(gate)(
            images_of(5, (8, 8)),
            decide=Sample(torch.Generator().manual_seed(1)),
            execute=execute,
        )
        for execute in EXECUTORS
    )
    assert torch.equal(first[1].decisions, second[1].decisions)
    torch.testing.assert_close(first[0], second[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gate", GATES)
def test_executors_agree_under_mixed_precision(gate: str) -> None:
    mask = torch.rand(6, NUM_GATES, generator=torch.Generator().manual_seed(0)) < 0.5
    images = images_of(6, (8, 8)).float()
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (
            single_precision(gate)(images, decide=Fixed(mask), execute=execute)[0].float()
            for execute in EXECUTORS
        )
    torch.testing.assert_close(first, second, rtol=0.05, atol=0.05 * first.abs().max().item())


@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("gate", GATES)
def test_empty_batch_gives_empty_answers(gate: str, execute: str) -> None:
    logits, routing = lively(gate)(images_of(0, (8, 8)), execute=execute)
    assert logits.shape == (0, 10) and routing.decisions.shape == (0, NUM_GATES)


class RowsSeen:
    """Counts the calls of modules and the rows they got, through forward hooks."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.rows: list[list[int]] = [[] for _ in modules]
        for module, seen in zip(modules, self.rows, strict=True):
            module.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(len(args[0]))
            )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", GATES)
def test_compacted_calls_a_block_on_its_rows_only(gate: str, training: bool) -> None:
    network = copy.deepcopy(lively(gate)).train(training)
    network.cost(3, 8, 8)
    mask = (torch.arange(7 * NUM_GATES) % 3 == 0).view(7, NUM_GATES).int()
    mask[:, 2], mask[:, 5] = 0, 1
    blocks, shortcuts = RowsSeen(network.blocks), RowsSeen(network.shortcuts)
    network(images_of(7, (8, 8)), decide=Fixed(mask), execute="compacted")
    assert blocks.rows == [[7], *([n] if n else [] for n in mask.sum(dim=0).tolist())]
    assert shortcuts.rows == [[7]] * 9


def test_masked_calls_every_block_on_every_row() -> None:
    network = copy.deepcopy(lively("rnn"))
    network.cost(3, 8, 8)
    blocks = RowsSeen(network.blocks)
    network(images_of(7, (8, 8)), decide=Fixed(torch.zeros(NUM_GATES)), execute="masked")
    assert blocks.rows == [[7]] * 9


def test_a_users_hook_sees_the_users_images_only() -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn").eval()
    devices = []
    network.blocks[0].register_forward_hook(
        lambda module, args, output: devices.append(output.device.type)
    )
    network(torch.zeros(3, 3, 8, 8))
    assert devices == ["cpu"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("execute", EXECUTORS)
def test_channels_last_stays_channels_last(execute: str, training: bool) -> None:
    network = copy.deepcopy(single_precision("ff1")).train(training)
    network.to(memory_format=torch.channels_last)
    kept = []
    for module in [*network.blocks[1:], network.head]:
        module.register_forward_pre_hook(
            lambda module, args: kept.append(
                args[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    network.cost(3, 16, 16)
    kept.clear()
    mask = (torch.arange(5 * NUM_GATES) % 3 == 0).view(5, NUM_GATES)
    images = images_of(5, (16, 16)).float().contiguous(memory_format=torch.channels_last)
    network(images, decide=Fixed(mask), execute=execute)
    assert kept == [True] * 9


def test_channels_last_gradients_stay_channels_last() -> None:
    features = torch.randn(5, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    gathered = _Gather.apply(features, torch.tensor([0, 3]))
    assert gathered.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(gathered, features, torch.ones_like(gathered))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("execute", EXECUTORS)
def test_weights_of_a_block_that_no_row_runs(execute: str) -> None:
    """Masked execution leaves zeros, compacted no gradient at all and no statistics."""
    network = copy.deepcopy(lively("rnn")).train()
    before = copy.deepcopy(network.state_dict())
    mask = torch.ones(4, NUM_GATES)
    mask[:, 4] = 0
    logits, _ = network(images_of(4, (8, 8)), decide=Fixed(mask), execute=execute)
    logits.sum().backward()
    grads = [parameter.grad for parameter in network.blocks[5].parameters()]
    after = network.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    skipped = {name for name in statistics if name.startswith("blocks.5.")}
    assert len(skipped) == 6
    if execute == "compacted":
        assert all(grad is None for grad in grads)
        assert changed == statistics - skipped
    else:
        assert all(grad is not None and not grad.any() for grad in grads)
        assert changed == statistics
    assert all(p.grad is not None for p in network.blocks[4].parameters())


@pytest.mark.parametrize("rows", [[2], [0, 3, 4]])
def test_compacted_batch_norms_learn_from_the_rows_that_run(rows: list[int]) -> None:
    network = copy.deepcopy(lively("rnn")).train()
    reference = copy.deepcopy(network)
    mask = torch.zeros(5, NUM_GATES)
    mask[rows, 0] = 1
    images = images_of(5, (8, 8))
    block_outputs = []
    network.blocks[1].register_forward_hook(lambda module, args, out: block_outputs.append(out))
    network.cost(3, 8, 8)
    block_outputs.clear()
    network(images, decide=Fixed(mask), execute="compacted")

    block, norm = reference.blocks[1], {}
    x = reference.stem(images)
    x = reference.blocks[0](x, x)[rows]
    for name in ("bn1", "bn2"):
        norm[name] = nn.BatchNorm2d(16).double()
        norm[name].load_state_dict(getattr(block, name).state_dict())
    hidden = norm["bn1"](functional.conv2d(x, block.conv1.weight, padding=1)).relu()
    expected = norm["bn2"](functional.conv2d(hidden, block.conv2.weight, padding=1)) + x
    torch.testing.assert_close(block_outputs[0], expected.relu(), rtol=1e-10, atol=1e-10)
    for name in ("bn1", "bn2"):
        for key, value in norm[name].state_dict().items():
            actual = getattr(network.blocks[1], name).state_dict()[key]
            torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-10, msg=f"{name}.{key}")


def lone_pixel() -> tuple[SkipNet, Tensor, Fixed]:
    """Maps of one pixel in the last stage, whose last block a single row runs."""
    mask = torch.ones(3, NUM_GATES)
    mask[1:, -1] = 0
    return copy.deepcopy(lively("rnn")).train(), images_of(3, (4, 4)), Fixed(mask)


def test_a_lone_row_of_one_pixel_is_normalised_by_the_running_statistics() -> None:
    network, images, mask = lone_pixel()
    block = network.blocks[8]
    before = copy.deepcopy(block)
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    network.cost(3, 4, 4)
    seen.clear()
    logits, _ = network(images, decide=mask, execute="compacted")
    ((x, shortcut, output),) = seen
    torch.testing.assert_close(output, basic_block(x, shortcut, before), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), before.buffers(), strict=True))
    assert all(module.training for module in network.modules())
    logits.sum().backward()
    assert block.conv1.weight.grad is not None


def test_a_lone_row_of_one_pixel_leaves_frozen_norms_frozen() -> None:
    network, images, mask = lone_pixel()
    network.blocks[8].bn1.eval()
    network(images, decide=mask, execute="compacted")
    assert not network.blocks[8].bn1.training and network.blocks[8].bn2.training


def test_a_lone_row_of_one_pixel_restores_training_after_an_error() -> None:
    block = nn.Sequential(nn.BatchNorm2d(2))
    with pytest.raises(TypeError):
        compacted(
            block, torch.zeros(2, 2, 1, 1), torch.ones(2, 2, 1, 1), torch.tensor([True, False])
        )
    assert block[0].training


def test_gather_is_indexing_with_its_gradient_and_the_gradient_of_that() -> None:
    features = torch.randn(5, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    for rows in ([0], [4, 1], [0, 1, 2, 3, 4]):
        index = torch.tensor(rows)
        assert torch.equal(_Gather.apply(features, index), features[index])

        def gather(x: Tensor, index: Tensor = index) -> Tensor:
            return _Gather.apply(x, index).square()

        assert torch.autograd.gradcheck(gather, (features,))
        assert torch.autograd.gradgradcheck(gather, (features,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scatter_is_writing_with_its_gradient(layout: torch.memory_format) -> None:
    like = {"dtype": torch.float64, "requires_grad": True}
    features = torch.randn(5, 2, 3, 2, **like).to(memory_format=layout)
    for rows in ([0], [4, 1], [0, 1, 2, 3, 4]):
        index = torch.tensor(rows)
        values = torch.randn(len(rows), 2, 3, 2, **like).to(memory_format=layout)

        def scatter(x: Tensor, y: Tensor, index: Tensor = index) -> Tensor:
            return _Scatter.apply(x, index, y).square()

        expected = features.detach().clone()
        expected[index] = values.detach()
        assert torch.equal(_Scatter.apply(features, index, values), expected)
        assert torch.autograd.gradcheck(scatter, (features, values))
        assert torch.autograd.gradgradcheck(scatter, (features, values))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.3]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_merge_has_the_gradient_of_its_formula(
    layout: torch.memory_format, weights: list[float]
) -> None:
    """Also where every row runs, which is merged without a pass over memory."""
    features = torch.randn(3, 2, 2, 3, dtype=torch.float64).to(memory_format=layout)
    g = torch.tensor(weights, dtype=torch.float64)
    inputs = (features.requires_grad_(), g.requires_grad_())

    def merge(x: Tensor, g: Tensor) -> Tensor:
        return masked(lambda x, shortcut: torch.tanh(x) + shortcut, x, x, g)  # type: ignore[arg-type]

    def formula(x: Tensor, g: Tensor) -> Tensor:
        g = g.view(-1, 1, 1, 1)
        return g * (torch.tanh(x) + x) + (1 - g) * x

    torch.testing.assert_close(merge(*inputs), formula(*inputs))
    upstream = torch.randn(3, 2, 2, 3, dtype=torch.float64)
    ours = torch.autograd.grad(merge(*inputs), inputs, upstream)
    theirs = torch.autograd.grad(formula(*inputs), inputs, upstream)
    torch.testing.assert_close(ours, theirs)


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + shortcut)


class Given:
    """The decisions that a test gives, any weights between 0 and 1."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        return self.weights[:, index]

    def binary(self, training: bool) -> bool:
        return False


def tiny() -> SkipNet:
    torch.manual_seed(0)
    return SkipNet(
        stem=nn.Conv2d(3, 2, 3, padding=1, bias=False),
        blocks=[TinyBlock() for _ in range(3)],
        shortcuts=[nn.Identity() for _ in range(3)],
        head=nn.Sequential(nn.Flatten(), nn.Linear(8, 2)),
        gate=skipnet.RNNGate((2, 2), hidden=3),
    ).double()


def test_masked_output_is_the_weighted_sum_of_equation_1() -> None:
    block = TinyBlock().double()
    x = torch.randn(4, 2, 3, 2, dtype=torch.float64)
    shortcut = torch.randn_like(x)
    g = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    out, whole = masked(block, x, shortcut, g), block(x, shortcut)
    for row, weight in enumerate(g.tolist()):
        expected = weight * whole[row] + (1 - weight) * shortcut[row]
        torch.testing.assert_close(out[row], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[0], shortcut[0]) and torch.equal(out[3], whole[3])


def test_masked_gradient_through_decisions_images_and_weights() -> None:
    network = tiny()
    images = images_of(2, (2, 2)).requires_grad_()
    names = [name for name, _ in network.named_parameters() if not name.startswith("gate")]
    weights = torch.tensor([[0.2, 0.7], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)

    def run(weights: Tensor, images: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            network, named, (images,), {"decide": Given(weights), "execute": "masked"}
        )[0]

    parameters = [network.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, (weights, images, *parameters), fast_mode=True)


def test_masked_gradient_of_soft_gates_reaches_every_gate_parameter() -> None:
    network = tiny().train()
    images = images_of(2, (2, 2))
    names = [name for name, _ in network.named_parameters() if name.startswith("gate")]

    def run(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(network, named, (images,), {"decide": "soft"})[0]

    parameters = [network.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, parameters, fast_mode=True)
    gradient = torch.autograd.grad(run(*parameters).square().sum(), parameters)
    assert all(part.abs().sum() > 0 for part in gradient)


class Recorded(StraightThrough):
    """Straight-through decisions that keep the gradient of the logit last seen."""

    def __call__(self, logit: Tensor, index: int, training: bool) -> Tensor:
        logit.retain_grad()
        self.logit = logit
        return super().__call__(logit, index, training)


def test_straight_through_gradient_is_that_of_equation_1_times_that_of_the_sigmoid() -> None:
    network = tiny().train()
    images = images_of(6, (2, 2))
    with torch.no_grad():
        network.gate.project.bias -= network(images)[1].logits[:, -1].mean()
    decide = Recorded()
    logits, routing = network(images, decide=decide)
    assert 0 < routing.decisions[:, -1].mean() < 1
    logits.square().sum().backward()
    weights = routing.decisions.detach().requires_grad_()
    again, _ = network(images, decide=Given(weights))
    assert torch.equal(logits, again)
    (gradient,) = torch.autograd.grad(again.square().sum(), weights)
    probability = torch.sigmoid(decide.logit)
    expected = gradient[:, -1] * probability * (1 - probability)
    assert (expected != 0).all()
    torch.testing.assert_close(decide.logit.grad, expected, rtol=1e-10, atol=1e-10)


def some_rows(network: SkipNet, batch: int) -> Fixed:
    """Decisions in which every gate has rows that run and rows that do not."""
    mask = torch.arange(batch)[:, None] + torch.arange(network.num_gates)
    return Fixed(mask % 3 > 0)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("execute", ["compacted", "auto"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inference_in_place_is_masked_execution(
    gate: str, batch: int, execute: str, memory_format: torch.memory_format
) -> None:
    network = copy.deepcopy(lively(gate)).to(memory_format=memory_format)
    images = images_of(batch, (9, 7)).to(memory_format=memory_format)
    before = images.clone()
    with torch.inference_mode():
        for decide in ("threshold", some_rows(network, batch)):
            expected, asked = network(images, decide=decide)
            actual, done = network(images, decide=decide, execute=execute)
            torch.testing.assert_close(actual, expected)
            assert torch.equal(done.decisions, asked.decisions)
    assert torch.equal(images, before)


@pytest.mark.parametrize("execute", ["compacted", "auto"])
def test_inference_in_bfloat16(execute: str) -> None:
    network = copy.deepcopy(lively("rnn")).float()
    images = images_of(7, (9, 7)).float()
    decide = some_rows(network, 7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, _ = network(images, decide=decide)
        actual, _ = network(images, decide=decide, execute=execute)
    torch.testing.assert_close(actual.float(), expected.float(), atol=0.05, rtol=0.05)


class Same(nn.Module):
    """A block that returns its bypass itself."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return shortcut


def test_inference_never_writes_into_the_images() -> None:
    blocks = [Same(), Same(), Doubled()]
    network = SkipNet(
        nn.Identity(), blocks, [nn.Identity()] * 3, nn.Flatten(), skipnet.RNNGate([3, 3])
    ).eval()
    images = torch.randn(4, 3, 2, 2)
    before = images.clone()
    with torch.no_grad():
        decide = Fixed(torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]]) > 0)
        logits, _ = network(images, decide=decide, execute="compacted")
    assert torch.equal(images, before)
    factors = torch.tensor([2.0, 2.0, 1.0, 1.0])[:, None]
    assert torch.equal(logits, factors * before.flatten(1))


class Doubled(nn.Module):
    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return 2 * shortcut


def test_what_a_hook_has_seen_stays_as_it_was() -> None:
    network = copy.deepcopy(lively("rnn"))
    seen: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    decide = Fixed(torch.arange(2)[:, None].expand(2, NUM_GATES) > 0)
    with torch.inference_mode():
        network(images_of(2, (8, 8)), decide=decide, execute="compacted")
        kept = [tensor.clone() for tensor in seen]
        first = kept[0]
        # Row 0 skips everything after the first block.
        assert torch.equal(seen[0], first) and len(seen) == NUM_GATES + 1
        fresh: list[Tensor] = []
        network.blocks[0].register_forward_hook(lambda module, args, output: fresh.append(output))
        network(images_of(2, (8, 8)), decide="threshold", execute="masked")
    torch.testing.assert_close(seen[0], fresh[0])


def test_auto_is_for_inference() -> None:
    network = copy.deepcopy(lively("rnn")).train()
    with pytest.raises(skipnet.UserError, match="for inference"):
        network(images_of(2, (8, 8)), execute="auto")


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    formats=st.tuples(*[st.sampled_from([torch.contiguous_format, torch.channels_last])] * 2),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_rows_are_gathered_and_scattered(
    shape: tuple[int, ...], formats: tuple, kind: torch.dtype, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), unique=True).map(sorted))
    index = torch.tensor(rows, dtype=torch.long)
    features = torch.randn(shape).to(kind, memory_format=formats[0])
    gathered = gather_rows(features, index)
    assert torch.equal(gathered, features[index])
    assert gathered.is_contiguous(memory_format=formats[0])
    values = torch.randn(len(rows), *shape[1:]).to(kind, memory_format=formats[1])
    expected = features.clone()
    expected[index] = values
    assert scatter_rows(features, index, values) is features
    assert torch.equal(features, expected)
