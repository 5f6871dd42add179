"""Toy problems with exact Fisher, gradient, minimum and constants: where claims are checked (theory
§8, §10).

Each builder returns a `Problem`. ``smoothness`` M and ``strength`` μ are the constants of §8
relative to the metric, given where they hold everywhere; None where they hold only locally or not
at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from thermo_opt.errors import InputError
from thermo_opt.theory import families as fam
from thermo_opt.theory.flow import DenseMetric, Landscape
from thermo_opt.theory.protocols import stiffness_friction

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A landscape with what is known about it exactly. ``fisher(θ)``: (P, P); ``sample(rng)``: a
    random point of the domain.

    ``start`` (P,), ``minimum`` (P,) and ``loss_min`` in nats, or None where there is none.
    """

    landscape: Landscape
    fisher: Callable[[Array], Array]
    start: Array
    sample: Callable[[np.random.Generator], Array]
    minimum: Array | None = None
    loss_min: float | None = None
    smoothness: float | None = None
    strength: float | None = None

    @property
    def name(self) -> str:
        """The landscape's name."""
        return self.landscape.name

    def loss(self, theta: Array) -> float:
        """L(θ), nats."""
        return self.landscape.loss(theta)

    def gradient(self, theta: Array) -> Array:
        """∇L(θ), (P,)."""
        return self.landscape.gradient(theta)


def quadratic(metric: Array, hessian: Array, start: Array | None = None) -> Problem:
    """L = ½θᵀHθ with any constant metric F: M and μ are the extreme eigenvalues of F⁻¹H.

    Raises InputError unless both matrices are symmetric positive definite: M and μ need a regular
    metric.
    """
    for label, matrix in (("metric", metric), ("Hessian", hessian)):
        if not np.allclose(matrix, matrix.T) or np.linalg.eigvalsh(matrix)[0] <= 0:
            raise InputError(f"the {label} of a quadratic must be symmetric positive definite")
    values = linalg.eigvalsh(hessian, metric)
    size = len(metric)
    return _problem(
        "quadratic",
        lambda x: metric,
        lambda x: float(x @ hessian @ x / 2),
        lambda x: hessian @ x,
        start=np.linspace(1.0, 2.0, size) if start is None else start,
        minimum=np.zeros(size),
        loss_min=0.0,
        smoothness=float(values[-1]),
        strength=float(values[0]),
    )


def ill_conditioned_quadratic(size: int = 4, seed: int = 0) -> Problem:
    """A quadratic whose metric and Hessian share no eigenvectors; κ = M/μ about 10 in the metric,
    about 10³ in coordinates.
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    metric = (basis * np.logspace(-2, 1, size)) @ basis.T
    root = np.linalg.cholesky(metric)
    inner = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return quadratic(metric, root @ (inner * np.linspace(0.3, 3.0, size)) @ inner.T @ root.T)


def linear_regression(
    examples: int = 20, features: int = 3, sigma2: float = 0.25, seed: int = 1
) -> Problem:
    """Linear-Gaussian regression: Hessian = F = XᵀX/(nσ²), so M = μ = 1 and one natural step of η =
    1 ends at the minimum.
    """
    x, y = _design(examples, features, seed)
    fisher = x.T @ x / (examples * sigma2)
    minimum = np.linalg.lstsq(x, y, rcond=None)[0]
    constant = np.log(2 * np.pi * sigma2) / 2
    return _problem(
        "linear regression",
        lambda t: fisher,
        lambda t: float(np.mean((y - x @ t) ** 2) / (2 * sigma2) + constant),
        lambda t: x.T @ (x @ t - y) / (examples * sigma2),
        start=minimum + np.linspace(2.0, -1.0, features),
        minimum=minimum,
        loss_min=float(np.mean((y - x @ minimum) ** 2) / (2 * sigma2) + constant),
        smoothness=1.0,
        strength=1.0,
        predict=lambda t: (x @ t)[:, None],
        targets=y[:, None],
        likelihood="gaussian",
        sigma2=sigma2,
    )


def overparameterised_regression(examples: int = 4, features: int = 7, seed: int = 2) -> Problem:
    """Linear-Gaussian regression with more weights than examples (σ² = 1): F has rank n < P, and g
    lies in its range."""
    x, y = _design(examples, features, seed)
    minimum = np.linalg.pinv(x) @ y
    constant = np.log(2 * np.pi) / 2
    return _problem(
        "over-parameterised regression",
        lambda t: x.T @ x / examples,
        lambda t: float(np.mean((y - x @ t) ** 2) / 2 + constant),
        lambda t: x.T @ (x @ t - y) / examples,
        start=minimum + np.linspace(1.0, -2.0, features),
        minimum=minimum,
        loss_min=float(constant),
        smoothness=1.0,
        strength=1.0,
        predict=lambda t: (x @ t)[:, None],
        targets=y[:, None],
        likelihood="gaussian",
    )


def logistic_regression(examples: int = 40, features: int = 3, seed: int = 3) -> Problem:
    """Logistic regression with flipped labels (a finite minimum): Hessian = F(θ) exactly, so M = 1
    locally, not everywhere.
    """
    rng = np.random.default_rng(seed)
    x, score = _design(examples, features, seed)
    y = (score + 0.8 * rng.standard_normal(examples) > 0).astype(np.float64)

    def fisher(t: Array) -> Array:
        p = 1 / (1 + np.exp(-x @ t))
        return (x.T * (p * (1 - p))) @ x / examples

    def gradient(t: Array) -> Array:
        return x.T @ (1 / (1 + np.exp(-x @ t)) - y) / examples

    def loss(t: Array) -> float:
        z = x @ t
        return float(np.mean(np.logaddexp(0, z) - y * z))

    minimum = np.zeros(features)
    for _ in range(50):
        minimum = minimum - np.linalg.solve(fisher(minimum), gradient(minimum))
    return _problem(
        "logistic regression",
        fisher,
        loss,
        gradient,
        start=np.zeros(features),
        minimum=minimum,
        loss_min=loss(minimum),
        predict=lambda t: (x @ t)[:, None],
        targets=y[:, None],
        likelihood="bernoulli",
    )


def softmax_table(examples: int = 6, classes: int = 4, seed: int = 4) -> Problem:
    """One free logit an example and class: outputs move independently, so Δ = χ² exactly; F has n
    null directions."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=examples)
    onehot = np.eye(classes)[y]

    def probabilities(t: Array) -> Array:
        z = t.reshape(examples, classes)
        w = np.exp(z - z.max(axis=1, keepdims=True))
        return w / w.sum(axis=1, keepdims=True)

    return _problem(
        "softmax table",
        lambda t: (
            linalg.block_diag(*(np.diag(p) - np.outer(p, p) for p in probabilities(t))) / examples
        ),
        lambda t: float(-np.log(probabilities(t)[np.arange(examples), y]).mean()),
        lambda t: ((probabilities(t) - onehot) / examples).ravel(),
        start=rng.standard_normal(examples * classes),
        predict=lambda t: t.reshape(examples, classes),
        targets=y,
        likelihood="categorical",
    )


def deep_linear(hidden: int = 3, features: int = 2, examples: int = 12, seed: int = 5) -> Problem:
    """f = w₂ᵀW₁x, two linear layers, Gaussian outputs: a curved, rank-deficient Fisher JᵀJ/n of
    rank ``features``."""
    x, y = _design(examples, features, seed)
    split = hidden * features
    constant = np.log(2 * np.pi) / 2

    def parts(t: Array) -> tuple[Array, Array]:
        return t[:split].reshape(hidden, features), t[split:]

    def jacobian(t: Array) -> Array:
        first, second = parts(t)
        return np.concatenate(
            [np.einsum("h,nf->nhf", second, x).reshape(examples, split), x @ first.T], axis=1
        )

    def residual(t: Array) -> Array:
        first, second = parts(t)
        return x @ first.T @ second - y

    best = np.linalg.lstsq(x, y, rcond=None)[0]
    return _problem(
        "deep linear network",
        lambda t: jacobian(t).T @ jacobian(t) / examples,
        lambda t: float(residual(t) @ residual(t) / (2 * examples) + constant),
        lambda t: jacobian(t).T @ residual(t) / examples,
        start=np.random.default_rng(seed).standard_normal(split + hidden),
        loss_min=float(np.mean((x @ best - y) ** 2) / 2 + constant),
        predict=lambda t: (residual(t) + y)[:, None],
        targets=y[:, None],
        likelihood="gaussian",
    )


def mixture(weight: float = 0.3, separation: float = 2.0) -> Problem:
    """(1−w)N(0,1) + wN(m,1), θ = (w, m), fitted to itself: F degenerates where m = 0 (w free) or w
    = 0 (m free).

    Expectations by the trapezium rule on 2401 points, spectrally accurate for these densities.
    """
    x = np.linspace(-12, 12, 2401)
    step = x[1] - x[0]

    def density(t: Array) -> tuple[Array, Array, Array]:
        low, high = (np.exp(-((x - c) ** 2) / 2) / np.sqrt(2 * np.pi) for c in (0.0, t[1]))
        return (1 - t[0]) * low + t[0] * high, low, high

    target = density(np.array([weight, separation]))[0]

    def scores(t: Array) -> Array:
        p, low, high = density(t)
        return np.stack([high - low, t[0] * (x - t[1]) * high]) / p

    return _problem(
        "mixture",
        lambda t: (scores(t) * density(t)[0]) @ scores(t).T * step,
        lambda t: float(target @ (np.log(target) - np.log(density(t)[0])) * step),
        lambda t: -(scores(t) @ target) * step,
        start=np.array([0.6, 1.2]),
        minimum=np.array([weight, separation]),
        loss_min=0.0,
        sample=lambda rng: np.array([rng.uniform(0.2, 0.8), rng.uniform(0.8, 3.0)]),
    )


def null_gradient() -> Problem:
    """F = diag(2, 1, 0, 0) and a loss whose gradient (1, 2, 3, 4) leaves its range (§7's worked
    example); no minimum."""
    g = np.array([1.0, 2.0, 3.0, 4.0])
    return _problem(
        "null gradient",
        lambda t: np.diag([2.0, 1.0, 0.0, 0.0]),
        lambda t: float(g @ t),
        lambda t: g,
        start=np.zeros(4),
    )


def trap_stiffness() -> Problem:
    """Stiffness of the overdamped trap: the metric is the friction ζ(k) = 1/(4k³), the loss the
    free energy ½ ln k."""
    return _problem(
        "trap stiffness",
        lambda t: np.array([[stiffness_friction(t[0])]]),
        lambda t: float(np.log(t[0]) / 2),
        lambda t: 1 / (2 * t),
        start=np.array([4.0]),
        sample=lambda rng: rng.uniform(0.5, 5.0, 1),
    )


def trap_position() -> Problem:
    """Centre of the overdamped unit trap in a harmonic potential: constant friction 1, loss ½(c −
    1)²."""
    return _problem(
        "trap position",
        lambda t: np.eye(1),
        lambda t: float((t[0] - 1) ** 2 / 2),
        lambda t: t - 1,
        start=np.zeros(1),
        minimum=np.ones(1),
        loss_min=0.0,
        smoothness=1.0,
        strength=1.0,
    )


def family(member: fam.Family, start: Array, target: Array, chart: str | None = None) -> Problem:
    """L(θ) = KL(p_target ‖ p_θ) on a closed-form family, in one of its charts (default: the
    canonical one, its first).

    ``start``, ``target`` are canonical coordinates; raises InputError when they lie outside the
    family's domain.
    """
    p, q = member.point(start), member.point(target)
    name = chart or next(iter(member.charts))
    c = member.chart(name)

    def sample(rng: np.random.Generator) -> Array:
        return c.from_canonical(member.geodesic(p, q, rng.uniform(0.0, 0.8, 1))[0])

    return _problem(
        f"{member.name} ({name})",
        lambda u: member.metric_in(name, u),
        lambda u: member.divergence(q, c.to_canonical(u)),
        lambda u: c.jacobian(u).T @ member.divergence_gradient(q, c.to_canonical(u)),
        start=c.from_canonical(p),
        minimum=c.from_canonical(q),
        loss_min=0.0,
        sample=sample,
    )


FAMILIES: tuple[tuple[fam.Family, Array, Array], ...] = (
    (fam.bernoulli(), np.array([0.2]), np.array([0.7])),
    (fam.categorical(4), np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.05, 0.25])),
    (fam.poisson(), np.array([3.0]), np.array([0.7])),
    (fam.exponential(), np.array([0.4]), np.array([1.5])),
    (fam.normal(), np.array([-1.0, 0.5]), np.array([1.0, 1.3])),
    (fam.normal_mean([[2.0, 0.3], [0.3, 0.5]]), np.array([0.0, 1.0]), np.array([2.0, -1.0])),
    (fam.normal_covariance(2), np.array([1.0, 0.3, 2.0]), np.array([0.5, -0.2, 1.2])),
)
"""Every family of §10 with a start and a target in canonical coordinates."""


def family_problems() -> list[Problem]:
    """Every family of §10 in each of its coordinate systems."""
    return [family(member, p, q, chart) for member, p, q in FAMILIES for chart in member.charts]


def all_problems() -> list[Problem]:
    """Every toy problem once; families in their canonical chart."""
    return [
        ill_conditioned_quadratic(),
        linear_regression(),
        overparameterised_regression(),
        logistic_regression(),
        softmax_table(),
        deep_linear(),
        mixture(),
        null_gradient(),
        trap_position(),
        trap_stiffness(),
        *(family(member, p, q) for member, p, q in FAMILIES),
    ]


def _design(examples: int, features: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, features)) * np.linspace(1.0, 0.3, features)
    return x, x @ np.linspace(1.0, -1.0, features) + 0.3 * rng.standard_normal(examples)


def _problem(
    name: str,
    fisher: Callable[[Array], Array],
    loss: Callable[[Array], float],
    gradient: Callable[[Array], Array],
    *,
    start: Array,
    minimum: Array | None = None,
    loss_min: float | None = None,
    smoothness: float | None = None,
    strength: float | None = None,
    sample: Callable[[np.random.Generator], Array] | None = None,
    predict: Callable[[Array], Array] | None = None,
    targets: Array | None = None,
    likelihood: str = "categorical",
    sigma2: float = 1.0,
) -> Problem:
    return Problem(
        landscape=Landscape(
            name,
            lambda t: DenseMetric(fisher(t)),
            loss,
            gradient,
            predict,
            targets,
            likelihood,
            sigma2,
        ),
        fisher=fisher,
        start=start,
        sample=sample or (lambda rng: start + 0.5 * rng.standard_normal(len(start))),
        minimum=minimum,
        loss_min=loss_min,
        smoothness=smoothness,
        strength=strength,
    )
