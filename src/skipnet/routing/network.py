"""SkipNet: a residual network in which gates decide, image by image, which blocks run."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from skipnet.errors import UserError
from skipnet.execution.auto import auto
from skipnet.execution.compacted import compacted
from skipnet.execution.fused import fold_batch_norms
from skipnet.execution.masked import masked
from skipnet.routing.cost import Cost
from skipnet.routing.counting import count_macs, skeleton
from skipnet.routing.decisions import Decision, Fixed, Random, named_decision
from skipnet.routing.gates import Gate, State
from skipnet.routing.trace import Routing
from skipnet.sharing import Shareable

Executor = Callable[..., Tensor]
ExecutorName = Literal["masked", "compacted", "auto"]

EXECUTORS: dict[str, Executor] = {"masked": masked, "compacted": compacted, "auto": auto}


class SkipNet(Shareable, nn.Module):
    """A residual network taken apart, with a gate that decides about every block but the first.

    `x[i+1] = g_i * Block_i(x[i]) + (1 - g_i) * Shortcut_i(x[i])` (SkipNet, equation 1). The gate
    that decides about block i reads the output of block i - 1, so K blocks have K - 1 gates.

    Args:
        stem: Images to features.
        blocks: Whole residual blocks, activation included, each `(x, Shortcut_i(x)) -> output`: the
            shortcut runs once, whether the block adds it or it replaces the block.
        shortcuts: One a block: identity, or the projection where shapes change.
        head: Features to class logits.
        gate: Decides about blocks 1 to K - 1; None gives the dense network.
        entries: One a block: what runs on its input before anything else does, always, and before
            the gate decides; identities if not given.

    Attributes:
        sources: The names in another model's state dict of what this network shares with it, by its
            own names; see `models.adapters`.
        fixed_blocks: Numbers of that model's blocks, from 0, which are entries here or in the head:
            they always run, as does its first.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        shortcuts: Sequence[nn.Module],
        head: nn.Module,
        gate: Gate | None = None,
        entries: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        entries = [nn.Identity() for _ in blocks] if entries is None else entries
        if len(entries) != len(blocks):
            raise UserError(f"{len(blocks)} blocks but {len(entries)} entries: one a block")
        if len(blocks) < 2:
            raise UserError(f"a routed network needs at least 2 residual blocks, not {len(blocks)}")
        if len(blocks) != len(shortcuts):
            raise UserError(f"{len(blocks)} blocks but {len(shortcuts)} shortcuts: one a block")
        if gate is not None and len(gate.channels) != len(blocks) - 1:
            raise UserError(
                f"{len(blocks)} blocks need {len(blocks) - 1} gates, not {len(gate.channels)}: "
                "the first block always runs"
            )
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.shortcuts = nn.ModuleList(shortcuts)
        self.entries = nn.ModuleList(entries)
        self.sources: dict[str, str] = {}
        self.fixed_blocks: tuple[int, ...] = ()
        self._hub_mixin_config = None  # Made when it is saved; these arguments are no settings.
        self.head = head
        self.gate = gate
        self._costs: dict[tuple[int, ...], Cost] = {}

    @property
    def num_gates(self) -> int:
        """Number of blocks that can be skipped; 0 for a dense network."""
        return 0 if self.gate is None else len(self.gate.channels)

    def forward(
        self,
        images: Tensor,
        *,
        decide: str | Decision = "threshold",
        execute: ExecutorName = "masked",
    ) -> tuple[Tensor, Routing]:
        """Classify a batch, skipping blocks as the gates decide.

        Args:
            images: [batch, channels, height, width].
            decide: How a gate's logit becomes g: "threshold", "straight-through", "sample", "soft",
                or a `Decision`.
            execute: "masked" runs every block on every row; "compacted" only on the rows with
                g = 1, and needs decisions that are 0 or 1 and carry no gradient; "auto", for
                inference, is the faster of the two for each block.

        Returns:
            Class logits, [batch, classes], and what was decided.

        Raises:
            UserError: On an unknown name, or a decision that the executor cannot honour.
        """
        decision = named_decision(decide) if isinstance(decide, str) else decide
        if execute not in EXECUTORS:
            raise UserError(f"unknown executor {execute!r}: use one of {', '.join(EXECUTORS)}")
        binary = decision.binary(self.training)
        if execute == "auto" and self.training:
            raise UserError(
                'execute="auto" is for inference: in training the executors differ in the rows '
                "that batch norms see; choose masked or compacted"
            )
        if execute != "masked" and self.gate is not None and not binary:
            raise UserError(
                f"{execute} execution leaves rows out, which {type(decision).__name__} decisions "
                "in training do not allow (g is soft or carries a gradient): use execute='masked'"
            )
        if self.gate is not None and isinstance(decision, Fixed | Random):
            decision.demand_gates(self.num_gates)
        run = EXECUTORS[execute]
        in_place = execute != "masked" and len(images) > 1 and self._owns_features()
        if in_place:
            run = partial(run, in_place=True)
        state: State = None
        logits: list[Tensor] = []
        decisions: list[Tensor] = []

        features = self.stem(images)
        parts = zip(self.entries, self.blocks, self.shortcuts, strict=True)
        for index, (entry, block, shortcut) in enumerate(parts):
            features = entry(features)
            bypass = shortcut(features)
            if self.gate is None or index == 0:
                features = block(features, bypass)
                if in_place and index == 0 and features.data_ptr() == images.data_ptr():
                    features = features.clone()
                continue
            logit, state = self.gate(index - 1, features, state)
            g = decision(logit, index - 1, self.training)
            features = run(block, features, bypass, g > 0 if binary else g)
            logits.append(logit)
            decisions.append(g)
        none = images.new_zeros(len(images), 0)
        return self.head(features), Routing(
            logits=torch.stack(logits, dim=1) if logits else none,
            decisions=torch.stack(decisions, dim=1) if decisions else none,
            cost=self.cost(*images.shape[1:]),
        )

    def _owns_features(self) -> bool:
        """Whether nobody but the forward pass sees features: neither gradients nor hooks."""
        if self.training or torch.is_grad_enabled():
            return False
        return not any(part._forward_hooks or part._forward_pre_hooks for part in self.modules())

    def original_state_dict(self) -> dict[str, Tensor]:
        """Return what this network shares with the model it was made of, under that one's names."""
        own = self.state_dict()
        return {name: own[key] for key, name in self.sources.items()}

    def load_original_state_dict(
        self, tensors: Mapping[str, Tensor], *, new_classes: bool = False
    ) -> list[str]:
        """Copy weights in from a state dict of the model this network was made of.

        Args:
            tensors: By that model's names.
            new_classes: Leave a classifier as it is whose number of classes is another.

        Returns:
            Names, of `tensors`, of what was left as it is.

        Raises:
            UserError: When names are missing or left over, or shapes differ; nothing is copied.
        """
        own = self.original_state_dict()
        fitting = dict(tensors)
        if new_classes:
            head = {name for key, name in self.sources.items() if key.startswith("head.")}
            fitting |= {
                name: own[name]
                for name in head & tensors.keys()
                if _of_other_classes(own[name], tensors[name])
            }
        demand_fitting(own, fitting, "what is to be loaded")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(fitting[name])
        return [name for name in own if fitting[name] is own[name]]

    def fuse(self) -> "SkipNet":
        """Return a copy for inference, batch norms folded into the convolutions before them.

        Logits and decisions are the same to rounding. The copy is in evaluation mode and is not to
        be trained or saved: it has other parameters.
        """
        fused = copy.deepcopy(self).eval()
        fused.sources, fused.info = {}, None
        for name, part in fused.named_children():
            if isinstance(part, nn.ModuleList):
                for index, module in enumerate(part):
                    part[index] = fold_batch_norms(module)
            else:
                setattr(fused, name, fold_batch_norms(part))
        return fused.eval()

    def cost(self, channels: int, height: int, width: int) -> Cost:
        """Return the multiply-adds of every part for one image of this size.

        They are counted once a size: a network whose layers are replaced is to be built anew.
        """
        size = (channels, height, width)
        if size not in self._costs:
            measure = self._measure
            if "torch._dynamo" in sys.modules:  # Not to be traced; the import takes seconds.
                measure = torch.compiler.disable(measure)
            measure(size)
        return self._costs[size]

    def _measure(self, size: tuple[int, int, int]) -> None:
        shape = torch.empty(2, *size, device="meta", dtype=self._dtype())
        self._costs[size] = skeleton(self)._count(shape)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _count(self, images: Tensor) -> Cost:
        stem, features = count_macs(self.stem, images)
        blocks, shortcuts, gates = [], [], []
        state: object = None
        parts = zip(self.entries, self.blocks, self.shortcuts, strict=True)
        for index, (entry, block, shortcut) in enumerate(parts):
            before, features = count_macs(entry, features)
            if self.gate is not None and index > 0:
                macs, output = count_macs(self.gate, index - 1, features, state)
                _, state = output
                gates.append(macs)
            macs, bypass = count_macs(shortcut, features)
            shortcuts.append(before + macs)
            macs, features = count_macs(block, features, bypass)
            blocks.append(macs)
        head, _ = count_macs(self.head, features)
        return Cost(stem, tuple(blocks), tuple(shortcuts), tuple(gates), head)


def demand_fitting(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors have the names and the shapes of a network's own.

    Args:
        own: By name.
        tensors: By name.
        what: What they are, for the message.

    Raises:
        UserError: When names or shapes differ, with the first of them.
    """
    wrong = [f"{name} is missing" for name in own if name not in tensors]
    wrong += [f"{name} is left over" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{what} is of another architecture: {'; '.join(wrong[:3])}{more}")


def _of_other_classes(own: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors differ as a linear classifier's do whose number of classes differs."""
    differ = 0 < own.ndim == theirs.ndim <= 2 and len(own) != len(theirs)
    return differ and own.shape[1:] == theirs.shape[1:]
