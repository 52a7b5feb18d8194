"""The inference session: bad input, damaged files, caches, compilers, threads, and no torch."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
from exported import (
    LARGEST,
    Answers,
    Exported,
    assert_same,
    demand_compiler,
    edit_metadata,
    edited,
    opened_either_way,
    opened_with_warning,
    set_weight,
    single_thread,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from skipnet import InferenceSession, UserError
from skipnet.execution import native

GET = Callable[..., Exported]
BOTH = pytest.mark.parametrize("engine", ["portable", "optimized"])
KINDS = pytest.mark.parametrize("gate", ["rnn", "ff1"])
SHAPE = (1, 17, 23)


@pytest.fixture
def copied(exported: GET, tmp_path: Path) -> Exported:
    """A file of a test's own, that no engine has been built for."""
    known = exported("rnn")
    shutil.copy(known.path, tmp_path / "model.onnx")
    return Exported(known.network, known.info, tmp_path / "model.onnx")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The compiler's work forgotten, on the disk and in this process."""
    monkeypatch.setenv("SKIPNET_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache"
    native.library.cache_clear()


def assert_right(session: InferenceSession, network: Exported) -> None:
    """The answers of masked execution, for three images and for one."""
    for images in (network.images(3), network.images(1, seed=1)):
        logits, routing = session.run(images)
        rows = network.certain(images)
        assert_same((logits, routing.decisions), network.run("masked", images), rows)


# ---- images ----


@BOTH
@pytest.mark.parametrize(
    ("images", "kind"),
    [
        ([[[[0.0]]]], "list"),
        (None, "NoneType"),
        (torch.zeros(1, *SHAPE), "torch.float32"),
        (np.zeros((1, *SHAPE)), "float64"),
        (np.zeros((1, *SHAPE), np.float16), "float16"),
        (np.zeros((1, *SHAPE), np.int64), "int64"),
        (np.zeros((1, *SHAPE), np.int8), "int8"),
        (np.zeros((1, *SHAPE), bool), "bool"),
        (np.zeros((1, *SHAPE), np.complex64), "complex64"),
        (np.zeros((1, *SHAPE), ">f4"), ">f4"),
        (np.zeros((1, *SHAPE), object), "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_numbers_than_float32_and_uint8_are_refused(
    engine: str, images: Any, kind: str, exported: GET
) -> None:
    with pytest.raises(UserError, match=f"must be a float32 or uint8 array, not {kind}$"):
        exported("rnn").session(engine).run(images)


@BOTH
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
@pytest.mark.parametrize(
    "shape",
    [
        (0, *SHAPE),
        SHAPE,
        (1, 1, *SHAPE),
        (2, 3, 17, 23),
        (2, 1, 23, 17),
        (2, 17, 23, 1),
        (1, 1, 17, 24),
        (1, 0, 17, 23),
        (391,),
        (),
    ],
    ids=str,
)
def test_another_shape_is_refused(
    engine: str, kind: type, shape: tuple[int, ...], exported: GET
) -> None:
    message = f"images must be of shape [batch, 1, 17, 23] with at least one row, not {[*shape]}"
    with pytest.raises(UserError, match=re.escape(message)):
        exported("rnn").session(engine).run(np.zeros(shape, kind))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    images=st.sampled_from([np.float32, np.uint8, np.float64]).flatmap(
        lambda kind: arrays.arrays(
            kind,
            st.tuples(
                st.integers(0, 2), st.integers(1, 2), st.integers(16, 18), st.integers(22, 24)
            ),
            fill=st.just(1),
            elements=st.integers(0, 200).map(kind),
        )
    )
)
@BOTH
def test_any_array_is_classified_or_refused(engine: str, images: np.ndarray, exported: GET) -> None:
    session = exported("rnn").session(engine)
    if len(images) and images.shape[1:] == SHAPE and images.dtype != np.float64:
        logits, routing = session.run(images)
        assert logits.shape == (len(images), 3) and np.isfinite(logits).all()
        assert routing.decisions.shape == (len(images), 8)
    else:
        with pytest.raises(UserError, match="images must be"):
            session.run(images)


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LARGEST])
def test_the_image_with_nan_or_infinity_is_named(engine: str, value: float, exported: GET) -> None:
    session, images = exported("rnn").session(engine), exported("rnn").images(4)
    images[2] = value
    with pytest.raises(UserError, match="image 2 of the batch holds NaN, infinity or far too"):
        session.run(images)
    with pytest.raises(UserError, match="image 0 of the batch"):
        session.run(images[2:3])
    # Nothing of it stays behind.
    assert_right(session, exported("rnn"))


@BOTH
def test_images_may_lie_in_memory_as_they_like(engine: str, exported: GET) -> None:
    network = exported("ff2")
    session, images = network.session(engine), network.images(6)
    expected = network.run(engine, images)
    before = images.copy()
    backwards = np.ascontiguousarray(images[::-1, :, ::-1])[::-1, :, ::-1]
    frozen = images.copy()
    frozen.setflags(write=False)
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    unaligned = np.frombuffer(b"\0" + images.tobytes(), np.uint8)[1:].view(np.float32)
    layouts = (np.asfortranarray(images), backwards, frozen, channels_last)
    for layout in (*layouts, unaligned.reshape(images.shape)):
        logits, routing = session.run(layout)
        np.testing.assert_array_equal(logits, expected[0])
        np.testing.assert_array_equal(routing.decisions, expected[1])
    assert_same(network.run(engine, images[::2]), (expected[0][::2], expected[1][::2]))
    np.testing.assert_array_equal(images, before)


@BOTH
def test_answers_are_the_callers_to_keep(engine: str, exported: GET) -> None:
    session, network = exported("rnn").session(engine), exported("rnn")
    logits, routing = session.run(network.images(1))
    kept = logits.copy(), routing.decisions.copy()
    for seed in range(1, 4):
        session.run(network.images(1, seed))
    np.testing.assert_array_equal(logits, kept[0])
    np.testing.assert_array_equal(routing.decisions, kept[1])


# ---- options ----


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(threads: int, exported: GET) -> None:
    with pytest.raises(UserError, match=f"threads must be at least 1, not {threads}"):
        InferenceSession(exported("rnn").path, threads=threads)


@pytest.mark.parametrize(
    ("providers", "named"),
    [
        (["NoSuchProvider"], "NoSuchProvider"),
        (["CPUExecutionProvider", "Gpu"], "Gpu"),
        ([], "of no name"),
    ],
)
def test_providers_are_those_there_are(providers: list[str], named: str, exported: GET) -> None:
    with pytest.raises(UserError, match=f"no provider {named}: use some of .*CPUExecutionProvider"):
        InferenceSession(exported("rnn").path, providers=providers)


def test_the_cpu_by_name_is_optimised_too(exported: GET) -> None:
    demand_compiler()
    path = str(exported("rnn").path)
    session = InferenceSession(path, threads=1, providers=["CPUExecutionProvider"])
    assert session.engine == "optimized"


# ---- files ----


@pytest.mark.parametrize("name", ["none.onnx", "none/model.onnx", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match=re.escape(f"there is no ONNX file {path}")):
        InferenceSession(path)


def foreign() -> bytes:
    """A model that is right, but none of ours."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["images"], ["logits"])],
        "relu",
        [value("images", TensorProto.FLOAT, ["batch", *SHAPE])],
        [value("logits", TensorProto.FLOAT, ["batch", *SHAPE])],
    )
    return helper.make_model(graph, ir_version=10).SerializeToString()


CORRUPT = "is truncated or not an ONNX file: export it again"
NOT_OURS = "was not written by skipnet export: it lacks the metadata"


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", NOT_OURS, id="empty"),
        pytest.param(np.random.default_rng(0).bytes(5000), CORRUPT, id="random"),
        pytest.param(b"PK\3\4" + bytes(100), CORRUPT, id="zip"),
        pytest.param(b"import skipnet\n" * 10, CORRUPT, id="text"),
        pytest.param(
            safetensors.numpy.save({"weight": np.zeros(4, np.float32)}, {"skipnet": "{}"}),
            CORRUPT,
            id="safetensors",
        ),
        pytest.param(foreign(), NOT_OURS, id="foreign"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(
    content: bytes, message: str, optimize: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{path} {message}")):
        InferenceSession(path, optimize=optimize)
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(share: float, exported: GET, tmp_path: Path) -> None:
    data = exported("rnn").path.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=re.escape(f"{path} ")):
        InferenceSession(path)


def without(name: str) -> Callable[[onnx.ModelProto], object]:
    """Take a weight, or all whose names begin so, out of a file."""

    def edit(proto: onnx.ModelProto) -> None:
        every = proto.graph.initializer
        kept = [tensor for tensor in every if not tensor.name.startswith(name)]
        assert len(kept) < len(every)
        del every[:]
        every.extend(kept)

    return edit


def reshaped(name: str, *padding: tuple[int, int]) -> Callable[[onnx.ModelProto], object]:
    """Make a weight larger, with ones."""
    return lambda proto: set_weight(proto, name, lambda old: np.pad(old, padding, "edge"))


def set_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 9999


def set_height(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 20


def rename_images(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = "pictures"
    for node in proto.graph.node:
        node.input[:] = ["pictures" if name == "images" else name for name in node.input]


def drop_last_node(proto: onnx.ModelProto) -> None:
    del proto.graph.node[-1]


def drop_head(proto: onnx.ModelProto) -> None:
    at = next(i for i, node in enumerate(proto.graph.node) if "logits" in node.output)
    del proto.graph.node[at]


def flatten_a_block(proto: onnx.ModelProto) -> None:
    """Replace a gated block by what it does when skipped."""
    at = next(i for i, node in enumerate(proto.graph.node) if "x2" in node.output)
    node = proto.graph.node[at]
    (skip,) = (attribute.g for attribute in node.attribute if attribute.name == "else_branch")
    nodes = list(proto.graph.node)
    renamed = [
        helper.make_node(inner.op_type, list(inner.input), [output])
        for inner, output in zip(skip.node, node.output, strict=True)
    ]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:at], *renamed, *nodes[at + 1 :]])


def said(**changes: Any) -> Callable[[onnx.ModelProto], object]:
    """Change what a file says about itself; a dict changes the fields it names."""

    def edit(values: dict[str, Any]) -> None:
        for key, change in changes.items():
            if isinstance(change, dict):
                values[key].update(change)
            else:
                values[key] = change

    return lambda proto: edit_metadata(proto, edit)


def unsaid(key: str, inner: str | None = None) -> Callable[[onnx.ModelProto], object]:
    return lambda proto: edit_metadata(
        proto, lambda values: (values if inner is None else values[key]).pop(inner or key)
    )


def number_of_blocks(change: int) -> Callable[[onnx.ModelProto], object]:
    """Say that there are more blocks, or fewer."""

    def edit(values: dict[str, Any]) -> None:
        cost = values["cost"]
        for key in ("blocks", "shortcuts", "gates"):
            cost[key] = cost[key][:change] if change < 0 else cost[key] + [1] * change

    return lambda proto: edit_metadata(proto, edit)


def deviating_by(value: float) -> Callable[[onnx.ModelProto], object]:
    """Say of every channel that this is its standard deviation."""
    return lambda proto: edit_metadata(
        proto, lambda values: values.update(std=[value for _ in values["std"]])
    )


def replaced_metadata(text: str) -> Callable[[onnx.ModelProto], object]:
    def edit(proto: onnx.ModelProto) -> None:
        proto.metadata_props[0].value = text

    return edit


DAMAGED: dict[str, Callable[[onnx.ModelProto], object]] = {
    "no threshold": without("gate3/threshold"),
    "no gate": without("gate3/"),
    "no gates": without("gate"),
    "no block": without("block3/"),
    "no stem": without("stem/"),
    "no shortcut": without("shortcut3/"),
    "opset of the future": set_opset,
    "another height": set_height,
    "another input": rename_images,
    "no decisions": drop_last_node,
    "no logits": drop_head,
    "thresholds for two": reshaped("gate3/threshold", (0, 1)),
    "a head of other classes": reshaped("head/2.weight", (0, 1), (0, 0)),
    "a block of other channels": reshaped("block1/conv1.weight", (0, 0), (0, 1), (0, 0), (0, 0)),
    "metadata of nothing": replaced_metadata("{}"),
    "metadata of null": replaced_metadata("null"),
    "metadata of a list": replaced_metadata("[1, 2]"),
    "metadata that are not JSON": replaced_metadata("{"),
    "format of the future": said(format_version=2),
    "no version": unsaid("format_version"),
    "architecture of text": said(architecture="resnet"),
    "no architecture": unsaid("architecture"),
    "no gate said": unsaid("architecture", "gate"),
    "unknown gate": said(architecture={"gate": "attention"}),
    "no gate at all": said(architecture={"gate": None}),
    "the other gate": said(architecture={"gate": "ff2"}),
    "the recurrent gate": said(architecture={"gate": "rnn"}),
    "no channels": unsaid("architecture", "in_channels"),
    "channels of text": said(architecture={"in_channels": "three"}),
    "other channels": said(architecture={"in_channels": 2}),
    "image size of one number": said(image_size=[17]),
    "image size of text": said(image_size=["a", "b"]),
    "image size of infinity": said(image_size=[float("inf"), 23]),
    "another image size": said(image_size=[18, 23]),
    "mean of too few channels": said(mean=[0.5, 0.5]),
    "mean of text": said(mean="half"),
    "deviation of zero": deviating_by(0.0),
    "deviation of NaN": deviating_by(float("nan")),
    "no cost": unsaid("cost"),
    "cost of text": said(cost={"blocks": ["a"] * 9}),
    "no gates in the cost": said(cost={"gates": []}),
    "a block too few": number_of_blocks(-1),
    "six blocks too few": number_of_blocks(-6),
    "a block too many": number_of_blocks(1),
}
DAMAGED_LSTM: dict[str, Callable[[onnx.ModelProto], object]] = {
    "an LSTM of more inputs": reshaped("gate3/W", (0, 0), (0, 0), (0, 4)),
    "an LSTM of more units": reshaped("gate3/W", (0, 0), (0, 8), (0, 0)),
    "biases of more units": reshaped("gate3/B", (0, 0), (0, 16)),
    "a state of more units": reshaped("gate/R", (0, 0), (0, 8), (0, 2)),
    "a projection of more units": reshaped("gate/project", (0, 2), (0, 0)),
    "a projection of far more units": reshaped("gate/project", (0, 300), (0, 0)),
}
DAMAGES = [
    pytest.param(gate, damage, id=f"{gate}-{name}")
    for gate in ("rnn", "ff1")
    for name, damage in DAMAGED.items()
]


def damaged(
    network: Exported, damage: Callable[[onnx.ModelProto], object], folder: Path
) -> tuple[Exported, Answers | None]:
    """A damaged copy, and what ONNX Runtime by itself makes of it; None where it refuses."""
    path = folder / "model.onnx"
    path.write_bytes(edited(network.path.read_bytes(), damage))
    try:
        session = onnxruntime.InferenceSession(path, single_thread())
        answers = session.run(["logits", "decisions"], {"images": network.images(3)})
    except Exception as error:
        assert type(error).__module__.startswith("onnxruntime") or isinstance(error, ValueError)
        return Exported(network.network, network.info, path), None
    return Exported(network.network, network.info, path), tuple(answers)


@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "portable"])
@pytest.mark.parametrize(("gate", "damage"), DAMAGES)
def test_a_damaged_file_is_refused_or_gives_the_right_answers(
    gate: str,
    damage: Callable[[onnx.ModelProto], object],
    optimize: bool,
    exported: GET,
    tmp_path: Path,
) -> None:
    network, expected = damaged(exported(gate), damage, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, network.images(2).shape, dtype=np.uint8)
    try:
        session = opened_either_way(network.path, optimize=optimize)
    except UserError as error:
        assert str(network.path) in str(error)
        return
    try:
        logits, routing = session.run(network.images(3))
        macs = routing.macs
        classes, _ = session.run(pixels)
    except UserError:
        return
    assert expected is not None
    assert_same((logits, routing.decisions), expected)
    size = network.images(1).shape[1:]
    assert macs.tolist() == network.network.cost(*size).executed(expected[1]).tolist()
    right, _ = exported(gate).session("portable").run(pixels)
    np.testing.assert_allclose(classes, right, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "damage"),
    [
        *(pytest.param("rnn", damage, id=name) for name, damage in DAMAGED_LSTM.items()),
        *(pytest.param(gate, flatten_a_block, id=f"no {gate} block") for gate in ("rnn", "ff1")),
    ],
)
def test_a_file_of_the_wrong_shapes_does_not_end_the_process(
    gate: str, damage: Callable[[onnx.ModelProto], object], exported: GET, tmp_path: Path
) -> None:
    network, expected = damaged(exported(gate), damage, tmp_path)
    done = in_a_process(network, tail="")
    if done["returncode"] == 0:
        assert expected is not None
        assert_same(done["answers"], expected)
    else:
        assert "skipnet.errors.UserError" in done["err"]


# ---- what is kept beside the file ----


def kept_beside(path: Path) -> Path:
    (kept,) = path.parent.glob(f"{path.stem}.*.optimized.onnx")
    return kept


def test_the_optimised_graph_is_kept_and_used_again(
    copied: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand_compiler()
    assert_right(InferenceSession(copied.path, threads=1), copied)
    kept = kept_beside(copied.path)
    content = kept.read_bytes()

    def fail(dense: object) -> None:
        raise AssertionError("optimised again")

    monkeypatch.setattr("skipnet.execution.optimized._optimise", fail)
    assert_right(InferenceSession(copied.path, threads=1), copied)
    assert kept_beside(copied.path) == kept and kept.read_bytes() == content
    assert sorted(copied.path.parent.iterdir()) == sorted([copied.path, kept])


def truncate(kept: Path, content: bytes) -> None:
    kept.write_bytes(content[: len(content) // 2])


def flip_a_bit(kept: Path, content: bytes) -> None:
    at = len(content) // 2
    kept.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])


def empty(kept: Path, content: bytes) -> None:
    kept.write_bytes(b"")


def fill_with_noise(kept: Path, content: bytes) -> None:
    kept.write_bytes(np.random.default_rng(0).bytes(1000))


def drop_the_digest(kept: Path, content: bytes) -> None:
    kept.write_bytes(edited(content, lambda proto: proto.ClearField("metadata_props")))


def put_the_portable_file(kept: Path, content: bytes) -> None:
    shutil.copy(kept.with_name("model.onnx"), kept)


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, empty, fill_with_noise, drop_the_digest, put_the_portable_file],
)
def test_a_damaged_graph_is_built_again(
    damage: Callable[[Path, bytes], None], copied: Exported
) -> None:
    demand_compiler()
    InferenceSession(copied.path, threads=1)
    kept = kept_beside(copied.path)
    content = kept.read_bytes()
    damage(kept, content)
    damaged = kept.read_bytes()
    session = InferenceSession(copied.path, threads=1)
    assert session.engine == "optimized"
    assert_right(session, copied)
    assert kept_beside(copied.path) == kept and kept.read_bytes() != damaged


def test_the_graph_of_another_model_is_not_used(copied: Exported) -> None:
    demand_compiler()
    other = copied.path.with_name("other.onnx")

    def edit(proto: onnx.ModelProto) -> None:
        set_weight(proto, "block3/conv1.weight", lambda old: -2 * old)

    other.write_bytes(edited(copied.path.read_bytes(), edit))
    for path in (copied.path, other):
        InferenceSession(path, threads=1)
    shutil.copy(kept_beside(other), kept_beside(copied.path))
    session = InferenceSession(copied.path, threads=1)
    assert session.engine == "optimized"
    assert_right(session, copied)
    assert kept_beside(copied.path).read_bytes() != kept_beside(other).read_bytes()


def test_a_file_exported_anew_gets_a_graph_anew(copied: Exported, exported: GET) -> None:
    demand_compiler()
    InferenceSession(copied.path, threads=1)
    other = exported("ff2")
    shutil.copy(other.path, copied.path)
    session = InferenceSession(copied.path, threads=1)
    assert session.engine == "optimized"
    assert_right(session, other)


@pytest.mark.parametrize("what", ["processor", "onnxruntime"])
def test_the_graph_of_another_machine_is_not_used(
    what: str, copied: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand_compiler()
    InferenceSession(copied.path, threads=1)
    kept = kept_beside(copied.path)
    kept.write_bytes(edited(kept.read_bytes(), lambda proto: None))
    content = kept.read_bytes()
    if what == "processor":
        monkeypatch.setattr("skipnet.execution.optimized.processor", lambda: ("another",))
    else:
        monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    session = InferenceSession(copied.path, threads=1)
    assert session.engine == "optimized"
    assert_right(session, copied)
    assert len(list(copied.path.parent.glob("*.optimized.onnx"))) == 2
    assert kept.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_costs_the_kept_graph_only(copied: Exported) -> None:
    demand_compiler()
    InferenceSession(copied.path, threads=1)
    kept = kept_beside(copied.path)
    kept.unlink()
    kept.mkdir()  # The tests may run as root, whom no permission stops.
    (kept / "file").touch()
    for _ in range(2):
        session = InferenceSession(copied.path, threads=1)
        assert session.engine == "optimized"
        assert_right(session, copied)
    assert [path.name for path in kept.iterdir()] == ["file"]
    assert sorted(copied.path.parent.iterdir()) == sorted([copied.path, kept])


# ---- the compiled program, and compilers ----


def test_a_program_is_compiled_once(copied: Exported, empty_cache: Path) -> None:
    demand_compiler()
    (program,) = empty_cache.iterdir()
    made = program.stat()
    native.library.cache_clear()
    assert_right(InferenceSession(copied.path, threads=1), copied)
    assert list(empty_cache.iterdir()) == [program]
    assert program.stat().st_mtime_ns == made.st_mtime_ns
    assert empty_cache.stat().st_mode & 0o077 == 0


def test_a_cache_that_cannot_be_written_to_is_done_without(
    copied: Exported, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand_compiler()
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("SKIPNET_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    native.library.cache_clear()
    session = InferenceSession(copied.path, threads=1)
    assert session.engine == "optimized"
    assert_right(session, copied)


def test_the_program_of_another_processor_is_not_used(
    copied: Exported, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand_compiler()
    (program,) = empty_cache.iterdir()
    monkeypatch.setattr(native, "processor", lambda: ("another",))
    native.library.cache_clear()
    assert native.library() != program
    assert_right(InferenceSession(copied.path, threads=1), copied)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 0.75, None])
def test_a_damaged_program_is_not_run(
    share: float | None, copied: Exported, empty_cache: Path
) -> None:
    """In a process of its own: half a library, once loaded, ends the process."""
    demand_compiler()
    (program,) = empty_cache.iterdir()
    content = program.read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    program.write_bytes(noise if share is None else content[: int(share * len(content))])
    done = in_a_process(copied, tail="")
    assert done["returncode"] == 0
    assert_same(done["answers"], copied.run("masked", copied.images(3)))


def no_compiler(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("PATH", str(tmp_path / "none"))
    patch.delenv("CC", raising=False)


def failing(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("CC", "false")


def failing_with_words(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho first >&2\necho 'route.c: no such luck' >&2\nexit 3\n")
    script.chmod(0o755)
    patch.setenv("CC", f"{script} -some -flags")


def doing_nothing(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("CC", "true")


def not_a_program(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "compiler").write_bytes(b"\0\1\2")
    (tmp_path / "compiler").chmod(0o755)
    patch.setenv("CC", str(tmp_path / "compiler"))


def an_open_quote(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("CC", 'gcc "-O2')


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (no_compiler, "there is no C compiler: install gcc or clang, or name one with CC"),
        (failing, "false failed: exit code 1"),
        (failing_with_words, "compiler failed: route.c: no such luck"),
        (doing_nothing, ""),
        (not_a_program, ""),
        (an_open_quote, ""),
    ],
)
def test_without_a_compiler_that_works_the_file_is_run_as_it_is(
    compiler: Callable[[pytest.MonkeyPatch, Path], None],
    reason: str,
    copied: Exported,
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(monkeypatch, tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    match = f"{re.escape(str(copied.path))} is run as it is, not optimised: .*{re.escape(reason)}"
    for _ in range(2):  # That it did not work is not forgotten, and not kept for good.
        assert_right(opened_with_warning(copied.path, match), copied)
    monkeypatch.undo()
    native.library.cache_clear()
    demand_compiler()
    assert InferenceSession(copied.path, threads=1).engine == "optimized"


def test_what_is_not_asked_for_needs_no_compiler(
    copied: Exported, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, tmp_path)
    session = InferenceSession(copied.path, threads=1, optimize=False)
    assert session.engine == "portable"
    assert_right(session, copied)
    assert list(copied.path.parent.glob("*.optimized.onnx")) == []


# ---- threads and processes ----


@pytest.mark.parametrize("threads", [1, 2])
@BOTH
@KINDS
def test_many_callers_get_the_answers_of_one(
    gate: str, engine: str, threads: int, exported: GET
) -> None:
    demand_compiler()
    network = exported(gate)
    session = InferenceSession(network.path, threads=threads, optimize=engine == "optimized")
    batches = [network.images(batch, seed) for seed in range(8) for batch in (1, 2, 5, 1)]
    expected = [network.run(engine, images) for images in batches]

    def call(images: np.ndarray) -> Answers:
        logits, routing = session.run(images)
        return logits, routing.decisions

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, batches))
    for answers, one in zip(found, expected, strict=True):
        assert_same(answers, one)
        if engine == "optimized":
            np.testing.assert_array_equal(answers[0], one[0])


def test_one_callers_mistake_is_not_anothers(exported: GET) -> None:
    network = exported("rnn")
    session = network.session("optimized")
    good, bad = network.images(3), network.images(3)
    bad[1, 0, 0, 0] = np.nan
    expected = network.run("optimized", good)

    def call(index: int) -> None:
        if index % 2:
            with pytest.raises(UserError, match="image 1 of the batch"):
                session.run(bad)
        else:
            logits, routing = session.run(good)
            np.testing.assert_array_equal(logits, expected[0])
            np.testing.assert_array_equal(routing.decisions, expected[1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(32)))


def test_sessions_opened_at_once_are_all_right(copied: Exported, empty_cache: Path) -> None:
    demand_compiler()
    shutil.rmtree(empty_cache)
    native.library.cache_clear()
    with ThreadPoolExecutor(6) as pool:
        sessions = list(pool.map(lambda _: InferenceSession(copied.path, threads=1), range(6)))
    for session in sessions:
        assert session.engine == "optimized"
        assert_right(session, copied)
    assert len(list(empty_cache.iterdir())) == 1


PROGRAM = """
import json, sys, warnings
import numpy as np
import skipnet

path, images, answers = sys.argv[1:]
warnings.filterwarnings("ignore", "(?s).*is run as it is, not optimised")
session = skipnet.InferenceSession(path, threads=1)
logits, routing = session.run(np.load(images))
np.savez(answers, logits=logits, decisions=routing.decisions)
said = {"engine": session.engine, "macs": routing.macs.tolist()}
"""


def start(network: Exported, tail: str, name: str = "one") -> subprocess.Popen[str]:
    folder = network.path.parent
    np.save(folder / f"{name}.npy", network.images(3))
    command = [sys.executable, "-W", "error", "-c", f"{PROGRAM}{tail}\nprint(json.dumps(said))"]
    command += [str(network.path), str(folder / f"{name}.npy"), str(folder / f"{name}.npz")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(network: Exported, process: subprocess.Popen[str], name: str = "one") -> dict[str, Any]:
    """What a process said, and its answers."""
    out, err = process.communicate(timeout=120)
    if process.returncode:
        return {"returncode": process.returncode, "err": err}
    with np.load(network.path.with_name(f"{name}.npz")) as found:
        answers = found["logits"], found["decisions"]
    return {"returncode": 0, "answers": answers, "err": err, **json.loads(out)}


def in_a_process(network: Exported, tail: str) -> dict[str, Any]:
    return finish(network, start(network, tail))


def test_a_session_starts_and_runs_without_torch(copied: Exported) -> None:
    heavy = {"torch", "torchvision", "onnxscript", "datasets", "sklearn", "lightning_fabric"}
    tail = f"""
assert "torch" not in sys.modules
portable = skipnet.InferenceSession(path, optimize=False)
np.testing.assert_allclose(portable.run(np.load(images))[0], logits, rtol=1e-4, atol=1e-4)
routing.keep_rates, routing.blocks_fraction, routing.macs_fraction, routing.executed
try:
    skipnet.InferenceSession("none")
except skipnet.UserError:
    pass
said["heavy"] = sorted({heavy!r} & set(sys.modules))
"""
    done = in_a_process(copied, tail)
    assert done["returncode"] == 0, done["err"]
    assert done["heavy"] == []
    assert_same(done["answers"], copied.run("masked", copied.images(3)))
    if shutil.which("cc"):
        assert done["engine"] == "optimized" and done["err"] == ""


@pytest.mark.slow
def test_processes_that_build_at_once_are_both_right(copied: Exported, empty_cache: Path) -> None:
    demand_compiler()
    shutil.rmtree(empty_cache)
    names = ("one", "two", "three")
    started = [start(copied, "", name) for name in names]
    for name, process in zip(names, started, strict=True):
        done = finish(copied, process, name)
        assert done["returncode"] == 0, done["err"]
        assert done["engine"] == "optimized"
        assert_same(done["answers"], copied.run("masked", copied.images(3)))
    assert len(list(empty_cache.iterdir())) == 1
    assert len(list(copied.path.parent.glob("*.optimized.onnx"))) == 1
    assert [path for path in copied.path.parent.iterdir() if path.name.endswith(".tmp")] == []
