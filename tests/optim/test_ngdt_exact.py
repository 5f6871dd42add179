"""NGD-T with exact metrics: facts of theory §3 and §7 against dense float64 linear algebra."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import thermo_opt as to
from thermo_opt.fisher.kronecker import DenseBlock, KroneckerBlock
from thermo_opt.optim import Dissipation, Minibatch
from thermo_opt.optim.kronecker.inverses import SpectralInverse


def classifier(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))


def fisher(model: nn.Module, x: Tensor) -> Tensor:
    """Dense true Fisher of a softmax classifier, from per-output gradients (nothing of the
    package)."""
    params = list(model.parameters())
    outputs = model(x)
    total = 0.0
    for f in outputs:
        rows = [torch.autograd.grad(f[k], params, retain_graph=True) for k in range(len(f))]
        J = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
        p = f.detach().softmax(-1)
        total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return total / len(x)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("metric", ["exact", "dense", "low-rank"])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.1)])
def test_every_step_dissipates_exactly_the_budget(
    metric: str, momentum: float, decay: float
) -> None:
    model, x, y = classifier()
    damping = 1e-3
    optimizer = to.NGDT(
        model,
        budget=3e-3,
        metric=metric,
        damping=damping,
        momentum=momentum,
        weight_decay=decay,
        eta_max=1e6,
    )
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        metric_before = fisher(model, x) + damping * torch.eye(
            len(flat(model)), dtype=torch.float64
        )
        before = flat(model)
        optimizer.step()
        step = flat(model) - before
        assert 0.5 * float(step @ metric_before @ step) == pytest.approx(3e-3, rel=1e-6)
        assert optimizer.last_step["predicted"] == pytest.approx(3e-3, rel=1e-6)


def test_eta_max_binds_near_the_optimum_and_the_budget_is_then_not_reached() -> None:
    model, x, y = classifier()
    optimizer = to.NGDT(model, budget=10.0, metric="dense", momentum=0.0, eta_max=0.5)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step["eta"] == 0.5
    assert optimizer.last_step["predicted"] < 10.0


def test_lr_scales_the_step_so_that_schedulers_work() -> None:
    steps = []
    for lr in (1.0, 0.5):
        model, x, y = classifier()
        optimizer = to.NGDT(model, budget=1e-3, metric="dense", lr=lr, momentum=0.0)
        before = flat(model)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps.append(flat(model) - before)
        assert optimizer.last_step["predicted"] == pytest.approx(1e-3 * lr**2, rel=1e-9)
    torch.testing.assert_close(steps[1], 0.5 * steps[0], rtol=1e-12, atol=0)


def test_steps_align_with_the_exact_natural_gradient() -> None:
    model, x, y = classifier()
    optimizer = to.NGDT(model, budget=1e-2, metric="exact", momentum=0.0)
    adam_model, _, _ = classifier()
    adam = torch.optim.Adam(adam_model.parameters(), lr=1e-2)
    scores = {}
    for name, net, opt in (("ngdt", model, optimizer), ("adam", adam_model, adam)):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        g = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        damped = fisher(net, x) + 1e-3 * torch.eye(len(g), dtype=torch.float64)
        before = flat(net)
        opt.step()
        step = flat(net) - before
        d, a, delta = (
            -float(g @ step),
            float(step @ damped @ step),
            float(g @ torch.linalg.solve(damped, g)),
        )
        scores[name] = d * abs(d) / (a * delta)
    assert scores["ngdt"] >= 0.99
    assert scores["adam"] < scores["ngdt"]
    assert optimizer.last_step["alignment"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("metric", ["exact", "dense", "low-rank"])
def test_linear_gaussian_models_reach_the_optimum_in_one_step(metric: str) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(30, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    y = x @ w.T + 0.3 * torch.randn(30, 2, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    sigma2 = 0.7
    optimizer = to.NGDT(
        model,
        metric=Minibatch(metric, inverse="pseudo"),
        regulator="fixed",
        eta_max=1.0,
        momentum=0.0,
        likelihood="gaussian",
        sigma2=sigma2,
    )
    (0.5 * (model(x) - y).square().sum(1).mean() / sigma2).backward()
    optimizer.step()
    design = np.concatenate([x.numpy(), np.ones((30, 1))], axis=1)
    solution = np.linalg.lstsq(design, y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(model.weight.detach().numpy(), solution[:, :4], atol=1e-9)
    np.testing.assert_allclose(model.bias.detach().numpy(), solution[:, 4], atol=1e-9)


class Mixed(nn.Module):
    """A linear layer whose weight is W = Θ M for a fixed invertible M: the same functions in other
    coordinates."""

    def __init__(self, weight: Tensor, bias: Tensor, mixing: Tensor) -> None:
        super().__init__()
        self.mixing = mixing
        self.theta = nn.Parameter(weight @ torch.linalg.inv(mixing))
        self.bias = nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.theta @ self.mixing, self.bias)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_trajectory_is_the_same_in_any_linear_coordinates_of_a_layer(momentum: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(60, 3, dtype=torch.float64)
    y = torch.randn(60, 2, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    mixing = torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)
    first = plain[0]
    mixed = nn.Sequential(
        Mixed(first.weight.detach(), first.bias.detach(), mixing), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    mixed[2].load_state_dict(plain[2].state_dict())
    outputs = []
    for model in (plain, mixed):
        optimizer = to.NGDT(
            model,
            budget=3e-4,
            metric=Minibatch("dense", inverse="pseudo"),
            momentum=momentum,
            likelihood="gaussian",
        )
        for _ in range(15):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
        outputs.append(model(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert float((outputs[0] - plain(x).detach()).abs().max()) < 1e-12


def _random_fisher(
    rng: np.random.Generator, size: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = np.zeros(size)
    values[:rank] = 10.0 ** rng.uniform(-16, 0, rank) * 10.0 ** rng.uniform(-3, 3)
    return torch.tensor(basis * values @ basis.T, dtype=dtype), basis, values


def test_ten_thousand_rank_deficient_fishers() -> None:
    """Finite, within budget, and the null component is the projection onto the truncated
    eigenvectors (theory §7)."""
    rng = np.random.default_rng(0)
    rule = Dissipation(0.1, eta_max=1e12)
    for case in range(10_000):
        dtype = (torch.float32, torch.float64)[case % 2]
        size = int(rng.integers(1, 9))
        rank = int(rng.integers(0, size + 1))
        matrix, basis, values = _random_fisher(rng, size, rank, dtype)
        g = torch.tensor(rng.standard_normal(size), dtype=dtype)
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        solver = SpectralInverse(DenseBlock(matrix), 0.0, rtol, 0.0)
        null = solver.null(g)
        u = solver.solve(g - null)
        a = float(u.double() @ matrix.double() @ u.double())
        eta = rule.step_size(max(a, 0.0), case)
        assert bool(torch.isfinite(u).all())
        assert math.isfinite(eta)
        assert 0.5 * eta**2 * a <= 0.1 * (1 + 1e-3)
        cut, eps = rtol * values.max(), torch.finfo(dtype).eps
        coordinates = basis.T @ null.double().numpy()
        exact = basis.T @ g.double().numpy()
        # Eigenvectors on the two sides of the threshold are told apart up to rounding over their
        # distance to it.
        slack = (
            50 * size * eps * values.max() / max(cut, 1e-300) * np.linalg.norm(exact) + 50 * eps
            if rank
            else 50 * eps
        )
        slack = min(slack, 10.0)
        kept, lost = values > 100 * cut, values < 0.01 * cut if rank else np.ones(size, dtype=bool)
        assert np.all(
            np.abs(coordinates[kept])
            <= slack * cut / np.maximum(values[kept], 1e-300) + 1e-3 * slack + 50 * eps
        )
        if kept.sum() + lost.sum() == size:
            assert np.allclose(coordinates[lost], exact[lost], atol=slack)
            assert np.allclose(
                null.double() @ (g - null).double(), 0.0, atol=100 * eps * float(g @ g) + 1e-12
            )


def test_kronecker_threshold_acts_on_products_of_eigenvalues() -> None:
    rng, compared = np.random.default_rng(1), 0
    for case in range(400):
        A, _, _ = _random_fisher(rng, 4, int(rng.integers(1, 5)), torch.float64)
        G, _, _ = _random_fisher(rng, 3, int(rng.integers(1, 4)), torch.float64)
        V = torch.tensor(rng.standard_normal((3, 4)))
        solver = SpectralInverse(KroneckerBlock(A, G), 0.0, 1e-9, 0.0)
        a, U_A = torch.linalg.eigh(A)
        g, U_G = torch.linalg.eigh(G)
        products, cut = torch.outer(g.clamp(min=0), a.clamp(min=0)), 1e-9 * float(a[-1] * g[-1])
        if bool(((products > cut / 100) & (products < 100 * cut)).any()):
            continue  # too near the threshold for two computations to agree on its side
        compared += 1
        mask = products > cut
        expected = U_G @ ((~mask) * (U_G.T @ V @ U_A)) @ U_A.T
        torch.testing.assert_close(solver.null(V), expected, rtol=0, atol=1e-9, msg=f"case {case}")
        assert solver.rank == int(mask.sum())
    assert compared >= 100


def test_hybrid_step_moves_freely_in_the_null_space_and_spends_nothing_there() -> None:
    torch.manual_seed(3)
    model = nn.Linear(6, 3).double()
    x, y = (
        torch.randn(2, 6, dtype=torch.float64),
        torch.tensor([0, 2]),
    )  # two examples: rank ≤ 4 of 21
    optimizer = to.NGDT(
        model,
        budget=1e-3,
        metric=Minibatch("dense", inverse="pseudo+null", eta_null=0.5),
        momentum=0.0,
    )
    (
        F.cross_entropy(model(x), y) + 0.1 * model.weight.sum()
    ).backward()  # a penalty puts gradient in the null space
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    matrix, before = fisher(model, x), flat(model)
    optimizer.step()
    step = flat(model) - before
    values, basis = torch.linalg.eigh(matrix)
    off = basis[:, values < 1e-12 * values[-1]]
    projector = off @ off.T
    torch.testing.assert_close(projector @ step, -0.5 * projector @ g, rtol=0, atol=1e-9)
    assert 0.5 * float(step @ matrix @ step) == pytest.approx(1e-3, rel=1e-6)
