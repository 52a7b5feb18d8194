"""Masked ≡ compacted ≡ portable ≡ optimised, and fused: class logits and decisions."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import (
    ENGINES,
    GATES,
    TORCH,
    Answers,
    Exported,
    assert_same,
    demand_compiler,
    edited,
    export_to,
    info_of,
    lively,
    made_lively,
    opened_either_way,
    resized,
    set_weight,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import skipnet
from skipnet import FFGateII, Fixed, InferenceSession, RNNGate, SkipNet, UserError
from skipnet.execution import export as export_module
from skipnet.execution.export import to_onnx
from skipnet.models.registry import Architecture

GET = Callable[..., Exported]
NUM_GATES = 8
BATCHES = (1, 2, 7, 64)
ROWS = np.arange(64)[:, None]
# None: the gates' own decisions.
MASKS: dict[str, np.ndarray | None] = {
    "no rows": np.zeros((64, NUM_GATES), bool),
    "all rows": np.ones((64, NUM_GATES), bool),
    "one row": np.arange(NUM_GATES) % 2 == ROWS,
    "some rows": np.random.default_rng(0).random((64, NUM_GATES)) < 0.5,
    "as the gates decide": None,
}
SIZE_PARAMS = [pytest.param("32 px", marks=pytest.mark.slow), "odd"]


@pytest.fixture(scope="module")
def masked(exported: GET) -> Callable[[str, str, str], Answers]:
    """What masked execution gives for 64 images."""

    @functools.cache
    def run(gate: str, size: str, mask: str) -> Answers:
        network = exported(gate, size)
        return network.run("masked", network.images(64), MASKS[mask])

    return run


@pytest.mark.parametrize("engine", ["compacted", "portable", "optimized"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZE_PARAMS)
@pytest.mark.parametrize("gate", GATES)
def test_engines_agree_with_masked_execution(
    gate: str, size: str, mask: str, batch: int, engine: str, exported: GET, masked: Callable
) -> None:
    network = exported(gate, size)
    images, forced = network.images(64)[:batch], MASKS[mask]
    answers = network.run(engine, images, None if forced is None else forced[:batch])
    expected = tuple(part[:batch] for part in masked(gate, size, mask))
    assert_same(answers, expected, network.certain(images) if forced is None else ...)
    if forced is not None:
        np.testing.assert_array_equal(answers[1], forced[:batch])


@pytest.mark.parametrize("size", SIZE_PARAMS)
@pytest.mark.parametrize("gate", GATES)
def test_the_gates_of_these_tests_decide_one_way_and_the_other(
    gate: str, size: str, masked: Callable
) -> None:
    _, decisions = masked(gate, size, "as the gates decide")
    rates = decisions.mean(axis=0)
    assert 0.2 < decisions.mean() < 0.8
    assert ((rates > 0) & (rates < 1)).sum() >= 4
    # Blocks that change the shape are gated too.
    assert 0 < rates[[2, 5]].mean() < 1
    assert len(np.unique(decisions, axis=0)) >= 5


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("gate", GATES)
def test_any_mask_is_followed(gate: str, exported: GET, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=NUM_GATES, max_size=NUM_GATES)
    mask = np.array(data.draw(st.lists(row, min_size=1, max_size=6)))
    network = exported(gate)
    images = network.images(len(mask), seed=data.draw(st.integers(0, 5)))
    expected = network.run("masked", images, mask)
    for engine in ENGINES:
        assert_same(network.run(engine, images, mask), expected)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.tuples(st.integers(9, 40), st.integers(9, 40)), batch=st.integers(1, 5))
@pytest.mark.parametrize("gate", GATES)
def test_any_image_size_is_routed_alike(
    gate: str, size: tuple[int, int], batch: int, exported: GET, tmp_path: Path
) -> None:
    network = resized(exported(gate), size, tmp_path / "resized.onnx")
    images = network.images(batch)
    expected = network.run("masked", images)
    rows = (np.abs(network.gate_logits(images)) > 1e-5).all(axis=1)
    for engine in ("portable", "optimized"):
        assert_same(network.run(engine, images), expected, rows)


@pytest.mark.parametrize("gate", GATES)
def test_a_rows_answer_does_not_depend_on_its_batch(gate: str, exported: GET) -> None:
    network = exported(gate)
    images = network.images(7, seed=3)
    order = np.random.default_rng(1).permutation(7)
    for engine in ("portable", "optimized"):
        logits, decisions = network.run(engine, images)
        for rows in (order, [4], [6, 0], [2, 2, 2]):
            again = network.run(engine, images[rows])
            assert_same(again, (logits[rows], decisions[rows]))
            if engine == "optimized":
                np.testing.assert_array_equal(again[0], logits[rows])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("gate", GATES)
def test_threads_that_share_a_batch_change_no_bit(gate: str, threads: int, exported: GET) -> None:
    demand_compiler()
    network = exported(gate)
    session = InferenceSession(network.path, threads=threads)
    for batch in (1, 2, 7):
        images = network.images(batch, seed=5)
        logits, routing = session.run(images)
        expected = network.run("optimized", images)
        np.testing.assert_array_equal(logits, expected[0])
        np.testing.assert_array_equal(routing.decisions, expected[1])


@pytest.mark.parametrize("gate", GATES)
def test_multiply_adds_are_those_of_masked_execution(gate: str, exported: GET) -> None:
    network = exported(gate)
    images = network.images(7)
    with torch.inference_mode():
        _, expected = network.network(torch.from_numpy(images))
    for engine in ("portable", "optimized"):
        _, routing = network.session(engine).run(images)
        assert routing.cost == expected.cost
        assert routing.macs.tolist() == expected.macs.tolist()
        assert routing.macs_fraction == pytest.approx(expected.macs_fraction)
        assert routing.blocks_fraction == pytest.approx(expected.blocks_fraction)
        np.testing.assert_allclose(routing.keep_rates, expected.keep_rates.numpy(), rtol=1e-6)
        assert routing.logits.shape == (7, 0)


@pytest.mark.parametrize("engine", ["portable", "optimized"])
def test_the_file_says_what_it_was_exported_with(engine: str, exported: GET) -> None:
    network = exported("ff1")
    said, info = network.session(engine).info, network.info
    assert said.architecture == info.architecture.to_dict()
    assert (said.classes, said.mean, said.std) == (info.classes, info.mean, info.std)
    assert (said.image_size, said.results) == (info.image_size, info.results)
    assert said.cost == network.network.cost(3, *info.image_size)


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
@pytest.mark.parametrize("engine", ["portable", "optimized"])
def test_pixels_are_normalised_as_the_file_says(engine: str, gate: str, exported: GET) -> None:
    network = exported(gate)
    shape = network.images(4).shape
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (network.info.mean, network.info.std))
    expected = network.run(engine, ((pixels / 255 - mean) / std).astype(np.float32))
    logits, routing = network.session(engine).run(pixels)
    assert_same((logits, routing.decisions), expected)


def edge(gate: str, proto: onnx.ModelProto) -> None:
    """Let every logit be exactly 0."""
    names = ["gate/project"] if gate == "rnn" else []
    for i in range(1, NUM_GATES + 1):
        if gate != "rnn":
            names += [f"gate{i}/linear.weight", f"gate{i}/linear.bias"]
    for name in names:
        set_weight(proto, name, np.zeros_like)


@pytest.mark.parametrize(("threshold", "runs"), [(0.0, False), (-1e-30, True), (1e-30, False)])
@pytest.mark.parametrize("gate", GATES)
def test_a_logit_must_exceed_its_threshold(
    gate: str, threshold: float, runs: bool, exported: GET, tmp_path: Path
) -> None:
    network = exported(gate)

    def edit(proto: onnx.ModelProto) -> None:
        edge(gate, proto)
        for i in range(1, NUM_GATES + 1):
            set_weight(proto, f"gate{i}/threshold", lambda old: np.full_like(old, threshold))

    path = tmp_path / "edge.onnx"
    path.write_bytes(edited(network.path.read_bytes(), edit))
    images = network.images(3)
    expected = network.run("masked", images, np.full((3, NUM_GATES), runs))
    for optimize in (False, True):
        logits, routing = opened_either_way(path, optimize=optimize).run(images)
        assert_same((logits, routing.decisions), expected)


@pytest.mark.parametrize("engine", TORCH)
@pytest.mark.parametrize("gate", GATES)
def test_a_logit_of_exactly_zero_does_not_run_its_block(
    gate: str, engine: str, exported: GET
) -> None:
    network = copy.deepcopy(exported(gate).network)
    network.gate.scale_logits_(0)
    edge_case = Exported(network, exported(gate).info, Path())
    _, decisions = edge_case.run(engine, exported(gate).images(3))
    assert not edge_case.gate_logits(exported(gate).images(3)).any()
    assert not decisions.any()


@pytest.mark.slow
def test_forced_decisions_are_in_the_file(exported: GET, tmp_path: Path) -> None:
    network = exported("rnn")
    mask = np.random.default_rng(3).random((4, NUM_GATES)) < 0.5
    path = tmp_path / "forced.onnx"
    path.write_bytes(to_onnx(network.network, network.info, forced=mask).SerializeToString())
    images = network.images(4)
    expected = network.run("masked", images, mask)
    for optimize in (False, True):
        for threads in (1, 2):
            session = opened_either_way(path, optimize=optimize, threads=threads)
            logits, routing = session.run(images)
            assert_same((logits, routing.decisions), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_dense_network_is_run_as_it_is(training: bool, exported: GET, tmp_path: Path) -> None:
    dense = exported(None)
    images = dense.images(3)
    expected = dense.run("masked", images)
    session = InferenceSession(dense.path, threads=1, optimize=training)
    assert session.engine == "portable"
    logits, routing = session.run(images)
    assert_same((logits, routing.decisions), expected)
    assert routing.decisions.shape == (3, 0) and routing.blocks_fraction == 1
    assert routing.macs.tolist() == [dense.network.cost(3, 17, 23).dense] * 3


@pytest.mark.slow
def test_exporting_leaves_the_network_as_it_was(tmp_path: Path, exported: GET) -> None:
    known = exported("ff2")
    network = copy.deepcopy(known.network).train()
    before = copy.deepcopy(network.state_dict())
    skipnet.export(network, tmp_path / "model.onnx", known.info)
    assert all(module.training for module in network.modules())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # In evaluation mode or in training, the file is the one of evaluation.
    logits, routing = opened_either_way(tmp_path / "model.onnx").run(known.images(3))
    assert_same((logits, routing.decisions), known.run("masked", known.images(3)))


class OwnGate(skipnet.RNNGate):
    """A kind of gate that export knows nothing of."""

    def forward(self, index: int, features: Tensor, state: object) -> tuple[Tensor, object]:
        logit, state = super().forward(index, features, state)
        return -logit, state


class OtherGate(nn.Module):
    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, index: int, features: Tensor, state: None) -> tuple[Tensor, None]:
        return features.mean(dim=(1, 2, 3)), None


@pytest.mark.parametrize("kind", [OtherGate, OwnGate])
def test_a_gate_that_cannot_be_exported_is_refused(kind: type, exported: GET) -> None:
    network = copy.deepcopy(exported("rnn").network)
    network.gate = kind(network.gate.channels)
    with pytest.raises(UserError, match=f"cannot export gates of kind {kind.__name__}: use rnn"):
        to_onnx(network, exported("rnn").info)


def test_a_file_that_cannot_be_written_is_the_users_to_mend(
    exported: GET, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = exported("rnn")
    monkeypatch.setattr(export_module, "to_onnx", lambda model, info: onnx.load(network.path))
    (tmp_path / "folder.onnx").mkdir()
    for path in (tmp_path / "folder.onnx", tmp_path / "none" / "model.onnx"):
        with pytest.raises(UserError, match="cannot write"):
            skipnet.export(network.network, path, network.info)


class Block(nn.Module):
    """A block that need not end as ONNX Runtime can fuse it into its last convolution."""

    def __init__(self, channels: int, width: int, stride: int, fusible: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.fusible = fusible

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        y = self.conv2(self.norm(self.conv1(x)).relu()) + shortcut
        return y.relu() if self.fusible else functional.hardtanh(y) * torch.sigmoid(y)


def own_network(
    folder: Path, channels: int, fusible: tuple[bool, ...], project: int | None, gate: type
) -> Exported:
    """A network that is not of the registry, with a max-pool that may lose numbers.

    Args:
        folder: Where its file goes.
        channels: Of the features; twice as many after a projection.
        fusible: Of each block, whether its end can be part of its last convolution.
        project: Which block changes shapes.
        gate: Kind of gate.
    """
    torch.manual_seed(0)
    blocks, shortcuts, widths = [], [], []
    width = channels
    for index, end in enumerate(fusible):
        wider = 2 * width if index == project else width
        blocks.append(Block(width, wider, 2 if index == project else 1, end))
        shortcut = nn.Conv2d(width, wider, 1, 2) if index == project else nn.Identity()
        shortcuts.append(shortcut)
        widths.append(wider)
        width = wider
    network = SkipNet(
        stem=nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        ),
        blocks=blocks,
        shortcuts=shortcuts,
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)),
        gate=gate(widths[:-1]),
    )
    kind = "rnn" if gate is RNNGate else "ff2"
    info = info_of(Architecture(name="own", gate=kind, num_classes=4), (32, 24))
    return export_to(folder, made_lively(network, 3, (32, 24)), info)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Blocks whose outputs are exchanged with their bypasses, not added to them in place."""
    folder = tmp_path_factory.mktemp("unfused")
    return own_network(folder, 16, (False,) * 4, None, RNNGate)


def all_masks(num_gates: int) -> np.ndarray:
    return (np.arange(2**num_gates)[:, None] >> np.arange(num_gates) & 1).astype(bool)


def assert_engines_agree(network: Exported, masks: np.ndarray, engines: tuple[str, ...]) -> None:
    images = network.images(len(masks))
    expected, own = network.run("masked", images, masks), network.run("masked", images)
    rows = network.certain(images)
    for engine in engines:
        assert_same(network.run(engine, images, masks), expected)
        assert_same(network.run(engine, images), own, rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_that_is_not_fused_takes_the_place_of_its_bypass(
    engine: str, unfused: Exported
) -> None:
    assert_engines_agree(unfused, all_masks(3), (engine,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusible", "channels"),
    [((True, False, True, False, True), 16), ((False, True) * 2, 6)],
    ids=str,
)
def test_blocks_of_different_layouts_are_right_or_not_optimised(
    fusible: tuple[bool, ...], channels: int, tmp_path: Path
) -> None:
    network = own_network(tmp_path, channels, fusible, 2, FFGateII)
    masks = all_masks(len(fusible) - 1)
    engine = opened_either_way(network.path).engine
    assert_engines_agree(network, masks, (*ENGINES[:3], engine))


@pytest.mark.parametrize("engine", ["portable", "optimized"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pixel=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 31), st.integers(0, 23)),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
@example(pixel=(1, 0, 0, 0), value=np.nan)
@example(pixel=(2, 1, 31, 23), value=np.inf)
def test_a_number_that_is_none_is_never_lost_on_the_way(
    engine: str, pixel: tuple[int, ...], value: float, unfused: Exported
) -> None:
    images = unfused.images(3)
    images[pixel] = value
    with pytest.raises(UserError, match=f"image {pixel[0]} of the batch holds NaN, infinity"):
        unfused.session(engine).run(images)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    architecture, size = Architecture(name="resnet18", gate="rnn", num_classes=7), (64, 64)
    folder = tmp_path_factory.mktemp("resnet18")
    return export_to(folder, lively(architecture, size), info_of(architecture, size))


@pytest.mark.slow
def test_a_resnet18_for_imagenet_is_routed_alike(resnet18: Exported) -> None:
    masks = np.concatenate([np.eye(7), 1 - np.eye(7), np.zeros((1, 7)), np.ones((1, 7))]) > 0
    assert_engines_agree(resnet18, masks, ENGINES)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["portable", "optimized"])
def test_projections_that_skip_pixels_do_not_hide_nan(engine: str, resnet18: Exported) -> None:
    for row in (0, 14, 33, 63):
        for column in (0, 14, 33, 63):
            images = resnet18.images(1)
            images[0, 1, row, column] = np.nan
            with pytest.raises(UserError, match="image 0 of the batch holds NaN"):
                resnet18.session(engine).run(images)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("execute", ["masked", "compacted"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gate", GATES)
def test_a_fused_network_computes_the_same(
    gate: str, mask: str, execute: str, exported: GET
) -> None:
    known = exported(gate)
    images, forced = torch.from_numpy(known.images(7)), MASKS[mask]
    decide = "threshold" if forced is None else Fixed(torch.from_numpy(forced[:7]))
    with torch.inference_mode():
        expected, before = known.network(images, decide=decide, execute=execute)
        actual, after = known.fused(images, decide=decide, execute=execute)
    assert torch.equal(after.decisions, before.decisions)
    assert_close(actual, expected)
    assert_close(after.logits, before.logits)
    assert after.macs.tolist() == before.macs.tolist()


@pytest.mark.parametrize("gate", [*GATES, None])
def test_a_fused_network_has_no_batch_norms_left(gate: str | None) -> None:
    network = skipnet.create("cifar_resnet20", gate=gate)
    fused = network.fuse()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    assert not any(module.training for module in fused.modules())


@pytest.mark.parametrize("gate", GATES)
def test_fusing_leaves_the_network_as_it_was(gate: str, exported: GET) -> None:
    network = copy.deepcopy(exported(gate).network).train()
    before = copy.deepcopy(network.state_dict())
    fused = network.fuse()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("execute", ["masked", "compacted"])
@pytest.mark.parametrize("gate", GATES)
def test_a_fused_network_runs_in_bfloat16(gate: str, execute: str, exported: GET) -> None:
    known = exported(gate)
    images, mask = torch.from_numpy(known.images(7)), MASKS["some rows"]
    decide = Fixed(torch.from_numpy(mask[:7]))
    with torch.inference_mode():
        expected, _ = known.network(images, decide=decide)
        with torch.autocast("cpu", torch.bfloat16):
            logits, routing = known.fused(images, decide=decide, execute=execute)
            _, free = known.fused(images, execute=execute)
    assert torch.isfinite(logits).all() and free.executed.shape == (7, NUM_GATES)
    np.testing.assert_array_equal(routing.executed.numpy(), mask[:7])
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("gate", GATES)
def test_the_metadata_are_json_without_surprises(gate: str, exported: GET) -> None:
    proto = onnx.load(exported(gate).path)
    (entry,) = proto.metadata_props
    values = json.loads(entry.value)
    assert values["format_version"] == 1 and values["architecture"]["gate"] == gate
    assert {node.domain for node in proto.graph.node} == {""}
    assert [entry.domain for entry in proto.opset_import] == [""]
