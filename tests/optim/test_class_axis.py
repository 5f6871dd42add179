"""The same predictions train the same whatever axis holds the classes, since the loss's gradient
tells."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.fisher.likelihoods import Categorical
from thermo_opt.optim.class_axis import ClassAxis
from thermo_opt.optim.forward_pass import ForwardPass


class Positions(nn.Module):
    """Classes of every place of a grid, along axis 1 or the last."""

    def __init__(self, rank: int, last: bool, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.net = nn.Sequential(conv(2, 6, 3, padding=1), nn.Tanh(), conv(6, 5, 1))
        self.last, self.normalised = last, normalised

    def forward(self, x: Tensor) -> Tensor:
        f = self.net(x)
        f = f.log_softmax(1) if self.normalised else f
        return f.movedim(1, -1) if self.last else f


def losses(rank: int, last: bool, normalised: bool = False, **options: object) -> list[float]:
    """Of a few steps, without a word but for the axis that is not the last."""
    model = Positions(rank, last, normalised)
    x = torch.randn(6, 2, *(7, 4, 3)[:rank], generator=torch.Generator().manual_seed(1))
    y = x[:, 0].sign().long() + x[:, 1].sign().long() + 2
    optimizer = to.NGDT(model, **options)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default" if not last else "error", "of the model's outputs")
        for _ in range(6):
            f = model(x) if last else model(x).movedim(1, -1)
            loss = functional.nll_loss(f.log_softmax(-1).flatten(0, -2), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
            assert optimizer.last_step["loss_scale"] == pytest.approx(1.0, rel=1e-3)
            assert optimizer.last_step["realised"] < 2 * 0.01
    return found


def test_an_axis_that_is_not_the_last_is_said_once() -> None:
    model, x = Positions(2, False), torch.randn(6, 2, 7, 4)
    optimizer = to.NGDT(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
    assert [str(one.message).count("axis 1 is taken for the classes") for one in said] == [1]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_axis_of_the_classes_changes_nothing(rank: int) -> None:
    assert losses(rank, last=True) == pytest.approx(losses(rank, last=False), rel=1e-5)


def test_log_probabilities_train_as_the_logits_do_and_are_no_other_loss() -> None:
    logits = losses(2, last=True)
    for last in (True, False):
        assert losses(2, last, normalised=True) == pytest.approx(logits, rel=1e-3)


def test_sampled_labels_lie_along_the_losss_axis() -> None:
    sampled = to.optim.KFAC(fisher_type="mc")
    torch.manual_seed(3)
    first = losses(2, last=True, metric=sampled)
    torch.manual_seed(3)
    assert losses(2, last=False, metric=sampled) == pytest.approx(first, rel=1e-5)


def test_a_metric_of_the_minibatch_refuses_classes_where_it_does_not_look() -> None:
    with pytest.raises(to.InputError, match="along axis 1, and the loss has them along axis -1"):
        losses(2, last=True, metric="exact")


def test_no_axis_is_taken_from_a_loss_that_is_no_softmax_cross_entropy() -> None:
    axes = ClassAxis(Categorical())
    for g, axis in ((torch.ones(3, 4, 5, 6), 1), (torch.zeros(3, 4, 5, 6), 1)):
        seen = ForwardPass(nn.Identity(), (), {}, torch.randn(3, 4, 5, 6))
        seen.receive(0, g)
        axes.arrange(seen)
        assert seen.axis == axis  # torch's convention
        assert seen.outputs.shape == (3, 30, 4)
    seen = ForwardPass(nn.Identity(), (), {}, torch.randn(3, 4, 5, 6))
    seen.receive(0, seen.outputs.softmax(-1) - torch.eye(6)[0])
    axes.arrange(seen)
    assert seen.axis == -1
    assert seen.terms == 3 * 4 * 5


@pytest.mark.parametrize("calls", [1, 2])
def test_similarities_are_predictions_in_both_directions_of_a_contrastive_loss(calls: int) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            s = self.one(x) @ self.other(x.flip(1)).mT
            return {"images": s, "texts": s.mT}

    model, labels = Pairs(), torch.arange(24)
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    optimizer = to.NGDT(model, weight_decay=0.0)
    for _ in range(6):
        before = model(x)["images"]
        other = model(x)["texts"] if calls == 2 else before.mT
        loss = functional.cross_entropy(before, labels) + functional.cross_entropy(other, labels)
        optimizer.zero_grad()
        (loss / 2).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        now = model(x)["images"]
        kl = [Categorical().kl(f, after) for f, after in ((before, now), (before.mT, now.mT))]
        mean = float(torch.stack(kl).mean().detach())
        assert optimizer.last_step["realised"] == pytest.approx(mean, rel=0.05)
        assert mean < 1.3 * 0.01
