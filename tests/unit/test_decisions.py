"""Decisions: what becomes of a logit, and which of it may be left out of a batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import skipnet
from skipnet import Fixed, Gumbel, Random, Sample, Soft, StraightThrough, Threshold, UserError
from skipnet.routing.decisions import Decision, Flip, named_decision

TIE = [-3.0, -1e-6, -0.0, 0.0, 1e-6, 3.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("training", [False, True])
def test_threshold_is_strict(training: bool) -> None:
    g = Threshold()(torch.tensor(TIE), 0, training)
    assert g.tolist() == [0, 0, 0, 0, 1, 1]
    assert not g.requires_grad


@pytest.mark.parametrize(("training", "at_a_tie"), [(True, 1), (False, 0)])
def test_straight_through_runs_at_a_tie_in_training_only(training: bool, at_a_tie: int) -> None:
    g = StraightThrough()(torch.tensor(TIE), 0, training)
    assert g.tolist() == [0, 0, at_a_tie, at_a_tie, 1, 1]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_straight_through_is_exactly_0_or_1_forward_and_sigmoid_backward(
    values: list[float], dtype: torch.dtype
) -> None:
    logit = torch.tensor(values, dtype=dtype, requires_grad=True)
    g = StraightThrough()(logit, 0, True)
    assert g.dtype == dtype
    assert g.tolist() == [float(x >= 0) for x in logit.tolist()]
    g.sum().backward()
    assert logit.grad is not None
    expected = [sigmoid(x) * sigmoid(-x) for x in logit.tolist()]
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
    assert logit.grad.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_gumbel_samples_forward_and_differentiates_the_noisy_sigmoid() -> None:
    logit = torch.full((20_000,), 0.8, dtype=torch.float64, requires_grad=True)
    g = Gumbel(generator())(logit, 0, True)
    assert set(g.tolist()) == {0.0, 1.0}
    assert g.mean().item() == pytest.approx(sigmoid(0.8), abs=0.01)
    g.sum().backward()
    # The same noise again: sigmoid is monotone, so g = 1 where the noisy logit is above 0.
    uniform = torch.rand(20_000, generator=generator())
    noisy = 0.8 + (uniform / (1 - uniform)).double().log()
    assert torch.equal(g > 0, noisy > 0)
    assert logit.grad is not None
    expected = torch.sigmoid(noisy) * torch.sigmoid(-noisy)
    torch.testing.assert_close(logit.grad, expected, rtol=1e-3, atol=1e-6)


def test_gumbel_is_the_threshold_outside_of_training() -> None:
    logit = torch.tensor(TIE, requires_grad=True)
    g = Gumbel()(logit, 0, False)
    assert g.tolist() == [0, 0, 0, 0, 1, 1] and not g.requires_grad


def test_straight_through_carries_no_gradient_outside_of_training() -> None:
    logit = torch.tensor(TIE, requires_grad=True)
    assert not StraightThrough()(logit, 0, False).requires_grad
    with torch.no_grad():
        assert not StraightThrough()(logit, 0, True).requires_grad


def test_soft_is_the_probability_in_training_and_hard_at_test() -> None:
    logit = torch.tensor(TIE, dtype=torch.float64)
    assert Soft()(logit, 0, True).tolist() == pytest.approx([sigmoid(x) for x in TIE])
    assert Soft()(logit, 0, False).tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.autograd.gradcheck(
        lambda x: Soft()(x, 0, True), logit.clone().requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("probability", [0.02, 0.5, 0.9])
def test_sample_frequency_is_the_probability(probability: float, training: bool) -> None:
    num = 20_000
    logit = torch.full((num,), math.log(probability / (1 - probability)))
    g = Sample(generator())(logit, 0, training)
    assert set(g.tolist()) == {0.0, 1.0}
    # Five standard deviations of a binomial.
    bound = 5 * math.sqrt(probability * (1 - probability) / num)
    assert abs(g.mean().item() - probability) < bound


def test_sample_draws_rows_and_calls_independently() -> None:
    decision = Sample(generator())
    first, second = (decision(torch.zeros(20_000), i, True) for i in range(2))
    bound = 5 * 0.25 / math.sqrt(20_000)
    for a, b in [(first, second), (first[:-1], first[1:])]:
        assert abs(((a - 0.5) * (b - 0.5)).mean().item()) < bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sample_draws_fine_probabilities_whatever_the_precision(dtype: torch.dtype) -> None:
    # 1/512 is below the spacing of uniform bfloat16 numbers.
    num, probability = 100_000, 1 / 512
    logit = torch.full((num,), math.log(probability / (1 - probability)), dtype=dtype)
    rate = Sample(generator())(logit, 0, True).float().mean().item()
    assert abs(rate - probability) < 5 * math.sqrt(probability / num) + 0.01 * probability


def test_sample_never_runs_at_minus_infinity_and_always_at_plus_infinity() -> None:
    logit = torch.tensor([-math.inf, math.inf]).repeat(500)
    assert torch.equal(Sample(generator())(logit, 0, True), (logit > 0).float())


@pytest.mark.parametrize("make", [Sample, lambda g: Random(0.5, g)])
def test_own_generator_reproduces_and_leaves_torchs_alone(make: type[Sample]) -> None:
    logit = torch.zeros(64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = make(generator(1))(logit, 0, True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(make(generator(1))(logit, 0, True), first)
    assert not torch.equal(make(generator(2))(logit, 0, True), first)


@pytest.mark.parametrize("make", [Sample, lambda: Random(0.5)])
def test_without_a_generator_torchs_own_seed_rules(make: type[Sample]) -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(make()(torch.zeros(64), 0, True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sample_passes_no_gradient() -> None:
    assert not Sample(generator())(torch.zeros(4, requires_grad=True), 0, True).requires_grad


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_fixed_mask_a_gate_for_all_rows_alike(dtype: torch.dtype) -> None:
    decision = Fixed(torch.tensor([1, 0, 1]).to(dtype))
    logit = torch.randn(4, dtype=torch.float64, generator=generator())
    for index, expected in enumerate([1, 0, 1]):
        g = decision(logit, index, True)
        assert g.dtype == torch.float64 and g.tolist() == [expected] * 4


def test_fixed_mask_a_row() -> None:
    mask = torch.tensor([[1, 0], [0, 0], [0, 1]])
    for index in range(2):
        assert torch.equal(Fixed(mask)(torch.zeros(3), index, False), mask[:, index].float())


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor(1),
        torch.ones(1, 1, 1),
        torch.tensor([0.5]),
        torch.tensor([2]),
        torch.tensor([-1]),
        torch.tensor([math.nan]),
    ],
    ids=str,
)
def test_fixed_refuses_a_mask_that_is_none(mask: Tensor) -> None:
    with pytest.raises(UserError, match="fixed mask"):
        Fixed(mask)


@pytest.mark.parametrize(
    "shape",
    [(7,), (9,), (0,), (2, 7), (2, 9), (1, 8), (3, 8)],
    ids=str,
)
def test_fixed_refuses_a_mask_of_another_network_or_batch(shape: tuple[int, ...]) -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn").eval()
    images = torch.zeros(2, 3, 8, 8)
    network(images, decide=Fixed(torch.ones(2, 8)))
    with pytest.raises(UserError, match="fixed mask"):
        network(images, decide=Fixed(torch.ones(shape)))


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0, 0, 1])
def test_random_keeps_at_its_rate_whatever_the_logit(rate: float) -> None:
    num = 20_000
    for logit in (-100.0, 100.0):
        g = Random(rate, generator())(torch.full((num,), logit), 0, False)
        assert abs(g.mean().item() - rate) <= 5 * math.sqrt(rate * (1 - rate) / num)


def test_random_has_a_rate_a_gate() -> None:
    decision = Random((0.0, 1.0, 0.5), generator())
    means = [decision(torch.zeros(2000), index, True).mean().item() for index in range(3)]
    assert means[:2] == [0, 1] and abs(means[2] - 0.5) < 5 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("keep", [-0.1, 1.1, math.nan, (0.5, 2.0)])
def test_random_refuses_what_is_no_probability(keep: float) -> None:
    with pytest.raises(UserError, match="keep rates"):
        Random(keep)


@pytest.mark.parametrize("num_rates", [7, 9])
def test_random_refuses_rates_of_another_network(num_rates: int) -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn").eval()
    network(torch.zeros(1, 3, 8, 8), decide=Random((0.5,) * 8))
    with pytest.raises(UserError):
        network(torch.zeros(1, 3, 8, 8), decide=Random((0.5,) * num_rates))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("threshold", Threshold),
        ("straight-through", StraightThrough),
        ("sample", Sample),
        ("soft", Soft),
    ],
)
def test_decisions_by_name(name: str, kind: type) -> None:
    assert type(named_decision(name)) is kind


def test_unknown_decision_names_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"'hard'.*threshold, straight-through, gumbel, sample, soft"
    ):
        named_decision("hard")


EVERY = [
    Threshold(),
    StraightThrough(),
    Gumbel(generator()),
    Sample(generator()),
    Soft(),
    Fixed(torch.ones(8)),
    Flip(torch.zeros(1, dtype=torch.int64)),
    Random(0.5, generator()),
]


def refused(decision: Decision, training: bool, grad: bool) -> bool:
    """Soft in training is between 0 and 1; straight-through in training carries a gradient."""
    return training and (
        isinstance(decision, Soft) or (isinstance(decision, StraightThrough | Gumbel) and grad)
    )


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("decision", EVERY, ids=lambda decision: type(decision).__name__)
def test_compacted_refuses_exactly_the_decisions_that_leave_no_row_out(
    decision: Decision, training: bool, grad: bool
) -> None:
    network = skipnet.create("cifar_resnet20", gate="rnn").train(training)
    images = torch.zeros(4, 3, 8, 8)
    with torch.set_grad_enabled(grad):
        network(images, decide=decision, execute="masked")
        if refused(decision, training, grad):
            with pytest.raises(UserError, match=r"execute='masked'"):
                network(images, decide=decision, execute="compacted")
        else:
            network(images, decide=decision, execute="compacted")


@pytest.mark.parametrize("decision", EVERY, ids=lambda decision: type(decision).__name__)
def test_binary_decisions_are_0_or_1_and_carry_no_gradient(decision: Decision) -> None:
    for training in (True, False):
        logit = torch.randn(32, generator=generator(), requires_grad=True)
        g = decision(logit, 0, training)
        honest = set(g.tolist()) <= {0.0, 1.0} and not g.requires_grad
        assert decision.binary(training) == honest


@pytest.mark.parametrize("name", ["soft", "straight-through", "sample"])
def test_dense_network_has_nothing_to_decide_and_refuses_nothing(name: str) -> None:
    network = skipnet.create("cifar_resnet20")
    _, routing = network(torch.zeros(2, 3, 8, 8), decide=name, execute="compacted")
    assert routing.decisions.shape == (2, 0)
