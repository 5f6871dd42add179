"""Weight decay: its size where none is given, and what it does beside natural gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thermo_opt.optim import NGDT


def layers(count: int) -> nn.Sequential:
    """A network of so many weight matrices, with biases."""
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (layers(1), {}, 0.1),
        (layers(3), {}, 0.1),
        (layers(12), {}, 0.025),
        (layers(12), {"metric": "ekfac"}, 0.025),
        (layers(12), {"likelihood": "bernoulli"}, 0.025),
        (layers(12), {"likelihood": "gaussian"}, 0.0),
        (layers(12), {"likelihood": "poisson"}, 0.0),
        (layers(12), {"metric": "exact"}, 0.0),
        (layers(12), {"weight_decay": 0.0}, 0.0),
        (layers(12), {"weight_decay": 0.7, "metric": "exact"}, 0.7),
    ],
)
def test_default(model: nn.Module, options: dict[str, Any], expected: float) -> None:
    with NGDT(model, **options) as optimizer:
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)


def test_frozen_weights_are_not_counted_and_groups_keep_their_own() -> None:
    model = layers(8)
    for p in model[:4].parameters():
        p.requires_grad_(False)
    weights, biases = (
        [p for p in model.parameters() if p.requires_grad and p.dim() == d] for d in (2, 1)
    )
    with NGDT(model, params=[{"params": weights}, {"params": biases, "weight_decay": 0.0}]) as it:
        assert [group["weight_decay"] for group in it.param_groups] == [0.3 / 4, 0.0]


def test_what_no_layer_rule_covers_decays_only_where_it_is_asked_to() -> None:
    """The raw matrix behind an orthogonal one is no weight of a layer."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.odd = nn.Linear(3, 3), nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.odd.sin()

    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    moved = {}
    for decay in (0.0, None, 0.1):
        torch.manual_seed(0)
        model = Shifted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the parameter without a rule
            optimizer = NGDT(model, weight_decay=decay, momentum=0.0)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        moved[decay] = model.odd.detach().flatten() - 1
    cosine = nn.functional.cosine_similarity
    assert float(cosine(moved[None], moved[0.0], dim=0)) > 1 - 1e-5
    assert float(cosine(moved[0.1], moved[0.0], dim=0)) < 0.999


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_linear_model_ends_at_its_estimate_over_one_plus_the_decay(scale: float) -> None:
    """Zellner's prior: whatever the scale of the inputs."""
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(5, 2, bias=False).double()
    optimizer = NGDT(
        model,
        1e6,
        likelihood="gaussian",
        sigma2=1.0,
        metric="dense",
        momentum=0.0,
        damping=1e-12 * scale**2,
        weight_decay=0.25,
    )
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(-1).mean()).backward()
        optimizer.step()
    estimate = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(model.weight.detach(), estimate / 1.25, rtol=5e-3, atol=0.0)


def test_predictions_that_nothing_else_bounds_stay_finite() -> None:
    """Two classes that a plane divides: without decay the logits go on growing."""
    x = torch.tensor([[1.0, 0.2], [0.7, -0.3], [-1.1, 0.4], [-0.6, -0.1]])
    y = torch.tensor([0, 0, 1, 1])
    largest = {}
    for decay in (None, 0.0):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = NGDT(model, 0.1, weight_decay=decay)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        largest[decay] = float(model(x).detach().abs().max())
    assert largest[None] < 10 < largest[0.0], largest
