"""NGD-T: natural-gradient descent on a dissipation budget (THEORY §7–8)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Categorical, Likelihood
from thermo_opt.fisher.likelihoods import likelihood as named_likelihood
from thermo_opt.optim import checks
from thermo_opt.optim.calibration import EXCESS, Calibration
from thermo_opt.optim.compiled import Compiled
from thermo_opt.optim.curvature import BatchCurvature, Curvature, Lengths, Passes, Recipe
from thermo_opt.optim.distributed import Processes
from thermo_opt.optim.kronecker_curvature import KroneckerCurvature
from thermo_opt.optim.observer import Forward, ModelObserver
from thermo_opt.optim.regulators import Regulator, Schedule, at, named
from thermo_opt.optim.schedule import Refresh
from thermo_opt.optim.units import Settings

KRONECKER = ("kfac", "ekfac")
BATCH = ("exact", "dense", "low-rank", "diagonal")
NULL_SPACE = ("damped", "none", "hybrid")


class NGDT(Optimizer):
    """Thermodynamic natural-gradient descent: each step spends a set dissipation, in nats, and buys
    the most decrease for it.

        opt = NGDT(model, budget=0.03)
        loss = cross_entropy(model(x), y); loss.backward(); opt.step(); opt.zero_grad()

    One step (THEORY §7), with b the momentum of natural gradients, w weight decay, κ the
    calibration:

        b ← μ b + F_λ⁻¹ g,   v = (b + w θ)/κ,   a = vᵀ(κF_λ)v,   η_T = min(η_max, √(2 budget/a)),
        δ = −lr·η_T·v − η_null P₀g

    so that ½ δᵀ(κF_λ)δ, to second order the KL divergence between the predictions before and after,
    equals lr²·budget until η_max binds. κ is 1 for exact metrics; for approximate ones it follows
    the KL that steps really cause (one forward pass of a few examples of the minibatch, on each of
    the first steps and every ``calibrate``-th later, seldomer in long runs); a measured step that
    overspends is shortened.

    The loss must be the *mean* negative log-likelihood of ``likelihood`` over the batch (auxiliary
    terms are welcome); under gradient accumulation, the mean over all equally large parts. Pass the
    model that you call (a compiled one, if you compile).

    model: the module being trained; hooks are attached to it (`close`, or use the optimizer as a
    context manager, removes them). budget: nats a step, or a function of the step. 0.03 suits
        minibatch training of classifiers and language models; it is the speed against dissipation
        knob. params: parameters or parameter groups (default: all that require grad). Group
        options: ``lr``, ``weight_decay``, ``share`` (the fraction of the budget this group spends
        on its own; the others share the rest).
    lr: dimensionless multiplier of the step, for torch's schedulers. momentum: μ. weight_decay: w,
    decoupled, regulated with the step. metric: "kfac" (default), "ekfac"; or, for small work, a
        `thermo_opt.fisher` metric of each minibatch: "exact", "dense", "low-rank", "diagonal"
        (Dropout and BatchNorm then in evaluation mode; ``metric_options`` go to
        `thermo_opt.fisher.make`).
    regulator: "dissipation" (default), "heat", "fixed" (η_T = eta_max), or an object with
    `Regulator`'s methods. null_space: "damped" (F_λ⁻¹ acts everywhere), "none" (pseudo-inverse, no
    motion in the null space), "hybrid" (adds −eta_null·P₀g). damping: λ, absolute, for the Fisher
        of one prediction's log-likelihood, or a function of the step. Default with "damped": for
        K-FAC kinds max(1e-4, 10·(tr F/d)/N) for d parameters and N predictions a step
        (`optim.damping` says why), for metrics of a minibatch 1e-3; otherwise 0. K-FAC with
        "damped" splits λ between the two factors (Martens & Grosse's π) and inverts them; every
        other combination uses eigenbases, where eigenvalues ≤ max(rtol·σ_max, atol) (K-FAC: of the
        products) count as zero.
    targets: "empirical" (the labels of the batch, no extra cost) or "sampled" (from the model: one
        more forward and backward pass on refresh steps). decay: memory of running factors.
        refresh_every: longest refresh interval; it grows to that from 1 over the first
        ``12·refresh_every`` steps, blocks in turn. rows: most rows a layer's factors read at one
        refresh (None: all). overhead: largest share of the passes' multiplications that F_λ⁻¹g may
        cost; where it would cost more, wide factors are cut into diagonal blocks of side ≥ 128
        (`math.inf`: never).
    calibrate: steps between measurements (0: never; default 10 for K-FAC kinds and "diagonal", 0
        otherwise); calibration_predictions: about how many predictions a measurement reads, in 4
        examples at least (None: the whole minibatch). A model with Dropout or BatchNorm in training
        mode is measured on the whole minibatch.
    grad_scaler: the ``torch.amp.GradScaler`` in use; needed only when ``scaler.unscale_(opt)`` is
    called before the step.

    ``last_step`` holds plain numbers: ``budget, delta`` (Δ), ``eta`` (η_T), ``predicted`` and
    ``realised`` dissipation in nats (realised: None where not measured; of a shortened step, the
    measurement times ``shortened``²), ``shortened``, ``decrease`` (predicted), ``alignment``,
    ``kappa``, ``skipped`` (steps so far), ``damping`` and the metric's own.

    Under ``torch.distributed`` factors are averaged over processes and their inverses shared out;
    gradients are DistributedDataParallel's. Cost beside the backward pass, K-FAC: per layer
    O(out·in·(out+in)) a step and O(out³+in³) a refresh; memory: momentum (one copy of the
    parameters) and two matrices of each side. Raises `InputError` for what it can't train. Sources:
    THEORY, Sources.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        budget: Schedule = 0.03,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        metric: str = "kfac",
        regulator: str | Regulator = "dissipation",
        null_space: str = "damped",
        damping: Schedule | None = None,
        eta_max: Schedule = 1.0,
        eta_null: float = 0.01,
        likelihood: str | Likelihood = "categorical",
        sigma2: float | None = None,
        targets: str = "empirical",
        decay: float = 0.95,
        refresh_every: int = 32,
        rows: int | None = 256,
        overhead: float = 0.05,
        setting: str = "expand",
        rtol: float | None = None,
        atol: float = 0.0,
        calibrate: int | None = None,
        calibration_predictions: int | None = 32,
        metric_options: dict[str, Any] | None = None,
        grad_scaler: Any = None,
    ) -> None:
        checks.options(locals())
        self.compiled = Compiled(model)
        self.model = checks.unwrap(model)
        checks.model(self.model)
        groups = checks.groups(self.model, params, per_layer=metric in KRONECKER)
        super().__init__(
            groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "share": None}
        )
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._guard = checks.Unchanged(self.model, self._params)
        self.likelihood = named_likelihood(likelihood, sigma2)
        self.regulator = named(regulator, budget, eta_max)
        self.null_space, self.eta_null = null_space, eta_null
        self.damping: Schedule | None = (
            0.0 if damping is None and null_space != "damped" else damping
        )
        self.metric = metric
        self.processes = Processes()
        self._pools, self._shares = checks.pools(self.param_groups)
        self.curvature: Curvature
        if metric in KRONECKER:
            spectral = metric == "ekfac" or null_space != "damped"
            kept = Settings(decay, rows, overhead, setting, spectral, metric == "ekfac", rtol, atol)
            turns = Refresh(refresh_every, staggered=targets == "empirical" and not self.compiled)
            numbers = [k for k, group in enumerate(self.param_groups) for _ in group["params"]]
            self.curvature = KroneckerCurvature(
                self.model,
                self._params,
                numbers,
                self._pools,
                self.likelihood,
                kept,
                turns,
                targets,
                self.processes,
            )
        else:
            if self._shares != [1.0]:
                raise InputError(
                    "a group's 'share' of the budget needs a block-diagonal metric: use "
                    "metric='kfac' or 'ekfac'"
                )
            extra = dict(metric_options or {})
            self.curvature = BatchCurvature(
                metric, self.model, self._params, self.likelihood, extra
            )
        if calibrate is None:
            calibrate = 10 if metric in (*KRONECKER, "diagonal") else 0
        self.calibration = Calibration(calibrate) if calibrate else None
        self.calibration_predictions = calibration_predictions
        self.grad_scaler = grad_scaler
        self.steps = 0
        self.skipped = 0
        self.last_step: dict[str, float | None] = {}
        self._observer = ModelObserver(self.model)
        self._closed = False
        self._arm()

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in ``p.grad``; ``closure`` re-evaluates the model and
        returns the loss.

        A non-finite loss or gradient skips the step: it is counted, warned of once, and leaves
        factors and momentum untouched. Raises `InputError` when there is no gradient, or when the
        model was changed since construction.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._closed:
            raise InputError("this NGDT was closed: make a new one to go on training")
        self._guard.check()
        passes = self._observer.used
        checks.passes(passes, [p.grad for p in self._params])
        scale = self._loss_scale()
        overflow = getattr(self, "found_inf", None)
        if (overflow is not None and float(overflow) > 0) or (
            isinstance(loss, Tensor) and not bool(loss.isfinite().all())
        ):
            return self._skip(loss)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        terms = float(sum(seen.terms for seen in passes))
        if isinstance(self.likelihood, Categorical):
            checks.mean_loss(passes, scale)
        step = self.steps
        self._observer.disarm()  # the metric runs the model too
        damping = None if self.damping is None else at(self.damping, step, "damping", zero=True)
        self.curvature.update(
            gradients, Passes(passes[-1] if passes else None, terms, scale), damping
        )
        lengths = self.curvature.direction(gradients, self._recipe())
        if not lengths.finite:
            return self._skip(loss)
        self._move(step, lengths, passes)
        self.steps += 1
        self._arm()
        return loss

    def _loss_scale(self) -> float:
        """The factor by which a GradScaler has multiplied the loss of the captured passes;
        gradients are unscaled here if need be."""
        inverse = getattr(self, "grad_scale", None)
        if inverse is not None:
            scale = float(inverse)
            torch._foreach_mul_([p.grad for p in self._params if p.grad is not None], 1.0 / scale)
            return scale
        if self.grad_scaler is not None:
            return float(self.grad_scaler.get_scale())
        if getattr(self, "found_inf", None) is not None and self.metric in KRONECKER:
            raise InputError(
                "scaler.unscale_(optimizer) hides the loss scale from NGDT: construct it with "
                "grad_scaler=scaler"
            )
        return 1.0

    def _recipe(self) -> Recipe:
        rates = [float(group["lr"]) for group in self.param_groups]
        self._rate = max(rates)
        decay, weights = [], []
        for group, rate in zip(self.param_groups, rates, strict=True):
            decay += [float(group["weight_decay"])] * len(group["params"])
            weights += [rate / self._rate if self._rate > 0 else 0.0] * len(group["params"])
        momentum = float(self.param_groups[0]["momentum"])
        return Recipe(momentum, decay, weights, self.null_space == "hybrid")

    def _move(self, step: int, lengths: Lengths, passes: list[Forward]) -> None:
        kappa = 1.0 if self.calibration is None else self.calibration.kappa
        etas = [self._step_size(pool, a / kappa, step) for pool, a in enumerate(lengths.a)]
        sizes = [self._rate * eta / kappa for eta in etas]
        null_size = self._rate * self.eta_null if self.null_space == "hybrid" else 0.0
        self.curvature.apply(sizes, null_size)
        predicted = sum(
            0.5 * kappa * size * size * a for size, a in zip(sizes, lengths.a, strict=True)
        )
        decrease = sum(size * d for size, d in zip(sizes, lengths.decrease, strict=True))
        total, delta = sum(lengths.a), sum(lengths.delta)
        slope = sum(lengths.decrease)
        budget = self.regulator.budget_at(step)
        realised, shortened = None, 1.0
        calibration = self.calibration
        if calibration is not None and calibration.wanted(step, delta) and passes and predicted > 0:
            realised = self._realised(passes[-1])
            if math.isfinite(realised):
                calibration.observe(step, predicted, realised)
            limit = None if budget is None else budget * self._rate**2
            if limit is not None and not realised <= EXCESS * limit:
                shortened = (
                    max(math.sqrt(limit / realised), 0.1) if math.isfinite(realised) else 0.0
                )
                self.curvature.apply(
                    [-(1 - shortened) * size for size in sizes], -(1 - shortened) * null_size
                )
                realised = realised * shortened**2 if math.isfinite(realised) else None
        self.last_step = {
            "budget": budget,
            "delta": delta / kappa,
            "eta": etas[0],
            "predicted": predicted * shortened**2,
            "realised": realised,
            "shortened": shortened,
            "decrease": decrease * shortened,
            "alignment": slope * abs(slope) / (total * delta) if total > 0 and delta > 0 else None,
            "kappa": kappa,
            "skipped": float(self.skipped),
            **self.curvature.diagnostics(),
        }

    def _step_size(self, pool: int, a: float, step: int) -> float:
        share = self._shares[pool]
        return self.regulator.step_size(a / share, step) if share > 0 else 0.0

    def _realised(self, seen: Forward) -> float:
        """Mean KL(before ‖ after) over predictions of the step's minibatch (nats)."""
        old, new = seen.again(self.model, self.calibration_predictions)
        kl = self.likelihood.kl(
            self.likelihood.outputs(old.float()), self.likelihood.outputs(new.float())
        )
        return self.processes.mean(max(float(kl.mean()), 0.0))

    def _skip(self, loss: Any) -> Any:
        self.skipped += 1
        self.curvature.discard()
        if self.skipped == 1:
            warnings.warn(
                "a non-finite loss or gradient: the step was skipped (later ones only count in "
                "last_step['skipped']); "
                "if there are many, lower the budget or check the data",
                stacklevel=3,
            )
        self.last_step = {"skipped": float(self.skipped), "predicted": 0.0, "realised": None}
        self._observer.clear()
        self._arm()
        return loss

    def _arm(self) -> None:
        self._observer.clear()
        self.curvature.arm(self.steps, self.calibration is not None and self.calibration.breached)
        measuring = self.calibration is not None and self.calibration.due(self.steps)
        wanted = measuring or self.curvature.hooked
        if wanted or not self.compiled:
            self._observer.arm(counting=self.curvature.hooked)
        else:
            self._observer.disarm()
        self.compiled.eager(wanted)

    # ---- torch's habits

    def state_dict(self) -> dict[str, Any]:
        """torch's dictionary with one more entry, "ngdt": step count, calibration, running factors
        and momentum. Resuming from it continues bit for bit on the same machine (schedules given as
        functions are the caller's to give again)."""
        state: dict[str, Any] = super().state_dict()
        state["ngdt"] = {
            "metric": self.metric,
            "steps": self.steps,
            "skipped": self.skipped,
            "calibration": None if self.calibration is None else self.calibration.state_dict(),
            "curvature": self.curvature.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; `InputError` when it is not NGDT's, or of another metric
        or model."""
        own = state_dict.get("ngdt")
        if not isinstance(own, dict) or "curvature" not in own:
            raise InputError(
                "this optimizer state has no entry 'ngdt': it was saved by another optimizer"
            )
        if own["metric"] != self.metric:
            raise InputError(
                f"the saved state is of metric={own['metric']!r}, this optimizer has "
                f"{self.metric!r}"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "ngdt"})
        self.steps, self.skipped = int(own["steps"]), int(own["skipped"])
        if self.calibration is not None and own["calibration"] is not None:
            self.calibration.load_state_dict(own["calibration"])
        self.curvature.load_state_dict(own["curvature"])
        self._arm()

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can't step afterwards."""
        self._closed = True
        self.curvature.close()
        self._observer.clear()
        self._observer.disarm()
        self.compiled.eager(False)

    def __enter__(self) -> NGDT:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
