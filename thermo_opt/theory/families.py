"""Closed forms of the Fisher–Rao geometry of common families (theory §10): metric, distance,
geodesic, flow, coordinates.

Each `Family` works in one canonical coordinate vector θ of shape (P,) and offers other coordinate
systems as charts, so that "independent of the parametrization" can be tested rather than assumed.
Distances are in the Fisher–Rao metric, whose square is twice a Kullback–Leibler divergence in nats
to second order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from thermo_opt.errors import InputError

Array = np.ndarray
Map = Callable[[Array], Array]


@dataclass(frozen=True)
class Chart:
    """A coordinate system φ of a family: φ → θ, θ → φ, and the Jacobian ∂θ/∂φ of shape (P, P) as a
    function of φ."""

    to_canonical: Map
    from_canonical: Map
    jacobian: Map


@dataclass(frozen=True)
class Family:
    """A family of distributions p_θ with everything known in closed form. All arguments and results
    are in θ unless a chart is named.

    ``metric(θ)``: F(θ), (P, P). ``distance(θ, θ')``: Fisher–Rao distance. ``geodesic(θ, θ', s)``:
    the points at fractions s of the geodesic, (K, P). ``divergence(θ*, θ)``: KL(p_θ* ‖ p_θ) in
    nats, and ``divergence_gradient`` its gradient in θ. ``expectation``/``from_expectation``: mean
    sufficient statistics, in which natural-gradient flow is a straight line. ``domain``: θ → bool;
    ``domain_text`` says the same to a person.
    """

    name: str
    dimension: int
    domain_text: str
    domain: Callable[[Array], bool]
    metric: Map
    distance: Callable[[Array, Array], float]
    geodesic: Callable[[Array, Array, Array], Array]
    divergence: Callable[[Array, Array], float]
    divergence_gradient: Callable[[Array, Array], Array]
    expectation: Map
    from_expectation: Map
    charts: dict[str, Chart] = field(default_factory=dict)

    def point(self, theta: ArrayLike) -> Array:
        """θ as a float64 vector of shape (P,); raises InputError if it has another size or lies
        outside the domain."""
        value = np.atleast_1d(np.asarray(theta, dtype=np.float64))
        if (
            value.shape != (self.dimension,)
            or not np.isfinite(value).all()
            or not self.domain(value)
        ):
            raise InputError(
                f"{self.name}: {np.array2string(value, threshold=6)} is not a point of the family; "
                f"give {self.dimension} finite number(s) with {self.domain_text}"
            )
        return value

    def chart(self, name: str) -> Chart:
        """The coordinate system of that name; raises InputError naming those that exist."""
        if name not in self.charts:
            raise InputError(
                f"{self.name} has no coordinates {name!r}; choose one of {', '.join(self.charts)}"
            )
        return self.charts[name]

    def metric_in(self, chart: str, phi: Array) -> Array:
        """Fisher metric in the chart's coordinates, JᵀF(θ(φ))J, (P, P)."""
        c = self.chart(chart)
        jacobian = c.jacobian(phi)
        return jacobian.T @ self.metric(c.to_canonical(phi)) @ jacobian

    def natural_flow(self, start: ArrayLike, target: ArrayLike, t: ArrayLike) -> Array:
        """Natural-gradient flow of KL(p_target ‖ p_θ) from ``start`` at times ``t`` (K,): points θ
        of shape (K, P).

        For an exponential family the flow θ̇ = −F⁻¹∇L is m(t) = m* + (m₀ − m*) e^{−t} in
        expectation coordinates m, in every parametrization.
        """
        m0, m1 = self.expectation(self.point(start)), self.expectation(self.point(target))
        decay = np.exp(-np.atleast_1d(np.asarray(t, dtype=np.float64)))[:, None]
        return np.stack([self.from_expectation(m) for m in m1 + (m0 - m1) * decay])


def bernoulli() -> Family:
    """Bernoulli, θ = (p,): D = 2|arcsin √p − arcsin √q|; charts probability, logit, angle (arcsin
    √p)."""

    def angle(x: Array) -> Array:
        return np.arctan2(np.sqrt(x), np.sqrt(1 - x))

    return Family(
        name="bernoulli",
        dimension=1,
        domain_text="0 < p < 1",
        domain=lambda x: bool(0 < x[0] < 1),
        metric=lambda x: np.array([[1 / (x[0] * (1 - x[0]))]]),
        distance=lambda x, y: float(2 * abs(angle(x)[0] - angle(y)[0])),
        geodesic=lambda x, y, s: np.sin(angle(x) + np.outer(s, angle(y) - angle(x))) ** 2,
        divergence=lambda x, y: float(
            x[0] * np.log(x[0] / y[0]) + (1 - x[0]) * np.log1p((y[0] - x[0]) / (1 - y[0]))
        ),
        divergence_gradient=lambda x, y: (y - x) / (y * (1 - y)),
        expectation=np.copy,
        from_expectation=np.copy,
        charts={
            "probability": _identity(1),
            "logit": Chart(
                lambda u: 1 / (1 + np.exp(-u)),
                lambda x: np.log(x) - np.log1p(-x),
                lambda u: np.diag(1 / (2 + 2 * np.cosh(u))),
            ),
            "angle": Chart(lambda u: np.sin(u) ** 2, angle, lambda u: np.diag(np.sin(2 * u))),
        },
    )


def categorical(classes: int) -> Family:
    """Categorical with c classes, θ = (p_1, …, p_{c−1}): D = 2 arccos Σ √(p q); charts
    probabilities, logits (against the last class).

    The distance is computed as 4 arcsin(|√p − √q|/2), the same number without cancellation for near
    distributions.
    """
    if classes < 2:
        raise InputError(f"a categorical family needs at least 2 classes, not {classes}")

    def full(x: Array) -> Array:
        return np.append(x, 1 - x.sum())

    def distance(x: Array, y: Array) -> float:
        return float(4 * np.arcsin(np.linalg.norm(np.sqrt(full(x)) - np.sqrt(full(y))) / 2))

    def geodesic(x: Array, y: Array, s: Array) -> Array:
        start, end = np.sqrt(full(x)), np.sqrt(full(y))
        angle = distance(x, y) / 2
        weights = np.stack(
            [(1 - s) * _sinc((1 - s) * angle), s * _sinc(s * angle)], axis=1
        ) / _sinc(angle)
        return ((weights @ np.stack([start, end])) ** 2)[:, :-1]

    def to_probabilities(u: Array) -> Array:
        logits = np.append(u, 0.0)
        weights = np.exp(logits - logits.max())
        return weights[:-1] / weights.sum()

    def jacobian(u: Array) -> Array:
        p = to_probabilities(u)
        return np.diag(p) - np.outer(p, p)

    return Family(
        name=f"categorical-{classes}",
        dimension=classes - 1,
        domain_text="positive probabilities whose sum is below 1",
        domain=lambda x: bool((x > 0).all() and x.sum() < 1),
        metric=lambda x: np.diag(1 / x) + 1 / (1 - x.sum()),
        distance=distance,
        geodesic=geodesic,
        divergence=lambda x, y: float(full(x) @ (np.log(full(x)) - np.log(full(y)))),
        divergence_gradient=lambda x, y: full(x)[-1] / full(y)[-1] - x / y,
        expectation=np.copy,
        from_expectation=np.copy,
        charts={
            "probabilities": _identity(classes - 1),
            "logits": Chart(to_probabilities, lambda x: np.log(x) - np.log1p(-x.sum()), jacobian),
        },
    )


def poisson() -> Family:
    """Poisson, θ = (λ,): D = 2|√λ − √λ'|; charts rate, log-rate, root."""
    return Family(
        name="poisson",
        dimension=1,
        domain_text="λ > 0",
        domain=lambda x: bool(x[0] > 0),
        metric=lambda x: np.array([[1 / x[0]]]),
        distance=lambda x, y: float(2 * abs(np.sqrt(x[0]) - np.sqrt(y[0]))),
        geodesic=lambda x, y, s: (np.sqrt(x) + np.outer(s, np.sqrt(y) - np.sqrt(x))) ** 2,
        divergence=lambda x, y: float(x[0] * np.log(x[0] / y[0]) + y[0] - x[0]),
        divergence_gradient=lambda x, y: 1 - x / y,
        expectation=np.copy,
        from_expectation=np.copy,
        charts={
            "rate": _identity(1),
            "log-rate": Chart(np.exp, np.log, lambda u: np.diag(np.exp(u))),
            "root": Chart(np.square, np.sqrt, lambda u: np.diag(2 * u)),
        },
    )


def exponential() -> Family:
    """Exponential with rate λ, θ = (λ,): D = |ln(λ/λ')|; charts rate, log-rate, mean (1/λ)."""
    return Family(
        name="exponential",
        dimension=1,
        domain_text="λ > 0",
        domain=lambda x: bool(x[0] > 0),
        metric=lambda x: np.array([[1 / x[0] ** 2]]),
        distance=lambda x, y: float(abs(np.log(x[0] / y[0]))),
        geodesic=lambda x, y, s: np.exp(np.log(x) + np.outer(s, np.log(y / x))),
        divergence=lambda x, y: float(np.log(x[0] / y[0]) + y[0] / x[0] - 1),
        divergence_gradient=lambda x, y: 1 / x - 1 / y,
        expectation=lambda x: 1 / x,
        from_expectation=lambda m: 1 / m,
        charts={
            "rate": _identity(1),
            "log-rate": Chart(np.exp, np.log, lambda u: np.diag(np.exp(u))),
            "mean": Chart(lambda u: 1 / u, lambda x: 1 / x, lambda u: np.diag(-1 / u**2)),
        },
    )


def normal() -> Family:
    """Univariate normal, θ = (μ, σ): hyperbolic half-plane of curvature −½ (Atkinson & Mitchell
    1981); four charts.

    D = √2 arccosh(1 + ((μ−μ')²/2 + (σ−σ')²)/(2σσ')), computed as 2√2 arcsinh √(·/2). Geodesics are
    the semicircles
    centred on σ = 0 in (μ/√2, σ), computed on the hyperboloid, where vertical lines are no special
    case. Charts: mean-scale, mean-log-scale, natural (μ/σ², −1/2σ²), expectation (μ, μ²+σ²).
    """

    def distance(x: Array, y: Array) -> float:
        excess = ((x[0] - y[0]) ** 2 / 2 + (x[1] - y[1]) ** 2) / (2 * x[1] * y[1])
        return float(2 * np.sqrt(2) * np.arcsinh(np.sqrt(excess / 2)))

    def hyperboloid(x: Array) -> Array:
        h = x[0] / np.sqrt(2)
        return np.array(
            [x[1] + h * h / x[1], 1 / x[1], h / x[1]]
        )  # light-cone coordinates, no cancellation

    def geodesic(x: Array, y: Array, s: Array) -> Array:
        angle = distance(x, y) / np.sqrt(2)
        weights = np.stack(
            [(1 - s) * _sinhc((1 - s) * angle), s * _sinhc(s * angle)], axis=1
        ) / _sinhc(angle)
        shifted = y - np.array(
            [x[0], 0.0]
        )  # translation along μ is an isometry: centre on the start
        points = weights @ np.stack([hyperboloid(np.array([0.0, x[1]])), hyperboloid(shifted)])
        sigma = 1 / points[:, 1]
        return np.stack([x[0] + np.sqrt(2) * points[:, 2] * sigma, sigma], axis=1)

    def divergence(x: Array, y: Array) -> float:
        r = x[1] / y[1]
        return float(-np.log(r) + (r * r - 1) / 2 + (x[0] - y[0]) ** 2 / (2 * y[1] ** 2))

    def divergence_gradient(x: Array, y: Array) -> Array:
        gap = y[0] - x[0]
        return np.array([gap / y[1] ** 2, 1 / y[1] - (x[1] ** 2 + gap**2) / y[1] ** 3])

    def from_natural(u: Array) -> Array:
        variance = -1 / (2 * u[1])
        return np.array([u[0] * variance, np.sqrt(variance)])

    def natural_jacobian(u: Array) -> Array:
        mu, sigma = from_natural(u)
        return np.array([[sigma**2, 2 * mu * sigma**2], [0.0, sigma**3]])

    def from_expectation(m: Array) -> Array:
        return np.array([m[0], np.sqrt(m[1] - m[0] ** 2)])

    def to_expectation(x: Array) -> Array:
        return np.array([x[0], x[0] ** 2 + x[1] ** 2])

    return Family(
        name="normal",
        dimension=2,
        domain_text="σ > 0",
        domain=lambda x: bool(x[1] > 0),
        metric=lambda x: np.diag([1.0, 2.0]) / x[1] ** 2,
        distance=distance,
        geodesic=geodesic,
        divergence=divergence,
        divergence_gradient=divergence_gradient,
        expectation=to_expectation,
        from_expectation=from_expectation,
        charts={
            "mean-scale": _identity(2),
            "mean-log-scale": Chart(
                lambda u: np.array([u[0], np.exp(u[1])]),
                lambda x: np.array([x[0], np.log(x[1])]),
                lambda u: np.diag([1.0, np.exp(u[1])]),
            ),
            "natural": Chart(
                from_natural,
                lambda x: np.array([x[0] / x[1] ** 2, -1 / (2 * x[1] ** 2)]),
                natural_jacobian,
            ),
            "expectation": Chart(
                from_expectation,
                to_expectation,
                lambda u: np.array(
                    [[1.0, 0.0], [-u[0] / from_expectation(u)[1], 0.5 / from_expectation(u)[1]]]
                ),
            ),
        },
    )


def normal_mean(covariance: ArrayLike) -> Family:
    """Normal with known covariance Σ (n, n), θ = mean (n,): D = √((μ−μ')ᵀΣ⁻¹(μ−μ')) (Mahalanobis);
    charts mean, whitened.

    Raises InputError unless Σ is symmetric positive definite.
    """
    sigma = np.atleast_2d(np.asarray(covariance, dtype=np.float64))
    try:
        root = np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        root = np.full_like(sigma, np.nan)
    if not np.isfinite(root).all() or not np.allclose(sigma, sigma.T):
        raise InputError(
            "the covariance of a normal family must be symmetric and positive definite"
        )
    precision = linalg.cho_solve((root, True), np.eye(len(sigma)))
    inverse_root = linalg.solve_triangular(root, np.eye(len(sigma)), lower=True)
    return Family(
        name="normal-mean",
        dimension=len(sigma),
        domain_text="any mean",
        domain=lambda x: True,
        metric=lambda x: precision,
        distance=lambda x, y: float(np.linalg.norm(inverse_root @ (x - y))),
        geodesic=lambda x, y, s: x + np.outer(s, y - x),
        divergence=lambda x, y: float((x - y) @ precision @ (x - y) / 2),
        divergence_gradient=lambda x, y: precision @ (y - x),
        expectation=np.copy,
        from_expectation=np.copy,
        charts={
            "mean": _identity(len(sigma)),
            "whitened": Chart(lambda u: root @ u, lambda x: inverse_root @ x, lambda u: root),
        },
    )


def normal_covariance(size: int) -> Family:
    """Zero-mean normal in n dimensions, θ = the lower triangle of Σ by rows (P = n(n+1)/2): D = √(½
    Σ ln² eig(Σ₁⁻¹Σ₂)).

    Charts: covariance, precision, cholesky (lower factor by rows, positive diagonal). Source:
    Skovgaard 1984.
    """
    rows, columns = np.tril_indices(size)
    count = len(rows)
    duplication = np.zeros((size * size, count))  # vec(Σ) = duplication @ θ
    duplication[rows * size + columns, np.arange(count)] = 1
    duplication[columns * size + rows, np.arange(count)] = 1

    def matrix(x: Array) -> Array:
        return (duplication @ x).reshape(size, size)

    def half(s: Array) -> Array:
        return s[rows, columns]

    def positive(x: Array) -> bool:
        return bool(np.linalg.eigvalsh(matrix(x))[0] > 0)

    def metric(x: Array) -> Array:
        inverse = np.linalg.inv(matrix(x))
        return duplication.T @ np.kron(inverse, inverse) @ duplication / 2

    def distance(x: Array, y: Array) -> float:
        return float(np.sqrt((np.log(linalg.eigvalsh(matrix(y), matrix(x))) ** 2).sum() / 2))

    def geodesic(x: Array, y: Array, s: Array) -> Array:
        values, vectors = linalg.eigh(matrix(y), matrix(x))  # vectorsᵀ Σ₁ vectors = I
        dual = matrix(x) @ vectors
        return np.stack([half((dual * values**fraction) @ dual.T) for fraction in s])

    def divergence(x: Array, y: Array) -> float:
        ratio = linalg.eigvalsh(matrix(x), matrix(y))
        return float((ratio - 1 - np.log(ratio)).sum() / 2)

    def divergence_gradient(x: Array, y: Array) -> Array:
        inverse = np.linalg.inv(matrix(y))
        return duplication.T @ (inverse - inverse @ matrix(x) @ inverse).ravel() / 2

    def triangle(u: Array) -> Array:
        factor = np.zeros((size, size))
        factor[rows, columns] = u
        return factor

    def invert(x: Array) -> Array:
        return half(np.linalg.inv(matrix(x)))

    def precision_jacobian(u: Array) -> Array:
        sigma = np.linalg.inv(matrix(u))
        changes = [-sigma @ matrix(e) @ sigma for e in np.eye(count)]
        return np.stack([half(c) for c in changes], axis=1)

    def cholesky_jacobian(u: Array) -> Array:
        factor = triangle(u)
        changes = [triangle(e) @ factor.T for e in np.eye(count)]
        return np.stack([half(c + c.T) for c in changes], axis=1)

    return Family(
        name=f"normal-covariance-{size}",
        dimension=count,
        domain_text="a positive definite covariance (its lower triangle by rows)",
        domain=positive,
        metric=metric,
        distance=distance,
        geodesic=geodesic,
        divergence=divergence,
        divergence_gradient=divergence_gradient,
        expectation=np.copy,
        from_expectation=np.copy,
        charts={
            "covariance": _identity(count),
            "precision": Chart(invert, invert, precision_jacobian),
            "cholesky": Chart(
                lambda u: half(triangle(u) @ triangle(u).T),
                lambda x: half(np.linalg.cholesky(matrix(x))),
                cholesky_jacobian,
            ),
        },
    )


def _identity(size: int) -> Chart:
    return Chart(np.copy, np.copy, lambda u: np.eye(size))


def _sinc(x: ArrayLike) -> Array:
    return np.sinc(np.asarray(x) / np.pi)  # sin x / x, 1 at 0


def _sinhc(x: ArrayLike) -> Array:
    x = np.asarray(x, dtype=np.float64)
    return np.where(x == 0, 1.0, np.sinh(x) / np.where(x == 0, 1.0, x))
