"""K-FAC as the preconditioner of a certified bracket: the root is a root, and the certificate stays
one (theory §5)."""

import pytest
import torch
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.fisher import make


def problem(damping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    batch = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 4, (30,))
    metrics = [
        make(kind, model, batch, damping=damping) for kind in ("exact", "dense", "kfac", "ekfac")
    ]
    return metrics, metrics[0].predictor.loss_and_gradient()[1]


@pytest.mark.parametrize("damping", [1e-1, 1e-4])
def test_inverse_root_applied_twice_is_the_solve_and_largest_bounds_the_spectrum(damping):
    (_, _, *kronecker), g = problem(damping)
    for metric in kronecker:
        twice = metric.inverse_root(metric.inverse_root(g))
        for mine, truth in zip(twice, metric.solve(g), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12)
        spectrum = torch.linalg.eigvalsh(metric.dense())
        assert metric.largest() == pytest.approx(float(spectrum[-1]), rel=1e-9)
        assert float(spectrum[0]) >= damping * (1 - 1e-9)


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_preconditioned_bracket_holds_the_dense_truth_and_its_lower_end_comes_sooner(damping):
    (exact, dense, *kronecker), g = problem(damping)
    truth = dense.dual_norm(g).lower
    plain = exact.dual_norm(g, rtol=0.0, max_iterations=6)
    for metric in kronecker:
        bracket = exact.dual_norm(g, rtol=0.0, max_iterations=6, preconditioner=metric)
        assert bracket.lower <= truth * (1 + 1e-10)
        assert bracket.upper >= truth * (1 - 1e-10)
        assert bracket.lower >= plain.lower


def test_undamped_root_is_refused():
    (_, _, kfac, _), g = problem(1e-2)
    kfac.damping = 0.0
    with pytest.raises(InputError, match="damping > 0"):
        kfac.inverse_root(g)
