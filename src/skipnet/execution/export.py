"""Export: a routed network as one portable ONNX file, in which skipped blocks are not computed.

Standard operators only, any batch size. Around each gated block:

    logit[i] = gate(pooled[i])                       one LSTM node and one MatMul (recurrent gate)
    x[i+1], pooled[i+1] =
        If any row runs:
            If every row runs:  block(x[i]), its pooled output        always so at batch 1
            else:               gather the rows, block, scatter them back
        else:                   bypass[i], pooled[i]

The recurrent gate's linear a block is folded into its LSTM's input weights, and the pooled features
are carried beside the features, so that only blocks that run pay for pooling.
"""

import copy
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from skipnet.errors import UserError
from skipnet.execution.fused import fold_batch_norms
from skipnet.execution.portable import (
    BATCH,
    DECISIONS,
    IMAGES,
    LOGITS,
    open_session,
    set_metadata,
)
from skipnet.files import write_atomically
from skipnet.models.weights import ModelInfo
from skipnet.routing.gates import FFGateI, FFGateII, Gate, RNNGate
from skipnet.routing.network import SkipNet

OPSET = 20
NUM_COMPARED = 4
TOLERANCE = 1e-3
"""How far a file's logits may lie from the network's, as a share of the largest."""
SURE = 1e-4
"""How far a gate's logit must be from the threshold to count."""
IR_VERSION = 10
MAX_BYTES = 2**31 - 2**20
"""What fits into one file of protocol buffers, with some room for the graph."""


def export(model: SkipNet, path: str | os.PathLike[str], info: ModelInfo) -> float:
    """Write a network as a portable ONNX file, atomically, once it computes what the network does.

    Args:
        model: The network, with or without gates; it is not changed.
        path: Where to.
        info: Size of the images, preprocessing and class names, which travel in the file.

    Returns:
        How far the file's logits lie from the network's, at most, on a few images of noise.

    Raises:
        UserError: On a gate that cannot be exported, when the file would not compute what the
            network does, or when it cannot be written.
    """
    data = to_onnx(model, info).SerializeToString()
    error = _compare(model, data, info)
    write_atomically(Path(path), data)
    return error


def _compare(model: SkipNet, data: bytes, info: ModelInfo) -> float:
    network = copy.deepcopy(model).cpu().float().eval()
    session = open_session(data, threads=None, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_COMPARED, info.architecture.in_channels, *info.image_size)
    images = torch.randn(shape, generator=generator)
    with torch.inference_mode():
        expected, routing = network(images)
    logits, *decided = session.run(None, {IMAGES: images.numpy()})
    # Where a gate's logit is as good as zero, both ways are right.
    sure = (routing.logits.abs() > SURE).all(dim=1).numpy()
    error = float(np.abs(logits - expected.numpy())[sure].max(initial=0.0))
    wrong = decided and not np.array_equal(decided[0][sure], routing.executed.numpy()[sure])
    if wrong or not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"the exported file would not compute what the network does (off by {error:.2g}): a "
            "part of the network cannot be exported"
        )
    return error


def to_onnx(
    model: SkipNet, info: ModelInfo, *, forced: np.ndarray | None = None
) -> onnx.ModelProto:
    """Translate a network, see `export`.

    Args:
        model: The network.
        info: What travels in the file.
        forced: Decisions to take whatever the gates say, bool [batch, gates], for measurements: the
            gates are computed all the same. The file then takes batches of this size only.
    """
    # In channels_last the exporter sees strided views, which take more nodes.
    network = model.fuse().cpu().float().to(memory_format=torch.contiguous_format)
    channels, (height, width) = info.architecture.in_channels, info.image_size
    cost = network.cost(channels, height, width)
    graph = _Graph()
    with torch.inference_mode():
        images = torch.zeros(2, channels, height, width)
        examples = _examples(network, images)
    # Not the fused network's gate: its units are single pieces, not to be taken apart.
    original = copy.deepcopy(model.gate).cpu().float().eval() if model.gate else None
    columns = _columns(original)
    parts = _Parts(
        graph,
        [
            *examples.of(network),
            *((unit, [x]) for unit, x in zip(columns, examples.features[1:], strict=False)),
        ],
    )
    gate: _RecurrentGate | _FeedForwardGate | None = None
    if type(original) is RNNGate:
        gate = _RecurrentGate(original, graph, examples.features[1:])
    elif columns:
        gate = _FeedForwardGate(columns, graph, parts, examples.features)
    _write(network, gate, examples, graph, parts, forced)

    size = sum(len(tensor.raw_data) for tensor in graph.initializers)
    if size > MAX_BYTES:
        raise UserError(
            f"the network's weights are {size / 1e9:.1f} GB, and an ONNX file holds 2 GB: take "
            "recurrent gates, which are small, or a smaller network"
        )
    outputs = [_value(LOGITS, TensorProto.FLOAT, (BATCH, examples.logits.shape[1]))]
    if network.gate is not None:
        outputs.append(_value(DECISIONS, TensorProto.BOOL, (BATCH, network.num_gates)))
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "skipnet",
            [_value(IMAGES, TensorProto.FLOAT, (BATCH, channels, height, width))],
            outputs,
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="skipnet",
    )
    set_metadata(proto, info.to_dict() | {"cost": cost._asdict()})
    onnx.checker.check_model(proto)
    return proto


@dataclass
class _Examples:
    """Inputs of every part for a batch of two, to export it with."""

    images: Tensor
    entered: list[Tensor]
    features: list[Tensor]
    bypasses: list[Tensor]
    last: Tensor
    logits: Tensor

    def of(self, network: SkipNet) -> Iterator[tuple[nn.Module, list[Tensor]]]:
        """Every part of the network but the gate, with its inputs."""
        yield network.stem, [self.images]
        parts = zip(network.entries, network.blocks, network.shortcuts, strict=True)
        for index, (entry, block, shortcut) in enumerate(parts):
            if not isinstance(entry, nn.Identity):
                yield entry, [self.entered[index]]
            yield block, [self.features[index], self.bypasses[index]]
            if not isinstance(shortcut, nn.Identity):
                yield shortcut, [self.features[index]]
        yield network.head, [self.last]


def _examples(network: SkipNet, images: Tensor) -> _Examples:
    entered, features, bypasses = [], [], []
    x = network.stem(images)
    # Not in place: what is recorded must stay as it was, in shape and in kind.
    for entry, block, shortcut in zip(
        network.entries, network.blocks, network.shortcuts, strict=True
    ):
        entered.append(x)
        features.append(entry(x.clone()))
        bypasses.append(shortcut(features[-1].clone()))
        x = block(features[-1].clone(), bypasses[-1].clone())
    return _Examples(images, entered, features, bypasses, x, network.head(x.clone()))


@dataclass
class _Graph:
    """Nodes of the main graph or of a branch; weights are all the main graph's."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def branch(self) -> "_Graph":
        return _Graph(initializers=self.initializers)

    def add(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], **attributes: Any
    ) -> str:
        """Append a node and return its first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        name = next(name for name in names if name)
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names[0]

    def constant(self, name: str, value: Any) -> str:
        """Add a tensor, or find that it is there, and return its name."""
        if all(name != tensor.name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def as_branch(self, name: str, outputs: Sequence[str]) -> onnx.GraphProto:
        values = [helper.make_empty_tensor_value_info(output) for output in outputs]
        return helper.make_graph(self.nodes, name, [], values)


class _Parts:
    """Modules as nodes; those that differ in their weights only are translated once.

    Args:
        graph: Where weights go.
        wanted: Every module that will be placed, and an example of its inputs, of batch size two.
    """

    def __init__(self, graph: _Graph, wanted: Iterable[tuple[nn.Module, Sequence[Tensor]]]) -> None:
        self.graph = graph
        distinct = {_signature(module, example): (module, example) for module, example in wanted}
        self.templates = dict(zip(distinct, _translate(list(distinct.values())), strict=True))

    def place(
        self,
        into: _Graph,
        module: nn.Module,
        example: Sequence[Tensor],
        name: str,
        inputs: Sequence[str],
        output: str,
        weights: str | None = None,
    ) -> str:
        """Append a module's nodes to a graph.

        Args:
            into: The graph.
            module: What to translate.
            example: Its inputs.
            name: Prefix of everything inside.
            inputs: Names of its inputs.
            output: Name of its output.
            weights: Prefix of its weights, if `name` is not.
        """
        template = self.templates[_signature(module, example)]
        weights = weights or name
        state = module.state_dict()
        names = dict(zip(template.inputs, inputs, strict=True))
        if template.output in names:  # What comes in goes out.
            return into.add("Identity", [names[template.output]], output)
        names[template.output] = output
        for tensor, key in template.tensors:
            names[tensor.name] = f"{weights}/{key or tensor.name}"
            # What is no weight is a constant of the translation.
            array = state[key].numpy() if key else numpy_helper.to_array(tensor)
            self.graph.constant(names[tensor.name], array)
        for node in template.nodes:
            copied = NodeProto()
            copied.CopyFrom(node)
            copied.input[:] = [names.get(i, f"{name}/{i}") if i else "" for i in node.input]
            copied.output[:] = [names.get(o, f"{name}/{o}") if o else "" for o in node.output]
            copied.name = f"{name}/{node.name}"
            into.nodes.append(copied)
        return output


def _write(
    network: SkipNet,
    gate: "_RecurrentGate | _FeedForwardGate | None",
    examples: _Examples,
    graph: _Graph,
    parts: _Parts,
    forced: np.ndarray | None,
) -> None:
    x = parts.place(graph, network.stem, [examples.images], "stem", [IMAGES], "x0")
    decided: list[str] = []
    entering = [not isinstance(entry, nn.Identity) for entry in network.entries]
    for index, (block, shortcut) in enumerate(zip(network.blocks, network.shortcuts, strict=True)):
        if entering[index]:
            entry, name = network.entries[index], f"entry{index}"
            x = parts.place(graph, entry, [examples.entered[index]], name, [x], f"entered{index}")
            if gate is not None and gate.carries and index > 0:
                gate.carried = gate.pool(graph, index - 1, x, name)
        example = [examples.features[index], examples.bypasses[index]]
        output = f"x{index + 1}"
        bypass = x
        if not isinstance(shortcut, nn.Identity):
            name = f"shortcut{index}"
            bypass = parts.place(graph, shortcut, example[:1], name, [x], f"bypass{index}")
        if gate is None or index == 0:
            x = parts.place(graph, block, example, f"block{index}", [x, bypass], output)
            if gate is not None and gate.carries and not entering[1]:
                gate.carried = gate.pool(graph, 0, x, "block0")
            continue

        threshold = gate.threshold
        if forced is not None:
            limit = np.finfo(np.float32).max
            threshold = np.where(forced[:, index - 1 : index], -limit, limit).astype(np.float32)
        name = f"gate{index}"
        at = graph.constant(f"{name}/threshold", threshold)
        runs = graph.add("Greater", [gate.logit(index, x), at], f"{name}/runs")
        decided.append(runs)
        any_runs = graph.add("ReduceMax", [runs], f"{name}/any", keepdims=0)
        run, skip = graph.branch(), graph.branch()

        def place(into: _Graph, name: str, inputs: Sequence[str], output: str) -> str:
            weights = f"block{index}"  # noqa: B023
            return parts.place(into, block, example, name, inputs, output, weights)  # noqa: B023

        plain, some = run.branch(), run.branch()
        plain_outputs = [place(plain, f"block{index}", [x, bypass], f"block{index}/output")]
        some_outputs = [_gathered(some, place, runs, index, x, bypass)]
        skip_outputs = [skip.add("Identity", [bypass], f"skip{index}/output")]
        outputs = [output]
        # What an entry comes after is pooled after the entry.
        if gate.carries and index < network.num_gates and not entering[index + 1]:
            carried = f"pooled{index + 1}"
            outputs.append(carried)
            plain_outputs.append(gate.pool(plain, index, plain_outputs[0], f"block{index}"))
            some_outputs.append(gate.pool(some, index, some_outputs[0], f"some{index}"))
            if bypass == x:
                kept = skip.add("Identity", [gate.carried], f"skip{index}/pooled")
            else:
                kept = gate.pool(skip, index, skip_outputs[0], f"skip{index}")
            skip_outputs.append(kept)
            gate.carried = carried
        all_run = run.add("ReduceMin", [runs], f"{name}/all", keepdims=0)
        run.add(
            "If",
            [all_run],
            [f"run{index}/{name}" for name in outputs],
            then_branch=plain.as_branch(f"block{index}", plain_outputs),
            else_branch=some.as_branch(f"some{index}", some_outputs),
        )
        graph.add(
            "If",
            [any_runs],
            outputs,
            then_branch=run.as_branch(f"run{index}", [f"run{index}/{name}" for name in outputs]),
            else_branch=skip.as_branch(f"skip{index}", skip_outputs),
        )
        x = output
    parts.place(graph, network.head, [examples.last], "head", [x], LOGITS)
    if gate is not None:
        joined = graph.add("Concat", decided, "gates/runs", axis=-1)
        shape = graph.constant("gates/shape", np.array([-1, len(decided)]))
        graph.add("Reshape", [joined, shape], DECISIONS)


def _gathered(graph: _Graph, place: Any, runs: str, index: int, x: str, bypass: str) -> str:
    """The block on the rows that run, over the bypass of the others."""
    name = f"some{index}"
    flat = graph.add("Reshape", [runs, graph.constant("minus1", np.array([-1]))], f"{name}/flat")
    indices = graph.add("NonZero", [flat], f"{name}/indices")
    rows = graph.add("Squeeze", [indices, graph.constant("zero", np.array([0]))], f"{name}/rows")
    active = graph.add("Gather", [x, rows], f"{name}/active")
    active_bypass = active
    if bypass != x:
        active_bypass = graph.add("Gather", [bypass, rows], f"{name}/bypass")
    done = place(graph, name, [active, active_bypass], f"{name}/done")
    places = graph.add("Transpose", [indices], f"{name}/places")
    return graph.add("ScatterND", [bypass, places, done], f"{name}/output")


class _RecurrentGate:
    """The recurrent gate: pooled features carried from block to block, one LSTM node a gate."""

    carries = True

    def __init__(self, gate: RNNGate, graph: _Graph, features: Sequence[Tensor]) -> None:
        self.gate, self.graph = gate, graph
        self.ranks = [x.ndim for x in features]
        self.carried = ""
        self.state = ("", "")
        cell, project = gate.lstm, gate.project
        self.recurrent = graph.constant("gate/R", _iofc(cell.weight_hh)[None])
        self.project = graph.constant("gate/project", project.weight.detach().numpy().T)
        # h w + b > 0 as h w > -b: one node less a gate.
        self.threshold = -project.bias.detach().numpy()

    def pool(self, graph: _Graph, index: int, features: str, name: str) -> str:
        """Global average pool to [1, batch, channels], as the LSTM reads it."""
        width = self.gate.channels[index]
        shape = self.graph.constant(f"gate/shape{width}", np.array([1, -1, width]))
        if self.gate.layout == "maps":
            pooled = graph.add("GlobalAveragePool", [features], f"{name}/average")
        else:
            axes = self.graph.constant(f"gate/axes{index}", np.arange(1, self.ranks[index] - 1))
            pooled = graph.add("ReduceMean", [features, axes], f"{name}/average")
        return graph.add("Reshape", [pooled, shape], f"{name}/pooled")

    def logit(self, index: int, features: str) -> str:
        """Logit less the bias, [1, batch, 1]."""
        gate, graph, name = self.gate, self.graph, f"gate{index}"
        embed, cell = gate.embed[index - 1], gate.lstm
        assert isinstance(embed, nn.Linear) and self.carried
        # W (E p + e) + b: the linear a block, in float64, becomes part of the input weights.
        weight = cell.weight_ih.double() @ embed.weight.double()
        bias = cell.weight_ih.double() @ embed.bias.double() + cell.bias_ih.double()
        biases = np.concatenate([_iofc(bias.float()), _iofc(cell.bias_hh)])
        inputs = [
            self.carried,
            graph.constant(f"{name}/W", _iofc(weight.float())[None]),
            self.recurrent,
            graph.constant(f"{name}/B", biases[None]),
            "",
            *self.state,
        ]
        self.state = (f"{name}/hidden", f"{name}/cell")
        hidden = cell.hidden_size
        graph.add("LSTM", inputs, ["", *self.state], hidden_size=hidden)
        return graph.add("MatMul", [self.state[0], self.project], f"{name}/logit")


class _FeedForwardGate:
    """Feed-forward gates: a module a gate, nothing carried."""

    carries = False
    carried = ""

    def __init__(
        self,
        units: Sequence["_Column"],
        graph: _Graph,
        parts: _Parts,
        features: Sequence[Tensor],
    ) -> None:
        self.units, self.graph, self.parts, self.features = units, graph, parts, features
        self.threshold = np.zeros(1, np.float32)

    def pool(self, graph: _Graph, index: int, features: str, name: str) -> str:
        raise AssertionError("nothing is carried")

    def logit(self, index: int, features: str) -> str:
        """Logit, [batch, 1]."""
        unit, example = self.units[index - 1], [self.features[index]]
        name = f"gate{index}"
        return self.parts.place(self.graph, unit, example, name, [features], f"{name}/logit")


class _Column(nn.Module):
    """A feed-forward gate's unit with one output, the logit, as a column [batch, 1]."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.pool = unit.pool
        self.layers = fold_batch_norms(cast(nn.Module, unit.layers))
        # execute - skip, of one linear: the linear of the difference.
        pair = cast(nn.Linear, unit.linear)
        self.linear = nn.Linear(pair.in_features, 1)
        with torch.no_grad():
            self.linear.weight.copy_(pair.weight[1:] - pair.weight[:1])
            self.linear.bias.copy_(pair.bias[1:] - pair.bias[:1])

    def forward(self, features: Tensor) -> Tensor:
        if self.pool and min(features.shape[2:]) >= 2:
            features = functional.max_pool2d(features, 2)
        column: Tensor = self.linear(self.layers(features).mean(dim=(2, 3)))
        return column


def _columns(gate: Gate | None) -> list[_Column]:
    # By exact type: a subclass may compute something else.
    if gate is None or type(gate) is RNNGate:
        return []
    if isinstance(gate, FFGateI | FFGateII) and type(gate) in (FFGateI, FFGateII):
        return [_Column(unit) for unit in gate.units]
    raise UserError(f"cannot export gates of kind {type(gate).__name__}: use rnn, ff1 or ff2")


def _iofc(tensor: Tensor) -> np.ndarray:
    """Rows of an LSTM's parameter in ONNX's order (input, output, forget, cell), not torch's."""
    i, f, c, o = tensor.detach().chunk(4)
    return torch.cat([i, o, f, c]).numpy()


def _value(name: str, kind: int, shape: Iterable[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


@dataclass
class _Template:
    """A module as nodes.

    Attributes:
        nodes: The nodes, in order.
        tensors: What they read, and the key in the module's state if it is one of its weights.
        inputs: Names of the inputs.
        output: Name of the output.
    """

    nodes: list[NodeProto]
    tensors: list[tuple[TensorProto, str]]
    inputs: list[str]
    output: str


class _SideBySide(nn.Module):
    """Modules that have nothing to do with each other: one call of the exporter takes them all."""

    def __init__(self, modules: Sequence[nn.Module], arity: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.arity = arity

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rest = iter(inputs)
        return tuple(
            part(*islice(rest, count)) for part, count in zip(self.parts, self.arity, strict=True)
        )


def _translate(parts: Sequence[tuple[nn.Module, Sequence[Tensor]]]) -> list[_Template]:
    """Export modules with their batch sizes left open."""
    # Copies, so that each has weights of its own even where a network uses a module twice.
    modules = [copy.deepcopy(module) for module, _ in parts]
    together = _SideBySide(modules, [len(example) for _, example in parts])
    # A batch size of its own for each, so that none is read off another's input.
    sizes = [
        {0: torch.export.Dim(f"batch{index}")} for index, (_, e) in enumerate(parts) for _ in e
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter's own, about itself.
        program = torch.onnx.export(
            together.eval(),
            tuple(tensor.clone() for _, example in parts for tensor in example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(tuple(sizes),),
            # Each instance brings its own weights: nothing may be computed from these ones.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph: onnx.GraphProto = program.model_proto.graph
    inputs = iter([value.name for value in graph.input])
    return [
        _cut(graph, list(islice(inputs, len(example))), output.name, module, f"parts.{index}.")
        for index, ((module, example), output) in enumerate(zip(parts, graph.output, strict=True))
    ]


def _cut(
    graph: onnx.GraphProto, inputs: list[str], output: str, module: nn.Module, prefix: str
) -> _Template:
    """The nodes that lead from inputs to an output."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    state = module.state_dict()
    tensors = [
        (tensor, key if (key := tensor.name.removeprefix(prefix)) in state else "")
        for tensor in graph.initializer
        if tensor.name in needed
    ]
    others = {value.name for value in graph.input} & needed - set(inputs)
    assert not others, f"{prefix} reads inputs of another part: {others}"
    return _Template(nodes[::-1], tensors, inputs, output)


def _signature(module: nn.Module, example: Sequence[Tensor]) -> str:
    """What makes the translation of a module, its weights aside."""
    parts: list[Any] = []
    ordinary = vars(nn.Module()).keys()
    state = module.state_dict()
    for name, layer in module.named_modules():
        traced = isinstance(layer, torch.fx.GraphModule)
        own = [
            (key, _fact(value))
            for key, value in sorted(vars(layer).items())
            # What a traced module keeps besides tensors is about its code.
            if key not in ordinary and (not traced or isinstance(value, Tensor))
        ]
        parts.append((name, type(layer), layer.code if traced else "", own))
    # A buffer that is not in the state is no weight of an instance.
    parts += [(key, _fact(b)) for key, b in module.named_buffers() if key not in state]
    weights = [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]
    return repr((parts, weights, [tensor.shape for tensor in example]))


def _fact(value: Any) -> Any:
    """What makes a value what it is; its identity where that cannot be told."""
    if value is None or isinstance(value, int | float | str | bool):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_fact, value))
    if isinstance(value, Tensor):
        data = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return value.shape, value.dtype, hashlib.sha256(data).hexdigest()
    return id(value)
