"""The machine-optimised engine: the dense graph's speed, block by block.

ONNX Runtime keeps features in blocks of 8 or 16 channels (NCHWc) and fuses convolution, sum and
activation, but on the main graph only: inside `If` a convolution takes about twice as long, and an
`If` itself as long as a small convolution. So the dense network is optimised as a whole, cut at the
blocks' boundaries, and made into a program that `route.c` runs, with ONNX Runtime's own kernels.

The program is a list of integers:

    RUN op n in… out      Invoke a kernel. An operand is a slot, -1 (nothing) or -2 - constant.
    SWAP a b              Exchange the tensors of two slots of one shape.
    LSTM x w W B R P      One step of the recurrent gate on slot x, w numbers; constants W, B, R, P.
    LOGIT x               The gate's logit is the number in slot x.
    BRANCH g p            Decide gate g by its threshold; if the block is skipped, go on at p.
    JUMP p                Go on at p.
    END

A block's output takes the place of its bypass: in place where the last convolution adds the bypass
itself, by SWAP otherwise. A skipped block therefore leaves everything as it should be.
"""

import contextlib
import glob
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from skipnet.errors import UserError
from skipnet.execution.native import DoesNotFit, library, processor
from skipnet.execution.portable import (
    DECISIONS,
    IMAGES,
    LOGITS,
    PortableInfo,
    errors_as,
    onnxruntime,
    open_session,
)
from skipnet.files import write_atomically

NCHWC = "com.microsoft.nchwc"
THRESHOLDS = "thresholds"
BUILD_VERSION = 1
TOLERANCE = 1e-3
"""How far an engine's logits may lie from the portable file's, as a share of the largest."""
TRIES = 3
SHAPED = {
    "Gather",
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Pad",
}
"""Operators whose later inputs say of what shape the output is."""
OPERATORS = SHAPED | {
    *("Add", "AveragePool", "BatchNormalization", "BiasGelu", "Cast", "Clip", "Concat", "Conv"),
    *("Div", "Elu", "Erf", "Exp", "FastGelu", "Flatten", "FusedConv", "FusedGemm", "FusedMatMul"),
    *("Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "GroupNormalization", "HardSigmoid"),
    *("HardSwish", "Identity", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Log"),
    *("MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "QuickGelu"),
    *("Reciprocal", "Relu", "Selu", "Sigmoid", "SimplifiedLayerNormalization", "Softmax"),
    *("Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Transpose"),
}
"""Operators whose outputs are as large as the inputs' shapes and the attributes say.

Slots are sized when the program is made; what an image could make larger would be written past one.
"""
END, RUN, SWAP, LSTM, LOGIT, BRANCH, JUMP = range(7)
_DIGEST = "skipnet-optimized"


@dataclass
class Engine:
    """A routed network for this machine.

    Attributes:
        model: One operator, `Route(images, thresholds)`, for one image.
        thresholds: What gates' logits must exceed, float32 [1 or batch, gates].
    """

    model: bytes
    thresholds: np.ndarray

    def open(self, *, threads: int | None, **settings: Any) -> Any:
        """Open an ONNX Runtime session on it.

        Raises:
            DoesNotFit: When this ONNX Runtime will not have it.
        """
        with errors_as(DoesNotFit):
            return open_session(
                self.model,
                threads=threads,
                providers=["CPUExecutionProvider"],
                custom_ops=library(),
                **settings,
            )


def build(path: Path, data: bytes, info: PortableInfo) -> Engine:
    """Build the engine of a portable file; its optimised dense graph is kept beside the file.

    Args:
        path: The portable file.
        data: Its content.
        info: What it says about itself.

    Raises:
        DoesNotFit: When there can be none here.
    """
    with errors_as(DoesNotFit):
        return _build(path, data, info)


def _build(path: Path, data: bytes, info: PortableInfo) -> Engine:
    library()  # Without a compiler there is nothing to optimise for.
    portable = _Portable(ModelProto.FromString(data), info)
    machine = hashlib.sha256()
    for fact in (str(BUILD_VERSION), onnxruntime().__version__, *processor()):
        machine.update(fact.encode() + b"\0")
    key = hashlib.sha256(data).digest() + machine.digest()
    here = f"{machine.hexdigest()[:8]}.optimized.onnx"
    kept = path.with_name(f"{path.stem}.{key.hex()[:8]}-{here}")
    dense = _read_kept(kept, key)
    if dense is not None:
        return _Builder(portable, dense).engine()
    dense = _optimise(portable.dense())
    engine = _Builder(portable, dense).engine()
    _compare(engine, data, info)
    for earlier in path.parent.glob(f"{glob.escape(path.stem)}.????????-{here}"):
        with contextlib.suppress(OSError):
            earlier.unlink()
    _keep(dense, kept, key)
    return engine


def _compare(engine: Engine, data: bytes, info: PortableInfo) -> None:
    """Hold a new engine against the portable file, on an image of noise.

    Raises:
        DoesNotFit: When they differ.
    """
    slow = open_session(data, threads=1, providers=["CPUExecutionProvider"])
    fast = engine.open(threads=1)
    generator = np.random.default_rng(0)
    shape = (len(engine.thresholds), info.architecture["in_channels"], *info.image_size)
    for _ in range(TRIES):
        images = generator.standard_normal(shape, dtype=np.float32)
        logits, decisions = slow.run([LOGITS, DECISIONS], {IMAGES: images})
        feed = {IMAGES: images[:1], THRESHOLDS: engine.thresholds[:1]}
        found, decided = fast.run(None, feed)
        # A logit at its threshold may be decided either way: another image, then.
        if not np.array_equal(decided, decisions[:1]):
            continue
        if np.abs(found - logits[:1]).max() <= TOLERANCE * max(1.0, np.abs(logits[:1]).max()):
            return
    raise DoesNotFit("the engine made of it gives other results")


def _read_kept(path: Path, key: bytes) -> ModelProto | None:
    """The graph kept at a path; None where there is none, a damaged one, or another model's."""
    try:
        proto = ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError):
        return None
    digests = [entry.value for entry in proto.metadata_props if entry.key == _DIGEST]
    del proto.metadata_props[:]
    return proto if digests == [_digest(proto, key)] else None


def _keep(proto: ModelProto, path: Path, key: bytes) -> None:
    marked = ModelProto()
    marked.CopyFrom(proto)
    entry = marked.metadata_props.add()
    entry.key, entry.value = _DIGEST, _digest(proto, key)
    with contextlib.suppress(UserError):  # A folder that cannot be written to: built each time.
        write_atomically(path, marked.SerializeToString())


def _digest(proto: ModelProto, key: bytes) -> str:
    return hashlib.sha256(key + proto.SerializeToString(deterministic=True)).hexdigest()


def _optimise(dense: ModelProto) -> ModelProto:
    """What ONNX Runtime makes of a graph on this processor."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "dense.onnx"
        open_session(
            dense.SerializeToString(),
            threads=1,
            providers=["CPUExecutionProvider"],
            optimized_model_filepath=str(target),
        )
        proto = onnx.load(target)
    del proto.metadata_props[:]
    return proto


class _Portable:
    """A portable file, taken apart by the names `export` gave."""

    def __init__(self, proto: ModelProto, info: PortableInfo) -> None:
        self.proto = proto
        self.recurrent = info.architecture["gate"] == "rnn"
        self.num_blocks = len(info.cost.blocks)
        self.num_gates = len(info.cost.gates)
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        names = {name for node in proto.graph.node for name in node.output}
        self.projected = [f"bypass{i}" in names for i in range(self.num_blocks)]

    def array(self, name: str) -> np.ndarray:
        """A weight."""
        if name not in self.initializers:
            raise DoesNotFit(f"the file has no {name}")
        return numpy_helper.to_array(self.initializers[name])

    def thresholds(self) -> np.ndarray:
        """What logits must exceed, [1 or batch, gates]."""
        columns = [
            self.array(f"gate{i}/threshold").reshape(-1) for i in range(1, self.num_gates + 1)
        ]
        if len({column.shape for column in columns}) != 1:
            raise DoesNotFit("the gates' thresholds differ in their number")
        return np.stack(columns, axis=1).astype(np.float32)

    def dense(self) -> ModelProto:
        """The network with every block run, for one image; boundaries are outputs."""
        nodes: list[NodeProto] = []
        outputs = [LOGITS]
        for node in self.proto.graph.node:
            if node.op_type == "If":
                nodes += self._block(node)
            elif self._is_dense(node.name):
                nodes.append(node)
        outputs += [f"x{i}" for i in range(self.num_blocks + 1)]
        outputs += [f"bypass{i}" for i, projected in enumerate(self.projected) if projected]
        for i in range(1, self.num_gates + 1):
            if not self.recurrent:
                outputs.append(f"gate{i}/logit")
                continue
            # Gate i reads what block i - 1 gave, or the bypass that replaced it.
            nodes.append(self._pool(i, f"x{i}", f"pooled{i}"))
            outputs.append(f"pooled{i}")
            if i > 1 and self.projected[i - 1]:
                name = f"pooled{i}/skip"
                nodes.append(self._pool(i, f"bypass{i - 1}", name))
                outputs.append(name)
        used = {name for node in nodes for name in node.input}
        (images,) = self.proto.graph.input
        shape = [1, *(dim.dim_value for dim in images.type.tensor_type.shape.dim[1:])]
        return helper.make_model(
            helper.make_graph(
                nodes,
                "dense",
                [helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, shape)],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
                [tensor for name, tensor in self.initializers.items() if name in used],
            ),
            opset_imports=list(self.proto.opset_import),
            ir_version=self.proto.ir_version,
        )

    def _pool(self, gate: int, features: str, pooled: str) -> NodeProto:
        """What a gate reads: the mean over the map, or over tokens, whose channels are last."""
        axes = f"gate/axes{gate - 1}"
        if axes in self.initializers:
            return helper.make_node("ReduceMean", [features, axes], [pooled])
        return helper.make_node("GlobalAveragePool", [features], [pooled])

    def _block(self, node: NodeProto) -> list[NodeProto]:
        """The nodes of the branch in which every row runs, writing to the block's output."""
        branch = _attribute(node, "then_branch").g
        inner = [inside for inside in branch.node if inside.op_type == "If"]
        if len(inner) != 1:
            raise DoesNotFit(f"block {node.name} is not as skipnet export writes it")
        plain = _attribute(inner[0], "then_branch").g
        nodes = []
        for original in plain.node:
            if original.name.endswith(("/average", "/pooled")):
                continue
            copied = NodeProto()
            copied.CopyFrom(original)
            copied.output[:] = [
                node.output[0] if name == plain.output[0].name else name for name in copied.output
            ]
            nodes.append(copied)
        return nodes

    def _is_dense(self, name: str) -> bool:
        """Whether a node of the main graph is computed whatever is decided, gates' units included.

        Decisions, and the recurrent gate, are the program's own.
        """
        if name == DECISIONS or name.startswith("gates/"):
            return False
        if not name.startswith("gate"):
            return True
        return not self.recurrent and not name.endswith(("/runs", "/any"))


@dataclass
class _Code:
    """A program under construction."""

    code: list[int] = field(default_factory=list)
    slots: list[tuple[int, ...]] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    _constant_of: dict[str, int] = field(default_factory=dict)

    def take(self, shape: tuple[int, ...]) -> int:
        """A slot of this shape: one that is free again, or a new one."""
        for slot in self.free:
            if self.slots[slot] == shape:
                self.free.remove(slot)
                return slot
        self.slots.append(shape)
        return len(self.slots) - 1

    def constant(self, tensor: TensorProto) -> int:
        if tensor.name not in self._constant_of:
            self._constant_of[tensor.name] = len(self.constants)
            self.constants.append(tensor)
        return self._constant_of[tensor.name]

    def array(self, name: str, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array, dtype=np.float32)
        return self.constant(numpy_helper.from_array(array, name))

    def operator(self, text: str) -> int:
        if text not in self.operators:
            self.operators.append(text)
        return self.operators.index(text)

    def branch(self, gate: int) -> int:
        """Append BRANCH, and return where its target is to be written."""
        self.code += [BRANCH, gate, -1]
        return len(self.code) - 1

    def jump(self) -> int:
        self.code += [JUMP, -1]
        return len(self.code) - 1

    def land(self, at: int) -> None:
        """Let a BRANCH or JUMP go on here."""
        self.code[at] = len(self.code)


class _Builder:
    """Makes the program out of the optimised dense graph."""

    def __init__(self, portable: _Portable, dense: ModelProto) -> None:
        self.portable = portable
        self.nodes = list(dense.graph.node)
        self.initializers = {tensor.name: tensor for tensor in dense.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.opset = {entry.domain: entry.version for entry in dense.opset_import}
        self.shapes, self.types = _probe(dense)
        self.code = _Code()
        self._layouts: dict[str, bool] = {}

    def engine(self) -> Engine:
        portable, code = self.portable, self.code
        image = code.take(self.shapes[IMAGES])
        env = {IMAGES: image}
        x = self._emit(self._inside("x0"), env)
        pooled: dict[int, int] = {}  # The slot of pooled features, by their number.
        at = ""
        for index in range(portable.num_blocks):
            source = self._inside(f"x{index}")
            env = {source: x}
            bypass, bypass_name = x, source
            if portable.projected[index]:
                bypass_name = self._inside(f"bypass{index}")
                bypass = self._emit(bypass_name, env)
                env[bypass_name] = bypass
            skip = None
            if portable.num_gates and index > 0:
                self._gate(index, {source: x}, pooled.get(self._width(at), -1))
                skip = code.branch(index - 1)
            target = self._inside(f"x{index + 1}")
            self._block(target, env, bypass, bypass_name, skippable=skip is not None)
            if portable.recurrent and index < portable.num_gates:
                name = f"pooled{index + 1}"
                at, width = name, self._width(name)
                if width not in pooled:
                    pooled[width] = code.take(self.shapes[self._inside(name)])
                slot = pooled[width]
                self._emit(self._inside(name), {self._inside(f"x{index + 1}"): bypass}, slot)
                if skip is not None and portable.projected[index]:
                    end = code.jump()
                    code.land(skip)
                    self._emit(self._inside(f"{name}/skip"), {bypass_name: bypass}, slot)
                    skip = end
            if skip is not None:
                code.land(skip)
            if bypass != x:
                code.free.append(x)
            x = bypass
        logits = self._emit(LOGITS, {self._inside(f"x{portable.num_blocks}"): x})
        code.code.append(END)
        return Engine(self._model(image, logits), portable.thresholds())

    def _width(self, name: str) -> int:
        return int(np.prod(self.shapes[name])) if name else 0

    def _inside(self, name: str) -> str:
        """A boundary's tensor in the layout that kernels hand on, before it is put in order."""
        node = self.producer.get(name)
        if node is None or node.op_type != "ReorderOutput":
            return name
        blocked = node.input[0]
        pooled = name.startswith("pooled")
        # One pixel is in order already, unless channels were added to fill a block.
        if pooled and np.prod(self.shapes[blocked]) != np.prod(self.shapes[name]):
            return name
        return blocked

    def _gate(self, index: int, env: dict[str, int], pooled: int) -> None:
        code, portable, name = self.code, self.portable, f"gate{index}"
        if not portable.recurrent:
            slot = self._emit(f"{name}/logit", env)
            code.code += [LOGIT, slot]
            code.free.append(slot)
            return
        weight, biases = portable.array(f"{name}/W")[0], portable.array(f"{name}/B")[0]
        size = len(biases) // 2
        recurrent, project = portable.array("gate/R")[0], portable.array("gate/project")
        width = int(np.prod(code.slots[pooled]))
        shapes = [weight.shape, biases.shape, recurrent.shape, project.shape]
        if shapes != [(size, width), (2 * size,), (size, size // 4), (size // 4, 1)]:
            raise DoesNotFit(f"the weights of gate {index} are of other shapes than its features")
        constants = [
            code.array(f"{name}/W", weight.T),
            code.array(f"{name}/B", biases[:size] + biases[size:]),
            code.array("gate/R", recurrent.T),
            code.array("gate/project", project.reshape(-1)),
        ]
        code.code += [LSTM, pooled, weight.shape[1], *constants]

    def _block(
        self, target: str, env: dict[str, int], bypass: int, bypass_name: str, skippable: bool
    ) -> None:
        """Run a block; its output takes the place of the bypass, which it is to be like."""
        last = self.producer[target]
        sums = last.op_type == "Conv" and last.domain == NCHWC and len(last.input) == 4
        if sums and last.input[3] == bypass_name and bypass_name not in last.input[:3]:
            self._emit(target, env, bypass)
            return
        same_layout = self._blocked(target) == self._blocked(bypass_name) or not skippable
        if self.shapes[target] != self.code.slots[bypass] or not same_layout:
            raise DoesNotFit("a block and its shortcut differ in their layout")
        slot = self._emit(target, env)
        self.code.code += [SWAP, slot, bypass]
        self.code.free.append(slot)

    def _emit(self, target: str, env: dict[str, int], into: int | None = None) -> int:
        """Append what computes a tensor from those in `env`, and return the slot it is in."""
        nodes = self._cone(target, env)
        uses: dict[str, int] = {}
        for node in nodes:
            for name in node.input:
                uses[name] = uses.get(name, 0) + 1
        own: dict[str, int] = {}
        for node in nodes:
            operands = [self._operand(name, env, own) for name in node.input]
            output = node.output[0]
            if self.types[output] != np.float32:
                raise DoesNotFit(f"{node.op_type} gives numbers that are not float32")
            given = output == target and into is not None
            slot = into if given and into is not None else self.code.take(self.shapes[output])
            self.code.code += [RUN, self.code.operator(self._describe(node))]
            self.code.code += [len(operands), *operands, slot]
            own[output] = slot
            for name in set(node.input):
                uses[name] -= list(node.input).count(name)
                if name in own and uses[name] == 0:
                    self.code.free.append(own[name])
        return own[target]

    def _blocked(self, name: str) -> bool:
        """Whether a tensor is in ONNX Runtime's blocked layout."""
        if name not in self._layouts:
            node = self.producer.get(name)
            if node is None or node.op_type == "ReorderOutput":
                self._layouts[name] = False
            else:
                # Sums and activations hand on the layout of what they read.
                self._layouts[name] = node.domain == NCHWC or any(map(self._blocked, node.input))
        return self._layouts[name]

    def _cone(self, target: str, env: dict[str, int]) -> list[NodeProto]:
        """The nodes between the tensors in `env` and a target, in order."""
        wanted: set[int] = set()
        stack = [target]
        while stack:
            name = stack.pop()
            if not name or name in env or name in self.initializers:
                continue
            node = self.producer.get(name)
            if node is None:
                raise DoesNotFit(f"{target} depends on {name}")
            if id(node) not in wanted:
                wanted.add(id(node))
                stack += node.input
        return [node for node in self.nodes if id(node) in wanted]

    def _operand(self, name: str, env: dict[str, int], own: dict[str, int]) -> int:
        if not name:
            return -1
        if name in self.initializers:
            return -2 - self.code.constant(self.initializers[name])
        return own[name] if name in own else env[name]

    def _describe(self, node: NodeProto) -> str:
        """An operator as `route.c` reads it."""
        if len([name for name in node.output if name]) != 1:
            raise DoesNotFit(f"{node.op_type} has several outputs")
        if node.domain != NCHWC and node.op_type not in OPERATORS:
            raise DoesNotFit(f"{node.op_type} is not among the operators known to be safe")
        if node.op_type in SHAPED and not set(node.input[1:]) <= {"", *self.initializers}:
            raise DoesNotFit(f"{node.op_type} gives a shape that depends on the image")
        version, constraints = 1, ["T 1"]
        if node.domain in ("", "ai.onnx"):
            schema = onnx.defs.get_schema(node.op_type, self.opset.get("", 1))
            version = schema.since_version
            constraints = self._constraints(node, schema)
        attributes = [_describe_attribute(attribute) for attribute in node.attribute]
        counts = [version, len(attributes), len(node.input), 1, len(constraints)]
        first = " ".join([node.op_type, node.domain or "-", *map(str, counts)])
        return "\n".join([first, *attributes, *constraints])

    def _constraints(self, node: NodeProto, schema: Any) -> list[str]:
        known = {constraint.type_param_str for constraint in schema.type_constraints}
        found: dict[str, int] = {}
        for formal, name in zip(schema.inputs, node.input, strict=False):
            if formal.type_str in known and name:
                found[formal.type_str] = helper.np_dtype_to_tensor_dtype(self._type(name))
        return [f"{name} {kind}" for name, kind in found.items()]

    def _type(self, name: str) -> np.dtype:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name]).dtype
        return np.dtype(self.types[name])

    def _model(self, image: int, logits: int) -> bytes:
        code, portable = self.code, self.portable
        hidden = len(portable.array("gate/project").reshape(-1)) if portable.recurrent else 0
        counts = [
            len(code.slots),
            len(code.constants),
            len(code.operators),
            portable.num_gates,
            int(np.prod(self.shapes[LOGITS])),
            hidden,
            image,
            logits,
            int(np.prod(self.shapes[IMAGES])),
        ]
        slots = [number for shape in code.slots for number in (len(shape), *shape)]
        node = helper.make_node(
            "Route",
            [IMAGES, THRESHOLDS, *(tensor.name for tensor in code.constants)],
            [LOGITS, DECISIONS],
            domain="skipnet",
            program=code.code,
            slots=slots,
            counts=counts,
            operators="\n".join(code.operators),
        )

        def value(name: str, kind: int, shape: Sequence[int]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, list(shape))

        gates = [1, portable.num_gates]
        graph = helper.make_graph(
            [node],
            "route",
            [
                value(IMAGES, TensorProto.FLOAT, self.shapes[IMAGES]),
                value(THRESHOLDS, TensorProto.FLOAT, gates),
            ],
            [
                value(LOGITS, TensorProto.FLOAT, self.shapes[LOGITS]),
                value(DECISIONS, TensorProto.BOOL, gates),
            ],
            code.constants,
        )
        opsets = [helper.make_opsetid("", self.opset[""]), helper.make_opsetid("skipnet", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=portable.proto.ir_version)
        return bytes(model.SerializeToString())


def _probe(dense: ModelProto) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shape and type of every tensor, by running the graph once on zeros."""
    probe = ModelProto()
    probe.CopyFrom(dense)
    names = [name for node in dense.graph.node for name in node.output if name]
    del probe.graph.output[:]
    for name in names:
        probe.graph.output.append(helper.make_empty_tensor_value_info(name))
    (images,) = dense.graph.input
    shape = tuple(dim.dim_value for dim in images.type.tensor_type.shape.dim)
    session = open_session(
        probe.SerializeToString(),
        threads=1,
        providers=["CPUExecutionProvider"],
        graph_optimization_level=onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    values = session.run(names, {IMAGES: np.zeros(shape, np.float32)})
    shapes = {name: tuple(value.shape) for name, value in zip(names, values, strict=True)}
    types = {name: value.dtype for name, value in zip(names, values, strict=True)}
    return shapes | {IMAGES: shape}, types | {IMAGES: np.dtype(np.float32)}


def _attribute(node: NodeProto, name: str) -> Any:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _describe_attribute(attribute: Any) -> str:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return f"{attribute.name} s {value.decode()}"
    kind = "i" if type(value) in (int, float) else "I"
    values = [value] if kind == "i" else value
    if isinstance(values, list | tuple) and values and type(values[0]) in (int, float):
        if isinstance(values[0], float):  # As the integers of their bits.
            kind = {"i": "f", "I": "F"}[kind]
            values = np.asarray(values, np.float32).view(np.int32).tolist()
        return f"{attribute.name} {kind} {' '.join(map(str, values))}"
    raise DoesNotFit(f"an attribute {attribute.name} of a kind that has no place in a program")
