"""Seeds by purpose and step: random numbers that a resumed run draws again."""

import numpy as np

from skipnet.errors import UserError

ORDER, AUGMENTATION, DECISIONS, WEIGHTS, RANK, EVALUATION, CROP = range(7)
"""Tags of `sub_seed`: what the random numbers are for."""


def sub_seed(seed: int, tag: int, index: int) -> int:
    """Derive an independent seed from a run's seed.

    Args:
        seed: The run's seed, 0 or more.
        tag: What the numbers are for, one of this module's tags.
        index: The epoch, step, stage or rank they are for.

    Returns:
        The first 64-bit word of `numpy.random.SeedSequence((seed, tag, index))`: neighbouring
        inputs give unrelated seeds, and the value is the same on every platform.

    Raises:
        UserError: When the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}; set it to 0 or more")
    return int(np.random.SeedSequence((seed, tag, index)).generate_state(1, np.uint64)[0])
