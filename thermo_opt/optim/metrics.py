"""The metrics that NGDT can train in, as objects that hold their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from thermo_opt.fisher.kronecker.rules import KFAC_APPROXIMATIONS
from thermo_opt.optim import validate
from thermo_opt.optim.kronecker.metric import KroneckerMetric
from thermo_opt.optim.minibatch import MinibatchMetric
from thermo_opt.optim.training_metric import Setup, TrainingMetric

INVERSES = ("damped", "pseudo", "pseudo+null")
FISHER_TYPES = ("empirical", "mc")
MINIBATCH_KINDS = ("exact", "dense", "low-rank", "diagonal")


@dataclass(frozen=True)
class KFAC:
    """Running Kronecker factors of the ordinary passes, one block per layer (theory §7).

    Cost beside the backward pass: per layer O(out·in·(out+in)) per step and O(out³+in³) per
    refresh; memory: two matrices of each side, in half precision. Sources: Martens & Grosse 2015;
    Grosse & Martens 2016; Eschenhagen et al. 2023.

    Args:
        factor_decay: memory of the running factors: an observation counts for 1/(1−factor_decay)
            refreshes.
        max_rows: most rows (examples × shared positions) of a layer's passes that one refresh
            reads; None: all.
        max_refresh_interval: most steps between refreshes of one block. The interval grows to it
            from 1 over the first ``12·max_refresh_interval`` steps; blocks take turns.
        max_solve_overhead: largest share of the passes' multiplications that F_λ⁻¹g may cost;
            where it would cost more, wide factors are cut into diagonal blocks of side ≥ 128.
            `math.inf`: never.
        kfac_approx: how positions that share a weight enter: "expand" (each counts as an example)
            or "reduce" (they are summed first).
        fisher_type: "empirical" (the labels of the batch, no extra cost) or "mc" (labels drawn from
            the model: one more forward and backward pass on refresh steps).
        inverse: "damped" (F_λ⁻¹ acts everywhere: λ is divided between the two factors, Martens &
            Grosse's π, and both are inverted), "pseudo" (pseudo-inverse, no motion in the null
            space) or "pseudo+null" (adds −eta_null·P₀g). The last two use eigenbases.
        eta_null: size of the step in the null space.
        rtol: eigenvalues (products of the factors') ≤ max(rtol·σ_max, atol) count as zero. None:
            the size of the block times the machine epsilon.
        atol: see ``rtol``.
        half_state: whether "damped" factors and inverses of float32 layers are kept in 16 bits a
            number between the steps that use them, with a scale per matrix (`docs/train.md` says
            what it costs).

    Raises:
        InputError: for an option that is impossible.
    """

    factor_decay: float = 0.95
    max_rows: int | None = 256
    max_refresh_interval: int = 32
    max_solve_overhead: float = 0.05
    kfac_approx: str = "expand"
    fisher_type: str = "empirical"
    inverse: str = "damped"
    eta_null: float = 0.01
    rtol: float | None = None
    atol: float = 0.0
    half_state: bool = True

    kind: ClassVar[str] = "kfac"
    corrected: ClassVar[bool] = False
    """Whether eigenvalues are EKFAC's."""
    approximate: ClassVar[bool] = True
    """Whether predicted and realised KL differ, so that calibration pays."""
    per_layer: ClassVar[bool] = True
    """Whether the metric is block-diagonal, so that groups may have shares of the budget."""

    def __post_init__(self) -> None:
        validate.fraction("factor_decay", self.factor_decay)
        if self.max_rows is not None:
            validate.at_least_one("max_rows", self.max_rows)
        validate.at_least_one("max_refresh_interval", self.max_refresh_interval)
        validate.above_zero("max_solve_overhead", self.max_solve_overhead)
        validate.choice("kfac_approx", self.kfac_approx, KFAC_APPROXIMATIONS)
        validate.choice("fisher_type", self.fisher_type, FISHER_TYPES)
        validate.choice("inverse", self.inverse, INVERSES)
        validate.number("eta_null", self.eta_null)
        validate.number("atol", self.atol)

    @property
    def spectral(self) -> bool:
        """Whether blocks keep eigenbases rather than Cholesky inverses."""
        return self.corrected or self.inverse != "damped"

    def attach(self, setup: Setup) -> TrainingMetric:
        """The metric of a model in training."""
        return KroneckerMetric(self.kind, setup, self)


@dataclass(frozen=True)
class EKFAC(KFAC):
    """`KFAC`'s eigenbases with eigenvalues re-estimated from per-example gradients (George et al.
    2018).

    Options: those of `KFAC`. Tied weights keep K-FAC's eigenvalues.
    """

    kind: ClassVar[str] = "ekfac"
    corrected: ClassVar[bool] = True


class Minibatch:
    """A `thermo_opt.fisher` metric of each step's own minibatch, made anew: exact, for small work.

    Dropout and BatchNorm are in evaluation mode while the metric is made.

    Args:
        kind: "exact", "dense", "low-rank" or "diagonal".
        inverse: as for `KFAC`.
        eta_null: as for `KFAC`.
        **options: go to `thermo_opt.fisher.make`.

    Raises:
        InputError: for a kind or an option that is impossible.
    """

    per_layer = False

    def __init__(
        self, kind: str, *, inverse: str = "damped", eta_null: float = 0.01, **options: Any
    ) -> None:
        validate.choice("metric", kind, MINIBATCH_KINDS)
        validate.choice("inverse", inverse, INVERSES)
        validate.number("eta_null", eta_null)
        self.kind, self.inverse, self.eta_null, self.options = kind, inverse, eta_null, options

    @property
    def approximate(self) -> bool:
        """Whether predicted and realised KL differ, so that calibration pays."""
        return self.kind == "diagonal"

    def attach(self, setup: Setup) -> TrainingMetric:
        """The metric of a model in training."""
        eta_null = self.eta_null if self.inverse == "pseudo+null" else None
        return MinibatchMetric(self.kind, setup, eta_null, self.options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Minibatch({self.kind!r}, inverse={self.inverse!r}{options})"


MetricOptions = KFAC | Minibatch


def metric_of(metric: str | MetricOptions, **options: Any) -> MetricOptions:
    """The metric of this name with these options; an object is returned as it is."""
    if isinstance(metric, KFAC | Minibatch):
        return metric
    validate.choice("metric", metric, ("kfac", "ekfac", *MINIBATCH_KINDS))
    if metric in MINIBATCH_KINDS:
        return Minibatch(metric, **options)
    return EKFAC(**options) if metric == "ekfac" else KFAC(**options)
