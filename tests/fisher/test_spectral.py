"""The eigensolver's ladder, truncation and its inverse, on hard matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermo_opt.fisher import spectral


def _matrix(size, rank, condition, seed, dtype=torch.float64):
    """A PSD matrix with log-spaced eigenvalues from 1 down to 1/condition and exactly ``size −
    rank`` zeros."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q
    values = torch.zeros(size, dtype=torch.float64)
    if rank:
        values[:rank] = torch.logspace(
            0, -torch.log10(torch.tensor(condition)).item(), rank, dtype=torch.float64
        )
    return ((basis * values) @ basis.T).to(dtype)


@given(
    size=st.integers(1, 12),
    rank=st.integers(0, 12),
    exponent=st.integers(0, 12),
    seed=st.integers(0, 10**6),
    single=st.booleans(),
)
def test_decomposition_is_orthogonal_non_negative_and_reconstructs(
    size, rank, exponent, seed, single
):
    dtype = torch.float32 if single else torch.float64
    matrix = _matrix(size, min(rank, size), 10.0**exponent, seed, dtype)
    spectrum = spectral.eigh(matrix)
    eps = torch.finfo(dtype).eps
    assert spectrum.note == ""
    assert spectrum.basis.dtype == spectrum.eigenvalues.dtype == dtype
    assert float(spectrum.eigenvalues.min()) >= 0
    assert bool((spectrum.eigenvalues.diff() >= 0).all())
    identity = torch.eye(size, dtype=dtype)
    torch.testing.assert_close(
        spectrum.basis.T @ spectrum.basis, identity, rtol=0, atol=50 * size * eps
    )
    again = (spectrum.basis * spectrum.eigenvalues) @ spectrum.basis.T
    torch.testing.assert_close(again, matrix, rtol=0, atol=50 * size * eps)


@given(size=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_float32_rank_deficiency_is_found_by_the_default_threshold(size, rank, seed):
    rank = min(rank, size)
    matrix = _matrix(size, rank, 100.0, seed, torch.float32)
    values = spectral.eigh(matrix).eigenvalues
    cut = spectral.threshold(float(values.max()), 10 * spectral.default_rtol(size, torch.float32))
    assert int((values > cut).sum()) == rank


def test_condition_1e12_in_float32_gives_a_finite_bounded_pseudo_inverse():
    """What float32 cannot resolve is truncated, not inverted: |F⁺g| ≤ |g| / cut."""
    for seed in range(50):
        spectrum = spectral.eigh(_matrix(30, 30, 1e12, seed, torch.float32))
        cut = spectral.threshold(
            float(spectrum.eigenvalues.max()), spectral.default_rtol(30, torch.float32)
        )
        inverse = spectral.inverse(spectrum.eigenvalues, 0.0, cut)
        assert bool(torch.isfinite(inverse).all())
        assert float(inverse.max()) <= 1 / cut
        assert int((inverse > 0).sum()) >= 1


def test_inverse_is_tikhonov_or_truncated():
    values = torch.tensor([0.0, 1e-9, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(spectral.inverse(values, 0.1, 9.0), 1 / (values + 0.1))
    expected = torch.tensor([0, 0, 2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(spectral.inverse(values, 0.0, 1e-6), expected)
    assert spectral.threshold(2.0, 1e-3, 1e-4) == 2e-3
    assert spectral.threshold(2.0, 1e-6, 1e-4) == 1e-4
    assert spectral.threshold(0.0, 1e-6) > 0


def test_non_symmetric_rounding_is_symmetrised_and_half_precision_is_read():
    matrix = _matrix(6, 6, 10.0, 0)
    skew = torch.randn(6, 6, dtype=torch.float64)
    spectrum = spectral.eigh(matrix + 1e-3 * (skew - skew.T))
    torch.testing.assert_close(spectrum.eigenvalues, spectral.eigh(matrix).eigenvalues)
    half = spectral.eigh(matrix.bfloat16())
    assert half.eigenvalues.dtype == torch.bfloat16
    assert not half.note


def _failing(times, monkeypatch):
    """torch.linalg.eigh that fails its first ``times`` calls."""
    real, calls = torch.linalg.eigh, []

    def eigh(matrix):
        calls.append(matrix)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def test_ladder_retries_in_float64_then_with_jitter(monkeypatch):
    matrix = _matrix(8, 5, 100.0, 1, torch.float32)
    truth = spectral.eigh(matrix.double()).eigenvalues
    calls = _failing(1, monkeypatch)
    spectrum = spectral.eigh(matrix)
    assert calls[1].dtype == torch.float64
    assert spectrum.note == "eigensolver failed; retried in float64"
    torch.testing.assert_close(spectrum.eigenvalues.double(), truth, rtol=1e-5, atol=1e-7)
    monkeypatch.undo()
    _failing(4, monkeypatch)
    spectrum = spectral.eigh(matrix)
    assert "jitter 1e-06" in spectrum.note
    torch.testing.assert_close(spectrum.eigenvalues.double(), truth, rtol=1e-5, atol=1e-7)


def test_ladder_keeps_the_last_basis_with_fresh_eigenvalues(monkeypatch):
    old, new = _matrix(6, 6, 10.0, 2), _matrix(6, 6, 10.0, 3)
    last = spectral.eigh(old)
    _failing(99, monkeypatch)
    spectrum = spectral.eigh(new, last=last)
    assert "kept the last basis" in spectrum.note
    assert torch.equal(spectrum.basis, last.basis)
    torch.testing.assert_close(spectrum.eigenvalues, (last.basis.T @ new @ last.basis).diagonal())


def test_ladder_ends_in_the_unit_basis(monkeypatch):
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    _failing(99, monkeypatch)
    spectrum = spectral.eigh(matrix)
    assert "unit basis" in spectrum.note
    torch.testing.assert_close(spectrum.eigenvalues, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close((spectrum.basis * spectrum.eigenvalues) @ spectrum.basis.T, matrix)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_matrix_never_raises(poison):
    matrix = _matrix(4, 4, 10.0, 4)
    last = spectral.eigh(matrix)
    bad = matrix.clone()
    bad[1, 1] = poison
    kept = spectral.eigh(bad, last=last)
    assert torch.equal(kept.eigenvalues, last.eigenvalues)
    assert torch.equal(kept.basis, last.basis)
    assert "not finite" in kept.note
    alone = spectral.eigh(bad)
    assert bool(torch.isfinite(alone.eigenvalues).all())
    assert bool(torch.isfinite(alone.basis).all())


def test_orthogonal_iteration_converges_and_survives_failure(monkeypatch):
    matrix = _matrix(8, 8, 1e3, 5)
    start = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    spectrum = spectral.orthogonal_iteration(matrix, start, steps=200)
    truth = spectral.eigh(matrix).eigenvalues
    torch.testing.assert_close(spectrum.eigenvalues.sort().values, truth, rtol=1e-8, atol=1e-12)
    assert spectral.orthogonal_iteration(matrix, start).eigenvalues.sum() == pytest.approx(
        float(matrix.trace())
    )
    bad = spectral.orthogonal_iteration(matrix * float("nan"), start)
    assert torch.equal(bad.basis, start)
    assert bad.note

    def qr(_):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(torch.linalg, "qr", qr)
    failed = spectral.orthogonal_iteration(matrix, start)
    assert failed.note == "QR failed; kept the last basis"
    torch.testing.assert_close(failed.eigenvalues, (start.T @ matrix @ start).diagonal())


def test_stacks_of_matrices_are_decomposed_one_by_one():
    stack = torch.stack([_matrix(5, 5, 10.0, s) for s in range(3)])
    spectrum = spectral.eigh(stack)
    for i in range(3):
        torch.testing.assert_close(spectrum.eigenvalues[i], spectral.eigh(stack[i]).eigenvalues)
