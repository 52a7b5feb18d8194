"""One process on one device, or several that train together, and what they tell each other."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipnet.errors import UserError
from skipnet.routing.network import SkipNet
from skipnet.training.config import TrainConfig

if TYPE_CHECKING:  # Fabric takes as long to import as torch does; only training needs it
    from lightning_fabric import Fabric


def launch(config: TrainConfig) -> "Fabric":
    """Join the processes that torchrun has started, or be one on one device.

    Raises:
        UserError: When the machine lacks the device.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        try:
            fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
        except RuntimeError:
            raise UserError(
                f"{config.accelerator} is not available on this machine: use --accelerator auto"
            ) from None
    else:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=local,
            num_nodes=int(os.environ["WORLD_SIZE"]) // local,
            strategy=DDPStrategy(find_unused_parameters=leaves_unused(config)),
            precision=config.precision,
        )
    fabric.launch()
    return fabric


def share_statistics(fabric: "Fabric", model: SkipNet) -> None:
    """Give all processes the first one's: batch norms have seen other images on each."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def all_rows(fabric: "Fabric", rows: Tensor) -> Tensor:
    """Return the rows of all processes, which may have different numbers of them."""
    if fabric.world_size == 1:
        return rows
    count = torch.tensor(len(rows), device=rows.device)
    counts = fabric.all_gather(count)
    assert isinstance(counts, Tensor)
    padded = rows.new_zeros(int(counts.max()), rows.shape[1])
    padded[: len(rows)] = rows
    tables = fabric.all_gather(padded)
    assert isinstance(tables, Tensor)
    return torch.cat([t[:n] for t, n in zip(tables, counts.flatten().tolist(), strict=True)])


def leaves_unused(config: TrainConfig) -> bool:
    """Return whether a block that no row of a batch runs, or a gate, may have no gradient."""
    rows_left_out = (
        config.sp.settles or config.sp.gates_first or config.sp.decide in ("sample", "threshold")
    )
    return "hrl" in config.stages or ("sp" in config.stages and bool(rows_left_out))
