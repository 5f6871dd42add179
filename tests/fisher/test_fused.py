"""Tangents by fused rules against the framework's own."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from thermo_opt.fisher.fused import FusedTangents
from thermo_opt.fisher.slopes import FixedSlopes


def tangents(function, values, moving):
    """Output and tangent with and without the rules; only ``moving`` arguments have tangents."""
    generator = torch.Generator().manual_seed(1)
    found = []
    velocities = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    for fused in (True, False):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(v, t) if i in moving else v
                for i, (v, t) in enumerate(zip(values, velocities, strict=True))
            ]
            if fused:
                with FusedTangents():
                    out = function(*duals)
            else:
                out = function(*duals)
            found.append(forward_ad.unpack_dual(out))
    return found


@pytest.mark.parametrize("moving", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}, {0, 1, 2}, set()])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_linear(moving, lead):
    torch.manual_seed(0)
    values = [torch.randn(*lead, 4).double(), torch.randn(6, 4).double(), torch.randn(6).double()]
    (f, t), (g, u) = tangents(functional.linear, values, moving)
    torch.testing.assert_close(f, g)
    assert (t is None) == (u is None) == (not moving)
    if moving:
        torch.testing.assert_close(t, u)
    if moving and 2 not in moving:
        torch.testing.assert_close(*(x[1] for x in tangents(functional.linear, values[:2], moving)))


def test_linear_of_a_transposed_input():
    torch.manual_seed(0)
    values = [torch.randn(4, 3, 5).double(), torch.randn(6, 4).double()]
    ours, theirs = tangents(lambda x, w: functional.linear(x.transpose(0, 2), w), values, {0, 1})
    torch.testing.assert_close(tuple(ours), tuple(theirs))


@pytest.mark.parametrize("moving", [{0}, {1, 2}, {0, 1, 2}, set()])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "scale": 0.7}])
@pytest.mark.parametrize("queries", [4, 6])
def test_attention(moving, options, queries):
    torch.manual_seed(0)
    values = [torch.randn(2, 3, n, 5).double() for n in (queries, 5, 5)]
    ours, theirs = tangents(
        lambda *a: functional.scaled_dot_product_attention(*a, **options), values, moving
    )
    torch.testing.assert_close(ours[0], theirs[0])
    if moving:
        torch.testing.assert_close(ours[1], theirs[1])


def test_attention_with_a_mask_is_left_alone():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 5).double() for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # its first row sees nothing
    ours, theirs = tangents(
        lambda *a: functional.scaled_dot_product_attention(*a, attn_mask=mask), [q, k, v], {0, 1, 2}
    )
    torch.testing.assert_close(tuple(ours), tuple(theirs))


def test_a_model_with_frozen_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 4).double()
    run = lambda w: torch.func.functional_call(model, {"2.weight": w}, (x,))  # noqa: E731
    ours, theirs = tangents(run, [torch.randn(2, 3).double()], {0})
    torch.testing.assert_close(tuple(ours), tuple(theirs))


def layer_norm_arguments(shape):
    """Input, whose memory isn't in order, scale and shift."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4).double().mT.contiguous().mT
    return [x, torch.randn(shape).double(), torch.randn(shape).double()]


@pytest.mark.parametrize("moving", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}, set()])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_layer_norm(moving, shape):
    values = layer_norm_arguments(shape)
    ours, theirs = tangents(
        lambda x, w, b: functional.layer_norm(x, shape, w, b, 1e-3), values, moving
    )
    torch.testing.assert_close(tuple(ours), tuple(theirs))
    if moving == {0}:
        ours, theirs = tangents(lambda x: functional.layer_norm(x, shape), values[:1], moving)
        torch.testing.assert_close(tuple(ours), tuple(theirs))


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_layer_norm_recorded_as_a_linear_map(shape, given):
    """Jᵀu and, as its transpose, J v, of inputs that don't lie in order."""
    values = layer_norm_arguments(shape)
    values = [v.requires_grad_() for v in values[: 1 + given]]
    u = torch.randn(5, 3, 4).double().requires_grad_()
    v = [torch.randn_like(t) for t in values]
    found = []
    for fixed in (True, False):
        with FixedSlopes() if fixed else contextlib.nullcontext():
            out = functional.layer_norm(torch.tanh(values[0]), shape, *values[1:])
        pulled = torch.autograd.grad(out, values, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        found.append((out.detach(), [t.detach() for t in pulled], pushed))
    torch.testing.assert_close(*found)
