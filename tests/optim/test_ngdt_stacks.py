"""Layers of one shape are stacked to one block: the numbers stay those of the layers apart."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.fisher.kronecker import Factor
from thermo_opt.optim import KFAC
from thermo_opt.optim.kronecker import layer_factors, layout
from thermo_opt.optim.kronecker.capture import RunningAverage
from thermo_opt.optim.kronecker.inverses import DampedInverse, KroneckerInverse, invert


class Alike(nn.Module):
    """Blocks of one shape; ``skip`` leaves every third block out of every other pass."""

    def __init__(self, blocks: int = 5, skip: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 20), nn.Linear(20, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 20)) for _ in range(blocks)
        )
        self.skip, self.passes = skip, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += torch.is_grad_enabled()  # measurements repeat a pass as it was
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if not (self.skip and i % 3 == 1 and self.passes % 2 == 0):
                x = x + torch.tanh(block(x))
        return self.last(x)


def trained(
    model: nn.Module, steps: int = 25, groups: list | None = None, **options: object
) -> to.NGDT:
    optimizer = to.NGDT(model.double(), budget=1e-2, params=groups, **options)
    train(model, optimizer, range(steps))
    return optimizer


def train(model: nn.Module, optimizer: to.NGDT, steps: range) -> None:
    data = models.digits()
    for step in steps:
        x, y = models.minibatch(data, step, 64)
        optimizer.zero_grad()
        models.loss(model(x.double()), y).backward()
        optimizer.step()


def test_resume_is_bit_exact() -> None:
    torch.manual_seed(0)
    straight = Alike()
    resumed = copy.deepcopy(straight)
    trained(straight, 60)
    first = trained(resumed, 45)
    state = copy.deepcopy(first.state_dict())
    first.close()
    second = to.NGDT(resumed, budget=1e-2)
    train(resumed, second, range(3))  # stacks of its own, which the saved ones replace
    resumed.load_state_dict(dict(zip(resumed.state_dict(), trained_state(45), strict=True)))
    second.load_state_dict(state)
    train(resumed, second, range(45, 60))
    assert all(
        torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


def trained_state(steps: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Alike()
    trained(model, steps)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("options", "skip"),
    [
        ({}, False),
        ({}, True),
        ({"weight_decay": 0.1}, False),  # a block that isn't seen keeps its wᵀF_λw, too
        ({"cut": True}, False),
        ({"cut": True}, True),
    ],
)
def test_stacked_layers_move_as_they_would_apart(
    skip: bool, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that a step doesn't see keep their own factors. ``cut``: with sides cut to diagonal
    blocks."""
    torch.manual_seed(0)
    together = Alike(skip=skip)
    apart = copy.deepcopy(together)
    options = dict(options)
    cut = options.pop("cut", False)
    if cut:
        monkeypatch.setattr(layout, "SIDES", (10,))
    # A stack has one turn: with all turns at every step it makes no difference, nor does what the
    # blocks that weren't seen are inverted with, since damping is fixed.
    options["damping"] = 1e-2
    options["metric"] = KFAC(max_refresh_interval=1, max_solve_overhead=1e-9 if cut else 0.05)
    stacked = trained(together, **options)
    monkeypatch.setattr(layout, "STACK", 1)
    single = trained(apart, **options)
    assert len(stacked.metric.blocks) == 4
    assert len(single.metric.blocks) == 12
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert stacked.last_step["delta"] == pytest.approx(single.last_step["delta"], rel=1e-8)


def test_stacks_are_of_one_parameter_group_and_no_larger_than_allowed() -> None:
    torch.manual_seed(0)
    model = Alike(blocks=10)
    names = [block.name for block in trained(model, 2).metric.blocks]
    assert len(names) == 6
    assert max(name.count(",") for name in names) == 4  # ten layers: two stacks of five
    model = Alike(blocks=4)
    groups = [
        {
            "params": [
                *model.first.parameters(),
                *model.last.parameters(),
                *model.blocks[:2].parameters(),
            ]
        },
        {"params": model.blocks[2:].parameters(), "lr": 0.5},
    ]
    assert len(trained(model, 2, groups).metric.blocks) == 6


def test_only_the_member_that_cannot_be_inverted_keeps_its_last_inverse() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 12)
    good = x @ x.mT / 12 + torch.eye(6)
    last = DampedInverse(good, 0.1, None)
    invert([last])
    bad = 2 * good
    bad[1] = -torch.eye(6)
    now = DampedInverse(bad, torch.tensor([0.1, 0.2, 0.3]), last)
    invert([now])
    torch.testing.assert_close(now.inverse[1], last.inverse[1])
    torch.testing.assert_close(
        now.inverse[[0, 2]]
        @ (bad + torch.tensor([0.1, 0.2, 0.3])[:, None, None] * torch.eye(6))[[0, 2]],
        torch.eye(6).expand(2, 6, 6),
        rtol=0,
        atol=1e-4,
    )
    torch.testing.assert_close(
        now.matrix @ now.inverse, torch.eye(6).expand(3, 6, 6), rtol=0, atol=1e-3
    )
    assert now.notes == ["factor is not positive definite; kept the last inverse"]


@pytest.mark.parametrize("k", [5, 127, 128, 192, 200])
def test_inverses_of_every_size_class(k: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, k, 2 * k)
    matrix = x @ x.mT / k
    inverses = []
    for _ in range(2):
        found, other = (
            DampedInverse(matrix.clone(), 0.1, None),
            DampedInverse(2 * matrix[0], 0.3, None),
        )
        invert([other, found])
        inverses.append(found.inverse)
    exact = torch.linalg.inv(matrix.double() + 0.1 * torch.eye(k))
    assert float((inverses[0] - exact).norm() / exact.norm()) < 1e-5
    assert inverses[0].is_contiguous()
    assert torch.equal(*inverses)  # the same call gives the same bits, which a resumed run needs


def test_an_inverse_depends_only_in_its_rounding_on_what_is_inverted_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    factors = [torch.randn(m, k, 2 * k) for m, k in ((3, 6), (2, 130), (1, 6), (4, 128), (2, 6))]
    blocks = [x @ x.mT for x in factors]
    found = []
    for together in (1 << 20, 1):
        monkeypatch.setattr("thermo_opt.optim.kronecker.inverses.TOGETHER", together)
        parts = [DampedInverse(block, 0.1, None) for block in blocks]
        invert(parts)
        found.append([part.inverse for part in parts])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_resume_is_bit_exact_where_layers_of_different_shapes_have_factors_of_one_size() -> None:
    """In a step, the factors of side 128 of three layers wait for their inverses at once; on
    resuming, each layer's are alone."""
    torch.manual_seed(0)
    widths = (64, 128, 128, 10)
    straight = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    resumed = copy.deepcopy(straight)
    data = models.digits()

    def steps(model: nn.Module, optimizer: to.NGDT, numbers: range) -> None:
        for step in numbers:
            x, y = models.minibatch(data, step, 64)
            optimizer.zero_grad()
            models.loss(model(x), y).backward()
            optimizer.step()

    steps(straight, to.NGDT(straight, metric=KFAC(max_solve_overhead=math.inf)), range(12))
    first = to.NGDT(resumed, metric=KFAC(max_solve_overhead=math.inf))
    steps(resumed, first, range(8))
    second = to.NGDT(resumed, metric=KFAC(max_solve_overhead=math.inf))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    pairs = zip(first.metric.blocks, second.metric.blocks, strict=True)
    assert all(
        torch.equal(p.inverse, q.inverse)
        for u, v in pairs
        for p, q in zip(u.damped, v.damped, strict=True)
    )
    first.close()
    steps(resumed, second, range(8, 12))
    assert all(
        torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


def test_young_averages_forget_their_first_observations() -> None:
    average = RunningAverage()
    for k in range(40):
        average.add([torch.tensor([float(k == 0), float(k), 1.0])], decay=0.95)
    first, mean, weight = average.value[0].tolist()
    assert first < 1e-4  # a plain mean would keep 1/40 of it
    assert mean == pytest.approx(39 * 4 / 5, abs=1.0)  # weights grow as the third power of the step
    assert weight == pytest.approx(1.0)
    long = RunningAverage()
    for _ in range(1000):
        long.add([torch.ones(1)], decay=0.95)
    long.add([torch.zeros(1)], decay=0.95)
    assert long.value[0].item() == pytest.approx(0.95)


def test_equal_blocks_are_multiplied_as_one() -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(2, 7, 9) for _ in range(3)]
    G = [b @ b.mT for b in blocks]
    A = [(a := torch.randn(2, 5, 9)) @ a.mT]
    solver = KroneckerInverse(Factor(A), Factor(G), 0.1, None)
    invert(solver.damped)
    assert solver.G.equal is not None
    b, v = torch.randn(2, 21, 5), torch.randn(2, 21, 5)
    wanted = 0.7 * b + solver.solve(v)
    solver.accumulate(b, 0.7, v)
    torch.testing.assert_close(b, wanted, rtol=1e-4, atol=1e-5)
    assert not layer_factors.bounds(4, None)[1:]
