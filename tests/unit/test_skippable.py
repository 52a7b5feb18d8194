"""What can be said of a model that is taken apart, and what is refused."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import skipnet
from skipnet import Architecture, UserError
from skipnet.models.adapters import list_adapters, skippable
from skipnet.models.adapters.parts import Block, Parts, Whole, adapter
from skipnet.routing.gates import GateName


class Adding(nn.Module):
    """`x + f(x)`; a stride makes it another shape, with no projection for what is added."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).relu()
        return y if self.stride > 1 else x + y


class Own(nn.Module):
    """A network of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(Adding(4), Adding(4), Adding(4, 2), Adding(4), Adding(4, 2))
        self.top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(self.body(self.conv(x)))
        return logits


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_named_parts() -> None:
    """Blocks that change the shape always run: between others, and before the head."""
    model = Own().eval()
    network = skippable(model, stem=model.conv, blocks=list(model.body), head=model.top)
    logits, routing = network(images(), execute="compacted")
    torch.testing.assert_close(logits, model(images()))
    assert network.num_gates == 2 and routing.executed.all()
    none = torch.zeros(2, 2, dtype=torch.bool)
    logits, routing = network(images(), decide=skipnet.Fixed(none), execute="compacted")
    body = model.body
    expected = model.top(body[4](body[2](body[0](model.conv(images())))))
    torch.testing.assert_close(logits, expected)
    cost = network.cost(3, 16, 16)
    assert cost.shortcuts == (0, 0, 4 * 4 * 9 * 64), "what always runs is counted there"
    assert set(network.original_state_dict()) == set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[2, 5], [7], [1, 2, 3, 4, 5, 6, 7]])
def test_only_some_blocks(blocks: list[int]) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    network = skippable(model, blocks=blocks)
    assert network.num_gates == len(blocks)
    for execute in ("masked", "compacted"):
        torch.testing.assert_close(network(images(), execute=execute)[0], model(images()))
    assert network.cost(3, 16, 16).dense == skippable(model).cost(3, 16, 16).dense


@torch.no_grad()
def test_an_adapter_of_ones_own() -> None:
    class Mine(Own):
        pass

    @adapter(f"{Mine.__module__}.{Mine.__qualname__}")
    def mine(model: Mine) -> Parts:
        blocks = [Block(block=Whole(block)) for block in model.body]
        return Parts(stem=model.conv, blocks=blocks, head=model.top, input_size=(3, 16, 16))

    model = Mine().eval()
    torch.testing.assert_close(skippable(model)(images())[0], model(images()))


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2", "static", None])
@torch.no_grad()
def test_every_gate_starts_open(gate: GateName | None) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    network = skippable(model, gate)
    loud = 100 * torch.randn(8, 3, 32, 32)
    logits, routing = network(loud)
    assert routing.executed.all() and not network.training
    torch.testing.assert_close(logits, model(loud))


@torch.no_grad()
def test_a_model_in_half_precision() -> None:
    model = torchvision.models.resnet18(num_classes=5).bfloat16().eval()
    logits, routing = skippable(model)(images().bfloat16())
    assert torch.equal(logits, model(images().bfloat16())) and routing.executed.all()


def test_open_gates_learn() -> None:
    """They start open on every input, and not at a point without gradient."""
    model = torchvision.models.resnet18(num_classes=5)
    network = skippable(model)
    optimizer = torch.optim.SGD(network.gate.parameters(), lr=1.0)  # type: ignore[union-attr]
    before = network.eval()(images())[1].logits.detach()
    assert (before == before[0, 0]).all()
    for _ in range(3):
        network.train()(images(), decide="straight-through")[0].square().sum().backward()
        optimizer.step()
    after = network.eval()(images())[1].logits.detach()
    assert not torch.allclose(after[0], after[1]), "they see no input"


def test_multiply_adds_of_attention_that_pools() -> None:
    """Its query is a parameter, and a module's input."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", global_pool="map", img_size=32, depth=3, num_classes=5
    )
    cost = skippable(model).cost(3, 32, 32)
    assert cost.head > skippable(torchvision.models.resnet18(num_classes=5)).cost(3, 32, 32).head
    assert len(set(cost.blocks)) == 1 and len(cost.gates) == 2


class TestRefused:
    """Errors that say what to do."""

    def test_no_known_family(self) -> None:
        with pytest.raises(UserError, match="Own is of no known family: name its parts"):
            skippable(Own())
        assert "timm.models.convnext.ConvNeXt" in list_adapters()

    def test_parts_that_are_missing(self) -> None:
        model = Own()
        with pytest.raises(UserError, match="name all three parts"):
            skippable(model, stem=model.conv)

    def test_parts_of_another_model(self) -> None:
        model, other = Own(), Own()
        with pytest.raises(UserError, match=r"a block \(Adding\) has weights that are not"):
            skippable(model, stem=model.conv, blocks=list(other.body), head=model.top)

    def test_no_blocks(self) -> None:
        model = Own()
        with pytest.raises(UserError, match="Own has no residual blocks"):
            skippable(model, stem=model.conv, blocks=[], head=model.top)

    def test_nothing_to_skip(self) -> None:
        model = Own()
        with pytest.raises(UserError, match="no block of Own can be skipped"):
            skippable(model, stem=model.conv, blocks=[model.body[0]], head=model.top)

    @pytest.mark.parametrize("number", [0, 8, -1])
    def test_blocks_that_are_not_there(self, number: int) -> None:
        with pytest.raises(UserError, match=f"from 1 to 7, and {number} is not"):
            skippable(torchvision.models.resnet18(), blocks=[1, number])

    def test_numbers_where_modules_are_meant(self) -> None:
        model = Own()
        with pytest.raises(UserError, match="blocks are the modules themselves"):
            skippable(model, stem=model.conv, blocks=[1, 2], head=model.top)
        with pytest.raises(UserError, match="blocks of a known family are numbers"):
            skippable(torchvision.models.resnet18(), blocks=[model.body[0]])

    def test_parts_that_do_not_fit(self) -> None:
        model = Own()
        with pytest.raises(UserError, match="the parts do not fit together on an image of 3x224x2"):
            skippable(model, stem=model.top, blocks=list(model.body), head=model.conv)

    def test_a_variant_whose_forward_is_its_own(self) -> None:
        class Doubled(torchvision.models.ResNet):
            def forward(self, x: Tensor) -> Tensor:
                logits: Tensor = super().forward(x)
                return 2 * logits

        block = torchvision.models.resnet.BasicBlock
        with pytest.raises(UserError, match="the parts of Doubled compute something else"):
            skippable(Doubled(block, [1, 1, 1, 1]))

    def test_parts_that_leave_something_out(self) -> None:
        model = Own().train()
        with pytest.raises(UserError, match="the parts of Own compute something else"):
            skippable(model, stem=model.conv, blocks=list(model.body)[1:], head=model.top)
        assert all(module.training for module in model.modules())

    def test_no_logits_to_compare_with(self) -> None:
        class Pair(Own):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
                return super().forward(x), x

        model = Pair()
        with pytest.raises(UserError, match="Pair returns tuple, not logits"):
            skippable(model, stem=model.conv, blocks=list(model.body), head=model.top)

    def test_convolving_gates_for_tokens(self) -> None:
        with pytest.raises(UserError, match="gate ff1 convolves maps, and this network has tokens"):
            skippable(torchvision.models.VisionTransformer(32, 8, 2, 2, 8, 8), "ff1")


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["rnn", "ff1"])
@pytest.mark.parametrize("blocks", [(2, 5), (4, 7), (1, 2, 3)])
def test_exported_where_blocks_between_others_always_run(
    gate: GateName, blocks: tuple[int, ...], tmp_path: Path
) -> None:
    """Before the first gate, between gates of different widths, and before the head."""
    pytest.importorskip("onnxruntime")
    architecture = Architecture(
        name="torchvision/resnet18", gate=gate, num_classes=5, blocks=blocks
    )
    torch.manual_seed(1)
    network = architecture.build().eval()
    images = torch.randn(8, 3, 64, 64)
    assert network.gate is not None
    with torch.no_grad():
        for name, weight in network.gate.named_parameters():
            if name.endswith(("project.weight", "linear.weight")):
                nn.init.normal_(weight, std=2)
        network.gate.shift_logits_(-network(images)[1].logits.median().item())
        expected, decided = network(images)
    info = skipnet.ModelInfo(
        architecture=architecture,
        classes=tuple("abcde"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=(64, 64),
    )
    assert skipnet.export(network, tmp_path / "x.onnx", info) < 1e-4
    session = skipnet.InferenceSession(tmp_path / "x.onnx", optimize=False)
    logits, routing = session.run(images.numpy())
    sure = (decided.logits.abs() > 1e-4).all(dim=1).numpy()
    assert sure.any() and not decided.executed.all() and decided.executed.any()
    assert (routing.executed == decided.executed.numpy())[sure].all()
    assert abs(logits - expected.numpy())[sure].max() < 1e-4


def test_a_fused_copy_shares_nothing_with_the_model() -> None:
    network = skippable(torchvision.models.resnet18(num_classes=5)).eval()
    assert network.fuse().original_state_dict() == {} != network.original_state_dict()
