"""Outputs of more than two dimensions, and soft targets of images: the outputs lens and the
parameter lens count alike, and lose what torch's own losses say."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt import likelihoods
from thermo_opt.errors import InputError


def pixels(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, outputs, 1)
    ).double()


def tokens(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def normals(f, y):
    mean, log_variance = f.chunk(2, -1)
    return functional.gaussian_nll_loss(
        mean, y, log_variance.exp(), full=True, reduction="sum"
    ) / len(y)


def squares(f, y):
    return functional.gaussian_nll_loss(f, y, torch.ones_like(f), full=True, reduction="sum") / len(
        y
    )


def labels(f, y):
    return functional.binary_cross_entropy_with_logits(f, y, reduction="sum") / len(y)


def rates(f, y):
    return functional.poisson_nll_loss(f, y, reduction="sum") / len(y) + (
        y + 1
    ).lgamma().sum() / len(y)


def soft(*shape):
    return torch.randn(*shape, dtype=torch.float64).mul(3).softmax(1)


CASES = {
    "soft images": (pixels, 4, lambda: soft(6, 4, 8, 8), "categorical", functional.cross_entropy),
    "soft cubes": (pixels, 4, lambda: soft(6, 4, 4, 4), "categorical", functional.cross_entropy),
    "labels of pixels": (pixels, 1, lambda: torch.rand(6, 1, 8, 8), "bernoulli", labels),
    "images": (pixels, 2, lambda: torch.randn(6, 2, 8, 8), "gaussian", squares),
    "counts of tokens": (tokens, 2, lambda: torch.poisson(torch.ones(9, 5, 2)), "poisson", rates),
    "normals of tokens": (tokens, 6, lambda: torch.randn(9, 5, 3), "heteroscedastic", normals),
}


@pytest.mark.parametrize("case", CASES)
def test_two_lenses_count_alike(tmp_path, case):
    make, outputs, targets, likelihood, loss = CASES[case]
    torch.manual_seed(0)
    model, y = make(outputs), targets().double()
    x = torch.randn(6, 3, *y.shape[2:]) if make is pixels else torch.randn(9, 5, 6)
    x = x.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05 / float(y[0].numel()) ** 0.5)
    sigma2 = 1.0 if likelihood == "gaussian" else None
    options = {"probe": (x, y), "likelihood": likelihood, "sigma2": sigma2, "params": True}
    values = []
    with to.Recorder(tmp_path / "run", model=model, optimizer=optimizer, **options) as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            values.append(loss(model(x), y))
            values[-1].backward()
            optimizer.step()
            recorder.step(loss=values[-1])
    found = to.audit(tmp_path / "run", model=model, lens=["outputs", "parameters"])
    seen, closer = (found.lenses[name] for name in ("outputs", "parameters"))
    for lens in (seen, closer):
        expected = [float(value.detach()) for value in values]
        assert lens.steps["loss"].to_numpy() == pytest.approx(expected, rel=1e-9)
    assert closer.steps["a"].to_numpy() == pytest.approx(seen.steps["a"].to_numpy(), rel=0.1)
    assert closer.steps["d"].to_numpy() == pytest.approx(seen.steps["d"].to_numpy(), rel=0.1)
    kl = closer.steps["kl_realised"].to_numpy()
    assert kl == pytest.approx(0.5 * seen.steps["a"].to_numpy(), rel=0.1)


def test_soft_targets_of_images_may_leave_pixels_out():
    logits, targets = torch.randn(2, 3, 4, 5), soft(2, 3, 4, 5)
    targets[:, :, :2] = likelihoods.IGNORED
    counted = to.manifold.embed(logits.numpy(), targets.numpy())
    assert counted.examples == 2 * 2 * 5
    there = functional.cross_entropy(logits[:, :, 2:].double(), targets[:, :, 2:])
    assert counted.mean_loss == pytest.approx(float(there), rel=1e-9)


def test_soft_targets_with_their_classes_last_stay_so():
    logits, targets = torch.randn(2, 3, 4, 5), soft(2, 3, 4, 5)
    one, other = (
        to.manifold.embed(logits.numpy(), t.numpy()) for t in (targets, targets.movedim(1, -1))
    )
    assert one.mean_loss == other.mean_loss


@pytest.mark.parametrize("classes", [False, True])
def test_outputs_that_come_to_look_like_probabilities_are_refused(tmp_path, classes):
    """Those of an untrained network lie near ½, as logits do; at the end of training they don't."""
    y = torch.arange(40) % 2
    targets = y if classes else y[:, None].float()
    path = tmp_path / "run"
    probabilities = [torch.sigmoid((2.0 * y[:, None] - 1) * size) for size in (0.1, 2.0, 6.0)]
    if classes:
        start = torch.randn(40, 2)
        predictions = [start, *(torch.cat([1 - p, p], 1) for p in probabilities[1:])]
    else:
        predictions = probabilities
    path.mkdir()
    for step, outputs in enumerate(predictions):
        np.savez(path / f"step-{step}.npz", logits=outputs.numpy(), targets=targets.numpy())
    likelihood = "categorical" if classes else "bernoulli"
    with pytest.raises(InputError, match="look like probabilities"):
        to.audit(path, likelihood=likelihood)
    if not classes:
        assert to.audit(path, likelihood=likelihood, kind="probabilities").summary["dissipation"]
