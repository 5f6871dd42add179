"""Blocks against dense linear algebra: products, inverses, splits, dampings; theory §7."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker import (
    DenseBlock,
    DiagonalBlock,
    EigenvalueCorrectedBlock,
    Factor,
    KroneckerBlock,
    factored_damping,
    nearest_product,
)


def _psd(size, rank, g, batch=()):
    rows = torch.randn(*batch, rank, size, generator=g, dtype=torch.float64)
    return rows.mT @ rows / max(rank, 1)


def _kronecker(seed, out, inputs, rank_g, rank_a, batch=(), diagonal=False):
    g = torch.Generator().manual_seed(seed)
    A = _psd(inputs, rank_a, g, batch)
    if diagonal:
        A = A.diagonal(dim1=-2, dim2=-1).clone()
        A[rank_a:] = 0
    return KroneckerBlock(A, _psd(out, rank_g, g, batch), diagonal_A=diagonal), g


def _check(block, v, rtol=1e-9):
    """Everything a block computes, against its dense matrix."""
    F, x = block.dense(), v.flatten()
    values, basis = torch.linalg.eigh(F)
    cut = 1e-7 * float(values.max())
    close = {"rtol": rtol, "atol": 1e-9 * max(1.0, float(values.max()))}
    torch.testing.assert_close(
        block.eigenvalues.flatten().sort().values, values.clamp(min=0), **close
    )
    torch.testing.assert_close(block.matvec(v).flatten(), F @ x, **close)
    torch.testing.assert_close(block.quadratic(v), x @ F @ x, **close)
    torch.testing.assert_close(block.unproject(block.project(v)), v)
    assert block.trace == pytest.approx(float(F.trace()), rel=1e-9, abs=1e-12)
    for damping in (0.0, 0.3):
        kept = values > cut
        inverse = 1 / (values + damping) if damping else torch.where(kept, 1 / values, 0.0)
        truth = basis @ (inverse * (basis.T @ x))
        size = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(
            block.solve(v, damping, cut).flatten(), truth, rtol=1e-8, atol=1e-8 * size
        )
        torch.testing.assert_close(
            block.dual_norm(v, damping, cut), x @ truth, rtol=1e-8, atol=1e-8
        )
    inside, outside = block.split(v, cut)
    torch.testing.assert_close(
        outside.flatten(), basis @ torch.where(values > cut, 0.0, basis.T @ x), **close
    )
    torch.testing.assert_close(inside + outside, v)
    assert float(block.quadratic(outside)) <= (cut + 1e-12) * float(outside.square().sum())


@given(
    seed=st.integers(0, 10**6),
    out=st.integers(1, 5),
    inputs=st.integers(1, 6),
    rank_g=st.integers(1, 5),
    rank_a=st.integers(1, 6),
    diagonal=st.booleans(),
)
def test_kronecker_block_of_any_rank(seed, out, inputs, rank_g, rank_a, diagonal):
    block, g = _kronecker(seed, out, inputs, rank_g, rank_a, diagonal=diagonal)
    _check(block, torch.randn(out, inputs, generator=g, dtype=torch.float64))


def test_grouped_kronecker_block_is_a_stack_of_blocks():
    block, g = _kronecker(0, 3, 4, 3, 2, batch=(2,))
    v = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    _check(block, v)
    single = KroneckerBlock(block.A.matrix[1], block.G.matrix[1])
    torch.testing.assert_close(block.solve(v, 0.1)[1], single.solve(v[1], 0.1))


def test_corrected_diagonal_and_dense_blocks():
    base, g = _kronecker(1, 3, 4, 3, 4)
    eigenvalues = torch.rand(3, 4, generator=g, dtype=torch.float64)
    eigenvalues[0, :2] = 0
    v = torch.randn(3, 4, generator=g, dtype=torch.float64)
    _check(EigenvalueCorrectedBlock(base, eigenvalues), v)
    _check(DiagonalBlock(eigenvalues), v)
    _check(DenseBlock(_psd(6, 4, g)), v.flatten()[:6])
    _check(
        DenseBlock(_psd(2, 2, g, batch=(5,))), torch.randn(5, 2, generator=g, dtype=torch.float64)
    )
    same = EigenvalueCorrectedBlock(base, base.eigenvalues)
    torch.testing.assert_close(same.matvec(v), base.matvec(v))


def test_null_component_in_the_eigenbasis_is_the_formula_of_the_theory():
    """P₀G = U_G ((1 − mask) ∘ U_Gᵀ G U_A) U_Aᵀ, and null motion costs nothing."""
    block, g = _kronecker(2, 4, 5, 2, 3)
    V = torch.randn(4, 5, generator=g, dtype=torch.float64)
    UG, UA = torch.linalg.eigh(block.G.matrix)[1], torch.linalg.eigh(block.A.matrix)[1]
    products = torch.outer(
        torch.linalg.eigh(block.G.matrix)[0], torch.linalg.eigh(block.A.matrix)[0]
    )
    mask = products > 1e-8
    expected = UG @ ((~mask) * (UG.T @ V @ UA)) @ UA.T
    torch.testing.assert_close(block.split(V, 1e-8)[1], expected)


def test_factored_damping_is_martens_and_grosses():
    block, _ = _kronecker(3, 3, 4, 3, 4)
    lam = 0.2
    A, G = block.A.matrix, block.G.matrix
    pi = ((A.trace() / 4) / (G.trace() / 3)).sqrt()
    left = G + lam**0.5 / pi * torch.eye(3, dtype=torch.float64)
    right = A + pi * lam**0.5 * torch.eye(4, dtype=torch.float64)
    on_a, on_g = factored_damping(block.A, block.G, lam)
    torch.testing.assert_close(A + on_a * torch.eye(4, dtype=torch.float64), right)
    torch.testing.assert_close(G + on_g * torch.eye(3, dtype=torch.float64), left)
    on_a, on_g = factored_damping(block.A, Factor(torch.zeros(3, 3, dtype=torch.float64)), lam)
    assert float(on_a) == float(on_g) == pytest.approx(lam**0.5)


@given(seed=st.integers(0, 10**6), terms=st.integers(1, 3))
def test_nearest_product_keeps_the_trace_and_both_partial_traces(seed, terms):
    g = torch.Generator().manual_seed(seed)
    pairs = [(_psd(3, 3, g), _psd(2, 2, g)) for _ in range(terms)]
    X, Y = nearest_product(pairs)
    total = sum(torch.kron(x, y) for x, y in pairs).reshape(3, 2, 3, 2)
    product = torch.kron(X, Y).reshape(3, 2, 3, 2)
    torch.testing.assert_close(torch.einsum("iaja->ij", product), torch.einsum("iaja->ij", total))
    torch.testing.assert_close(torch.einsum("iaib->ab", product), torch.einsum("iaib->ab", total))
    if terms == 1:
        torch.testing.assert_close(product, total)
    assert float(torch.linalg.eigvalsh(torch.kron(X, Y)).min()) > -1e-10


def test_float32_factors_of_condition_1e12_and_exact_rank_deficiency_stay_finite():
    g = torch.Generator().manual_seed(4)
    for rank in (1, 3, 8):
        basis = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
        values = torch.logspace(0, -12, 8)
        values[rank:] = 0
        A = (basis * values) @ basis.T
        block = KroneckerBlock(A, A.flip(0).flip(1))
        V = torch.randn(8, 8, generator=g)
        cut = spectral.threshold(
            float(block.eigenvalues.max()), spectral.default_rtol(8, torch.float32)
        )
        solved = block.solve(V, 0.0, cut)
        inside, outside = block.split(V, cut)
        assert bool(torch.isfinite(solved).all())
        assert float(solved.norm()) <= float(inside.norm()) / cut * 1.001
        torch.testing.assert_close(inside + outside, V)
        assert float(block.dual_norm(V, 0.0, cut)) >= 0


def test_refreshing_a_factor_keeps_the_last_basis_when_the_new_matrix_is_poisoned():
    block, g = _kronecker(5, 3, 4, 3, 4)
    V = torch.randn(3, 4, generator=g, dtype=torch.float64)
    before = block.solve(V, 0.1)
    block.A.update(torch.full((4, 4), torch.nan, dtype=torch.float64))
    torch.testing.assert_close(block.solve(V, 0.1), before)
    assert block.notes == ["A: matrix is not finite; kept the last decomposition"]
    fresh = torch.eye(4, dtype=torch.float64)
    block.A.update(fresh)
    torch.testing.assert_close(
        block.solve(V, 0.1), KroneckerBlock(fresh, block.G.matrix).solve(V, 0.1)
    )
    assert block.notes == []
