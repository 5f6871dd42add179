"""What NGD-T keeps between steps: half-precision factors and inverses, and narrow blocks beside
wide sides."""

import pytest
import torch
from torch import nn

import thermo_opt as to
from analysis.networks import ConvNet
from analysis.study_memory import state_size
from tests.optim import optim_models as models
from thermo_opt.optim import KFAC
from thermo_opt.optim.kronecker.capture import RunningAverage, add_all, stack_averages
from thermo_opt.optim.kronecker.half import Half


def factor(k: int) -> torch.Tensor:
    x = torch.randn(3, 2 * k, k) * torch.logspace(-3, 2, k)
    return x.mT @ x


def test_half_precision_is_close_keeps_what_it_gave_and_takes_any_scale() -> None:
    torch.manual_seed(0)
    for scale in (1e-30, 1.0, 1e20):
        t = scale * factor(20)
        kept = Half.of(t)
        again = kept.whole()
        largest = t.amax((-2, -1), keepdim=True)
        assert bool(((again - t).abs() <= 2**-11 * t.abs() + 6e-8 * largest).all())
        assert torch.equal(Half.of(again).whole(), again)
        assert kept.values.element_size() == 2
    assert torch.equal(Half.of(torch.zeros(1, 4, 4)).whole(), torch.zeros(1, 4, 4))


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, metric: KFAC) -> to.NGDT:
    optimizer = to.NGDT(model, metric=metric)
    for _ in range(3):
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def test_the_state_of_a_small_convolutional_network_is_below_six_times_its_parameters() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    sizes = {}
    for half in (True, False):
        model = ConvNet()
        optimizer = trained(model, x, y, KFAC(half_state=half, max_solve_overhead=float("inf")))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        sizes[half] = state_size(optimizer) / size
    assert sizes[True] < 6 < sizes[False]


def test_the_state_of_a_wide_language_model_is_below_four_times_its_parameters() -> None:
    """Momentum and all: a block of GPT-2 small's width, with AdamW at 2."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(1000, 768), layer, nn.Linear(768, 1000))
    tokens = torch.randint(1000, (2, 16))
    optimizer = to.NGDT(model)
    models.loss(model(tokens), tokens.flip(1)).backward()
    optimizer.step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 1 < state_size(optimizer) / size < 4


def test_half_precision_barely_changes_a_step() -> None:
    x, y = models.minibatch(models.digits(), 0, 64)
    moved = []
    for half in (True, False):
        model = models.mlp()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = to.NGDT(model, metric=KFAC(half_state=half), calibration=None)
        models.loss(model(x), y).backward()
        optimizer.step()
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.01


@pytest.mark.parametrize("side", ["out", "in"])
def test_the_narrow_side_of_a_wide_layer_is_cut_like_any_other(side: str) -> None:
    torch.manual_seed(0)
    wide, narrow = 2100, 300
    model = nn.Linear(*((narrow, wide) if side == "out" else (wide, narrow)))
    x, y = torch.randn(8, model.in_features), torch.randint(model.out_features, (8,))
    optimizer = trained(model, x, y, KFAC())
    inverse = optimizer.metric.blocks[0].inverse
    for factor, size in ((inverse.A, model.in_features + 1), (inverse.G, model.out_features)):
        sides = [t.shape[-1] for t in factor.inverses]
        assert sum(sides) == size
        assert max(sides) <= 129


def test_a_tied_weights_narrow_side_is_cut_to_the_blocks_of_the_whole_factors() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(2500, 256), nn.Linear(256, 2500, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    x = torch.randint(2500, (4, 8), generator=torch.Generator().manual_seed(0))
    found = {}
    for most in (0.05, float("inf")):
        metric = KFAC(max_solve_overhead=most, half_state=False)
        optimizer = to.NGDT(Words(), metric=metric, calibration=None)
        models.loss(optimizer.model(x), x.flip(0)).backward()
        optimizer.step()
        found[most] = optimizer.metric.blocks[0].factors()
    (A, G), (whole_A, whole_G) = found.values()
    assert [len(t) for t in G.blocks] == [128, 128]
    assert A.diagonal
    torch.testing.assert_close(A.matrix, whole_A.matrix)
    for j, block in enumerate(G.blocks):
        part = slice(128 * j, 128 * (j + 1))
        torch.testing.assert_close(block, whole_G.matrix[part, part])


@pytest.mark.parametrize("half", [False, True])
def test_averages_of_many_layers_are_those_of_each(half: bool) -> None:
    """What is kept in half precision, of one shape and age, is averaged in one batch."""
    torch.manual_seed(0)
    together, alone = ([RunningAverage(half=half) for _ in range(4)] for _ in range(2))
    for step in range(3):
        seen = range(4) if step else range(3)  # the last one is younger
        new = [[r @ r.mT for r in (torch.randn(5, 5), torch.randn(3, 3))] for _ in seen]
        new = [[*matrices, torch.rand(7)] for matrices in new]
        add_all([together[j] for j in seen], new, 0.95)
        for j, tensors in zip(seen, new, strict=True):
            alone[j].add(tensors, 0.95)
    assert [average.count for average in together] == [3, 3, 3, 2]
    for one, other in zip(together, alone, strict=True):
        for t, own in zip(one.value, other.value, strict=True):
            assert torch.equal(t, own)
    stacked = stack_averages(together)
    assert [t.shape for t in stacked] == [(4, 5, 5), (4, 3, 3), (4, 7)]
    for j, average in enumerate(alone):
        assert all(torch.equal(t[j], own) for t, own in zip(stacked, average.value, strict=True))
