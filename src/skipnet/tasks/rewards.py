"""The reward of skipping and its terms, as pure functions of logits, decisions and losses."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from skipnet.routing.cost import Cost

CostName = Literal["uniform", "macs"]


def block_costs(cost: Cost, kind: CostName) -> Tensor:
    """Return C_i of every gated block, [gates], with mean 1.

    "uniform" is the paper's C_i = 1; "macs" is each block's multiply-adds over their mean, so that
    alpha means the same for both.
    """
    macs = torch.tensor(cost.blocks[1:], dtype=torch.float64)
    return torch.ones_like(macs) if kind == "uniform" else macs / macs.mean()


def skip_rewards(decisions: Tensor, costs: Tensor) -> Tensor:
    """R_i = (1 - g_i) C_i, [batch, gates], for decisions [batch, gates] and costs [gates]."""
    return (1 - decisions) * costs


def reward_to_go(rewards: Tensor) -> Tensor:
    """Sum_{j >= i} R_j with discount 1, [batch, gates]: a decision answers for what follows it."""
    return rewards.flip(1).cumsum(dim=1).flip(1)


def gate_returns(losses: Tensor, rewards: Tensor, alpha: float, beta: float) -> Tensor:
    """r_i = -[beta L - (alpha / N) sum_{j >= i} R_j], [batch, gates], a constant (detached).

    Args:
        losses: Cross-entropy of each image, [batch].
        rewards: R_i, [batch, gates].
        alpha: Weight of skipping.
        beta: Weight of the prediction loss: 1 on CIFAR and SVHN, alpha / N on ImageNet.
    """
    skipping = alpha / rewards.shape[1] * reward_to_go(rewards)
    return (skipping - beta * losses.unsqueeze(1)).detach()


def log_probability(logits: Tensor, decisions: Tensor) -> Tensor:
    """Log p(g_i | x) of Bernoulli decisions, [batch, gates]."""
    return -functional.binary_cross_entropy_with_logits(logits, decisions, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropy of Bernoulli decisions in nats, [batch, gates]."""
    probability = torch.sigmoid(logits)
    return functional.binary_cross_entropy_with_logits(logits, probability, reduction="none")


def information(logits: Tensor) -> Tensor:
    """What each decision tells about the image, in nats, [gates], for logits [batch, gates].

    Mutual information of a sampled decision and the image, over the images of the batch:
    H(mean p) - mean H(p). It is 0 for a gate that decides alike for all images, and for one that
    tosses coins; at most log 2, for a gate that is certain and opens for half of the images.
    """
    mean = torch.sigmoid(logits).mean(dim=0).clamp(1e-6, 1 - 1e-6)
    of_mean = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    return of_mean - entropy(logits).mean(dim=0)


def others_mean(returns: Tensor) -> Tensor:
    """Mean over the *other* entries of the first dimension; 0 where there is none.

    Leaving its own return out keeps a baseline independent of the decision it judges, and the
    estimator unbiased; including it would shrink the gradient by (n - 1) / n.
    """
    count = len(returns)
    if count == 1:
        return torch.zeros_like(returns)
    return (returns.sum(dim=0, keepdim=True) - returns) / (count - 1)


def policy_loss(logits: Tensor, decisions: Tensor, advantages: Tensor) -> Tensor:
    """-Mean over images of sum_i log p(g_i | x) (r_i - b_i): its gradient is REINFORCE's."""
    return -(log_probability(logits, decisions) * advantages).sum(dim=1).mean()


def flip_loss(logits: Tensor, decisions: Tensor, changes: Tensor) -> Tensor:
    """Loss of decisions whose alternative is known: classification weighted by what is at stake.

    Cross-entropy with the better of the two decisions, times how much better it is. Where it is
    least, a logit's sign is that of the mean advantage of executing among images that look alike.

    Args:
        logits: Logit of executing of one gate an image, [batch].
        decisions: What it decided, 0 or 1, [batch].
        changes: How much larger the image's price (loss and computation) is the other way, [batch].
    """
    better = torch.where(changes > 0, decisions, 1 - decisions)
    losses = functional.binary_cross_entropy_with_logits(logits, better, reduction="none")
    return (changes.abs() * losses).mean()
