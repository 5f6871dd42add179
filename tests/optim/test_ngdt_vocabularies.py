"""A vocabulary never forms a matrix of its own size squared, not even in the first step."""

import warnings

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import EKFAC, KFAC
from thermo_opt.optim.kronecker import capture, layer_factors

WORDS = 9000


class Words(nn.Module):
    """A table and a read-out of the same words, one weight or two."""

    def __init__(self, words: int, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(words, 4), nn.Linear(4, words, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x))


@pytest.mark.parametrize("metric", [KFAC(), EKFAC(), KFAC(inverse="pseudo+null")])
@pytest.mark.parametrize(("words", "tied"), [(3000, True), (3000, False), (WORDS, False)])
def test_no_factor_is_a_vocabulary_squared(
    metric: KFAC, words: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    made = capture.second_moment

    def watched(rows: torch.Tensor, scale: float, diagonal: bool = False) -> torch.Tensor:
        nonlocal largest
        moment = made(rows, scale, diagonal)
        largest = max(largest, moment.numel())
        return moment

    monkeypatch.setattr(layer_factors, "second_moment", watched)
    torch.manual_seed(0)
    model = Words(words, tied)
    optimizer = to.NGDT(model, metric=metric)
    x = torch.randint(words, (4, 16))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = models.loss(model(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert words <= largest <= max(words, 256**2)
    held = [t for b in optimizer.metric.blocks for a in b.averages() for t in a.value]
    assert sum(t.numel() for t in held) < 300 * words


def test_the_diagonal_kept_of_a_wide_factor_is_the_factors_own() -> None:
    """One step on a linear read-out of more classes than a whole factor may have."""
    torch.manual_seed(0)
    model = nn.Linear(3, WORDS, bias=False).double()
    optimizer = to.NGDT(model, metric=KFAC(max_rows=None), momentum=0.0, damping=1e-2)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(WORDS, (40,))
    f = model(x)
    f.retain_grad()
    models.loss(f, y).backward()
    gradient = model.weight.grad.clone()
    optimizer.step()
    A = x.mT @ x / 40
    G = 40 * f.grad.square().sum(0)
    pi = ((A.trace() / 3) / G.mean()).sqrt()
    left, right = G + 0.1 / pi, A + pi * 0.1 * torch.eye(3, dtype=torch.float64)
    wanted = (gradient @ torch.linalg.inv(right)) / left[:, None]
    torch.testing.assert_close(optimizer.metric.blocks[0].momentum.vector, wanted)


def test_wide_inputs_keep_diagonal_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2500, 3)
    optimizer = to.NGDT(model)
    x, y = torch.randn(8, 2500), torch.randint(3, (8,))
    models.loss(model(x), y).backward()
    optimizer.step()
    sides = [len(t) for t in optimizer.metric.blocks[0].inverse.A.inverses]
    assert sum(sides) == 2501
    assert max(sides) <= 257


@pytest.mark.parametrize("metric", [KFAC(), EKFAC()])
def test_another_name_of_a_table_that_is_never_called_changes_nothing(metric: KFAC) -> None:
    """As T5's shared table, whose encoder, decoder and read-out have modules of their own."""
    x = torch.randint(30, (4, 16), generator=torch.Generator().manual_seed(0))
    trained = []
    for named in (False, True):
        torch.manual_seed(0)
        model = Words(30, True)
        if named:
            model.shared = nn.Embedding(30, 4)
            model.shared.weight = model.table.weight
        optimizer = to.NGDT(model, metric=metric)
        for _ in range(3):
            optimizer.zero_grad()
            models.loss(model(x), x.flip(0)).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
        resumed = to.NGDT(model, metric=metric)
        resumed.load_state_dict(optimizer.state_dict())
        assert len(resumed.metric.blocks) == 1
        trained.append(model.table.weight.detach())
    assert torch.equal(*trained)
