"""The optimizer-state metric: step scalars against dense float64, invariances of §9, and the metric
interface."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.optimizer_state import (
    CHUNK,
    Step,
    adam_alignment,
    diagonal_fisher,
    optimizer_state,
    path_scalars,
    step_scalars,
    total,
)


def _moments(size, seed, dtype=torch.float32, zeros=0.0):
    g = torch.Generator().manual_seed(seed)
    grads = (
        torch.randn(20, size, generator=g, dtype=torch.float64)
        * torch.rand(size, generator=g).double()
        * 1e-2
    )
    m, v = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for row in grads:
        m, v = 0.9 * m + 0.1 * row, 0.99 * v + 0.01 * row**2
    dead = torch.rand(size, generator=g) < zeros
    m[dead], v[dead] = 0, 0
    theta = torch.randn(size, generator=g, dtype=torch.float64)
    step = 1e-3 * torch.randn(size, generator=g, dtype=torch.float64)
    bias = {"bias1": 1 - 0.9**20, "bias2": 1 - 0.99**20}
    return [t.to(dtype) for t in (theta, theta + step, m, v)], bias


def _dense(theta0, theta1, m, v, *, bias1, bias2, batch_size=None):
    """§9 spelt out in float64 NumPy."""
    theta0, theta1, m, v = (t.double().numpy() for t in (theta0, theta1, m, v))
    step, mean, second = theta1 - theta0, m / bias1, v / bias2
    if batch_size is None:
        F = second
    else:
        F = batch_size * np.maximum(second - mean**2, 0) + mean**2
    live, seen = F > 0, second > 0
    own = np.sum(mean[seen] ** 2 / np.sqrt(second[seen])) ** 2
    return {
        "a": np.sum(F * step**2),
        "d": -np.sum(mean * step),
        "delta": np.sum(mean[live] ** 2 / F[live]),
        "null_decrease": -np.sum(mean[~live] * step[~live]),
        "adam_alignment": own / (np.sum(mean**2) * np.sum(mean[seen] ** 2 / second[seen])),
        "developed": np.sqrt(F) * step,
        "scale_d": np.sum(np.abs(mean * step)),
    }


@pytest.mark.parametrize("batch_size", [None, 1, 64])
@pytest.mark.parametrize("size", [1, 1000, 2 * CHUNK + 17])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_fused_pass_agrees_with_dense_float64(batch_size, size, zeros):
    tensors, bias = _moments(size, seed=size, zeros=zeros if size > 1 else 0.0)
    developed = torch.zeros(size)
    mine = step_scalars(*tensors, **bias, batch_size=batch_size, developed=developed)
    truth = _dense(*tensors, **bias, batch_size=batch_size)
    assert mine.a == pytest.approx(truth["a"], rel=1e-6)
    assert mine.delta == pytest.approx(truth["delta"], rel=1e-6)
    assert abs(mine.d - truth["d"]) <= 1e-6 * truth["scale_d"]
    assert mine.null_decrease == pytest.approx(truth["null_decrease"], abs=1e-12)
    assert adam_alignment([tensors[2]], [tensors[3]]) == pytest.approx(
        truth["adam_alignment"], rel=2e-6
    )
    np.testing.assert_allclose(developed.numpy(), truth["developed"], rtol=2e-5, atol=1e-9)


@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    batch_size=st.one_of(st.none(), st.integers(1, 4096)),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_alignments_stay_within_their_bounds(size, seed, batch_size, zeros):
    tensors, bias = _moments(size, seed, torch.float64, zeros)
    s = step_scalars(*tensors, **bias, batch_size=batch_size)
    assert (s.d - s.null_decrease) ** 2 <= s.a * s.delta * (1 + 1e-9)
    own = adam_alignment([tensors[2]], [tensors[3]])
    assert own is None or 0 <= own <= 1 + 1e-9


def test_batch_of_one_is_the_second_moment_and_scaling_leaves_the_alignment():
    """B(v̂−m̂²)+m̂² = v̂ at B = 1 wherever v̂ ≥ m̂²; ε doesn't change when F is scaled."""
    tensors, bias = _moments(500, 3, torch.float64)
    m, v = tensors[2:]
    v = torch.maximum(v, 1.001 * (m / bias["bias1"]) ** 2 * bias["bias2"])
    one, unknown = (step_scalars(*tensors[:2], m, v, **bias, batch_size=b) for b in (1, None))
    assert one.a == pytest.approx(unknown.a, rel=1e-10)
    assert one.delta == pytest.approx(unknown.delta, rel=1e-10)
    scaled = step_scalars(*tensors[:2], m, 7 * v, **bias)
    assert scaled.d**2 / (scaled.a * scaled.delta) == pytest.approx(
        unknown.d**2 / (unknown.a * unknown.delta), rel=1e-9
    )


def test_adams_own_step_has_the_alignment_of_the_formula():
    """For δ ∝ −m̂/√v̂ the signed alignment d|d|/(aΔ) in diag(v̂) is the closed form of §9."""
    (theta, _, m, v), bias = _moments(400, 5, torch.float64)
    step = (m / bias["bias1"]) / (v / bias["bias2"]).sqrt()
    s = step_scalars(theta, theta - 1e-3 * step, m, v, **bias)
    assert s.d**2 / (s.a * s.delta) == pytest.approx(
        adam_alignment([m[:100], m[100:]], [v[:100], v[100:]]), rel=1e-8
    )


def test_developed_displacement_is_no_longer_than_the_path():
    developed, length = torch.zeros(300, dtype=torch.float64), 0.0
    for seed in range(12):
        tensors, bias = _moments(300, seed, torch.float64)
        length += math.sqrt(step_scalars(*tensors, **bias, batch_size=8, developed=developed).a)
    assert 0 < float(developed.norm()) <= length
    tensors, bias = _moments(300, 0, torch.float64)
    straight = torch.zeros(300, dtype=torch.float64)
    a = [step_scalars(*tensors, **bias, developed=straight).a for _ in range(3)]
    assert float(straight.norm()) == pytest.approx(sum(map(math.sqrt, a)), rel=1e-10)


def test_scalars_add_over_slices_and_other_dtypes_and_layouts_are_read():
    tensors, bias = _moments(1200, 9, torch.float64)
    whole = step_scalars(*tensors, **bias, batch_size=4)
    parts = [
        step_scalars(*(t[i : i + 300] for t in tensors), **bias, batch_size=4)
        for i in range(0, 1200, 300)
    ]
    np.testing.assert_allclose(total(parts), whole, rtol=1e-12)
    turned = [t.reshape(30, 40).T for t in tensors]
    np.testing.assert_allclose(step_scalars(*turned, **bias, batch_size=4), whole, rtol=1e-12)
    halves = [t.bfloat16() for t in tensors]
    reference = step_scalars(*(t.float() for t in halves), **bias)
    np.testing.assert_allclose(step_scalars(*halves, **bias), reference, rtol=1e-6)


def test_underflowed_second_moments_are_null_not_infinite():
    theta0, theta1 = torch.zeros(3), torch.tensor([1.0, 1.0, -2.0])
    m, v = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([4.0, 0.0, 0.0])
    s = step_scalars(theta0, theta1, m, v, bias1=1, bias2=1)
    assert (s.a, s.d, s.delta, s.null_decrease) == (4.0, 5.0, 0.25, 6.0)


def test_bad_input_is_refused():
    tensors, bias = _moments(4, 0)
    with pytest.raises(InputError, match="theta1"):
        step_scalars(tensors[0], torch.zeros(5), *tensors[2:], **bias)
    with pytest.raises(InputError, match="bias1"):
        step_scalars(*tensors, bias1=0.0, bias2=1.0)
    with pytest.raises(InputError, match="batch_size"):
        step_scalars(*tensors, **bias, batch_size=0)


def test_metric_of_a_torch_optimizer():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.8, 0.95))
    with pytest.raises(InputError, match="first step"):
        optimizer_state(model, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    metric = optimizer_state(model, optimizer=optimizer, batch_size=8, damping=1e-4)
    F = torch.cat(
        [
            diagonal_fisher(
                s["exp_avg"], s["exp_avg_sq"], bias1=1 - 0.8**4, bias2=1 - 0.95**4, batch_size=8
            ).flatten()
            for s in (optimizer.state[p] for p in model.parameters())
        ]
    )
    torch.testing.assert_close(metric.dense(), torch.diag(F + 1e-4))
    assert metric.diagnostics()["in_nats"] is True
    unknown = optimizer_state(model, optimizer=optimizer)
    assert unknown.diagnostics()["in_nats"] is False
    assert any("not in nats" in note for note in unknown.notes)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="Adam"):
        optimizer_state(model, optimizer=sgd)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_path_in_pieces_is_its_steps_one_by_one(batch_size):
    size, steps = 2 * CHUNK + 17, []
    tensors = [_moments(size, seed)[0][1:] for seed in range(3)]
    theta0, bias = torch.zeros(size), _moments(1, 0)[1]
    together, apart = torch.zeros(2, size)
    for theta, m, v in tensors:
        pieces = zip(*(t.split(CHUNK) for t in (theta, m, v)), strict=True)
        steps.append(Step(pieces, **bias))
    found = path_scalars(
        iter(theta0.split(CHUNK)), steps, batch_size=batch_size, developed=together
    )
    for (theta, m, v), mine in zip(tensors, found, strict=True):
        assert mine == step_scalars(
            theta0, theta, m, v, **bias, batch_size=batch_size, developed=apart
        )
        theta0 = theta
    assert torch.equal(together, apart)


def test_empty_tensors_count_nothing():
    nothing = torch.zeros(0, 3)
    for batch_size in (None, 8):
        found = step_scalars(
            nothing, nothing, nothing, nothing, bias1=0.5, bias2=0.5, batch_size=batch_size
        )
        assert found == (0, 0, 0, 0)
