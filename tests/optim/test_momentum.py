"""The lengths carried with the momentum equal those of products with the metric."""

import pytest
import torch

from thermo_opt.optim.kronecker.inverses import DenseInverse, invert
from thermo_opt.optim.kronecker.momentum import CarriedMomentum


def damped(seed: int, size: int = 7) -> DenseInverse:
    rows = torch.randn(30, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    inverse = DenseInverse(rows.mT @ rows / 30, 0.1, None)
    invert(inverse.damped)
    return inverse


@pytest.mark.parametrize("decaying", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_carried_lengths_are_those_of_the_matrix(mu: float, decaying: bool) -> None:
    """While the metric stays (steps 0-4), and after a refresh (step 5)."""
    generator = torch.Generator().manual_seed(0)
    inverse, momentum = damped(1), CarriedMomentum()
    w = torch.randn(7, dtype=torch.float64, generator=generator) if decaying else None
    b = before = torch.zeros(7, dtype=torch.float64)
    for step in range(8):
        if step == 5:
            inverse, momentum.stale = damped(2), True
        F = inverse.part.matrix
        g = torch.randn(7, dtype=torch.float64, generator=generator)
        momentum.begin(inverse, w)
        along, across = momentum.inner_products(g, w)
        after = momentum.accumulate(inverse, g, mu)
        products = (float(along), float(across))
        lengths = momentum.finish(inverse, w, mu, products, float(after))
        b = mu * b + torch.linalg.solve(F, g)
        v = (1 - mu) * b if w is None else (1 - mu) * b + w
        assert momentum.vector is not None
        torch.testing.assert_close(momentum.vector, b)
        assert lengths.a == pytest.approx(float(v @ F @ v), rel=1e-9)
        assert lengths.delta == pytest.approx(float(g @ torch.linalg.solve(F, g)), rel=1e-9)
        assert lengths.decrease == pytest.approx(float(g @ v), rel=1e-9)
        if step:
            assert lengths.along == pytest.approx(float(g @ before), rel=1e-9)
        before = v
