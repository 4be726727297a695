"""PowerSGD: exact where it can be, nothing lost where it cannot, one answer on all ranks."""

import pytest
import torch
from torch import nn

from plumbline.align.parallel.gradient_compression import PowerSGD
from plumbline.align.ppo import PPOSettings

SHAPES = [(20, 30), (7,), (6, 4, 10), (3, 3)]  # two that pay at rank 2, a vector, one too small


def parameters_with(grads):
    made = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = grad
    return made


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def added_up(world, powers, grads):
    """(gradients after the sum, numbers sent) of each rank."""

    def work(rank):
        sent = 0

        def all_reduce(totals):
            nonlocal sent
            sent += totals.numel()
            return two.add_up(rank, totals)

        parameters = parameters_with([None if g is None else g.clone() for g in grads[rank]])
        powers[rank].add_up(parameters, all_reduce)
        return [p.grad for p in parameters], sent

    two = world(2)
    return two.run(work)


def test_matrices_of_low_rank_are_summed_exactly_and_sent_thin(world):
    one, other = ([torch.outer(d[0][:, 0], d[0][0]), d[1], d[2], d[3]] for d in map(draw, (1, 2)))
    (first, sent), (second, _) = added_up(world, [PowerSGD(2), PowerSGD(2)], [one, other])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first[0], one[0] + other[0], atol=2e-5, rtol=1e-5)  # rank 1 + rank 1
    for at in (1, 3):
        assert torch.equal(first[at], one[at] + other[at])
    assert sent == 2 * (20 + 30) + 2 * (6 + 40) + 7 + 9
    assert not torch.allclose(first[2], one[2] + other[2], atol=0.1)  # full rank does not fit


def test_what_was_left_out_is_sent_later(world):
    """After every call, what went out and what is kept back are all gradients so far."""
    powers = [PowerSGD(1), PowerSGD(1)]
    given = [torch.zeros(shape) for shape in SHAPES]
    out = [torch.zeros(shape) for shape in SHAPES]
    for call in range(4):
        grads = [draw(10 * call), draw(10 * call + 1)]
        (summed, _), _ = added_up(world, powers, grads)
        given = [g + a + b for g, a, b in zip(given, *grads, strict=True)]
        out = [o + s for o, s in zip(out, summed, strict=True)]
        for at in (0, 2):
            kept = sum(power.errors[at] for power in powers).view(SHAPES[at])
            torch.testing.assert_close(out[at] + kept, given[at], atol=2e-5, rtol=1e-5)


def test_a_steady_gradient_arrives(world):
    """The mean of what goes out tends to the gradient itself, and the warm start keeps its leading directions."""
    powers, grads, out = [PowerSGD(1), PowerSGD(1)], [draw(1), draw(2)], 0
    want = grads[0][0] + grads[1][0]
    gaps = []
    for call in range(1, 121):
        (summed, _), _ = added_up(world, powers, grads)
        out = out + summed[0]
        gaps.append(float((out / call - want).norm() / want.norm()))
    assert gaps[-1] < 0.2 < gaps[0]


def test_a_rank_without_a_gradient_counts_as_zero(world):
    (first, _), (second, _) = added_up(world, [PowerSGD(2), PowerSGD(2)], [draw(3), [None] * 4])
    assert torch.equal(first[1], draw(3)[1]) and torch.equal(first[0], second[0])


def test_nothing_to_send_spoils_nothing(world):
    """LoRA's A has no gradient before B has moved: the factors are zero then, and find the next gradient all the same."""
    zeros, powers = [[torch.zeros(shape) for shape in SHAPES]] * 2, [PowerSGD(2), PowerSGD(2)]
    (summed, _), _ = added_up(world, powers, zeros)
    assert all(not grad.any() for grad in summed)
    grads = [[torch.outer(d[0][:, 0], d[0][0]), *d[1:]] for d in map(draw, (1, 2))]
    for _ in range(8):
        (summed, _), _ = added_up(world, powers, grads)
    assert summed[0].norm() > 0.5 * (grads[0][0] + grads[1][0]).norm()


def test_it_goes_on_from_its_state(world):
    whole, broken = [PowerSGD(1), PowerSGD(1)], [PowerSGD(1), PowerSGD(1)]
    for powers in (whole, broken):
        added_up(world, powers, [draw(1), draw(2)])
    fresh = [PowerSGD(1), PowerSGD(1)]
    for power, old in zip(fresh, broken, strict=True):
        power.load_state_dict(old.state_dict())
    results = [added_up(world, powers, [draw(3), draw(4)])[0][0] for powers in (whole, fresh)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ranks_of_a_run_stay_equal_and_save_what_they_kept_back(make_ppo, rolled_out, score_of, world):
    alone, two = make_ppo("llama", perturb=0.05), world(2)
    batch, _ = rolled_out(alone)
    part = (batch, *alone.advantages(batch, score_of([1.0, -2.0, 0.5, 3.0, 0.0, -1.5, 2.0, 1.0]))[:3])
    ranks = [make_ppo("llama", rank=rank, perturb=0.05, gradient_rank=1) for rank in two.ranks]
    two.run(lambda rank: ranks[rank].update(0, *part))
    for a, b in zip(*(ppo.groups[0] + ppo.groups[1] for ppo in ranks), strict=True):
        assert torch.equal(a, b)
    kept = ranks[0].state()["compression"]["errors"]
    assert kept and all(error.abs().sum() > 0 for error in kept.values())
    ranks[1].restore(ranks[0].state())
    assert all(torch.equal(ranks[1].compression.errors[at], error) for at, error in kept.items())


@pytest.mark.parametrize(
    "options, rule", [({"gradient_rank": 0}, "at least 1"), ({"gradient_rank": 2, "dtype": "float16"}, "loss scale")]
)
def test_what_cannot_work_is_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        PPOSettings(**options)
