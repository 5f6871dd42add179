"""NGD-T: natural-gradient descent on a dissipation budget (theory §7-8)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Categorical, Likelihood
from thermo_opt.fisher.likelihoods import likelihood as named_likelihood
from thermo_opt.optim import state, validate
from thermo_opt.optim.budget import Regulator, Schedule, named, value_at
from thermo_opt.optim.calibration import ABOVE_FLOOR, EXCESS, IDLE, Calibration
from thermo_opt.optim.class_axis import ClassAxis
from thermo_opt.optim.compiled import Compiled
from thermo_opt.optim.forward_pass import effective_terms, loss_left, of_one_loss
from thermo_opt.optim.inflation import Inflation
from thermo_opt.optim.measurement import KLMeter, Measurements
from thermo_opt.optim.metrics import MetricOptions
from thermo_opt.optim.notices import GradientWatch, Notices
from thermo_opt.optim.old_keywords import translated
from thermo_opt.optim.pass_recorder import PassRecorder
from thermo_opt.optim.processes import Processes
from thermo_opt.optim.sharding import is_sharded, own_part, whole, zeros_like
from thermo_opt.optim.signal import Signal
from thermo_opt.optim.training_metric import Setup, StepInputs, StepLengths, UpdateRule
from thermo_opt.optim.weight_decay import default_weight_decay

REPORTED = (
    "budget",
    "delta",
    "eta",
    "bound_by_eta_max",
    "loss_left",
    "signal",
    "signal_ratio",
    "predicted",
    "realised",
    "shortened",
    "decrease",
    "alignment",
    "kappa",
    "inflation",
    "loss_scale",
    "skipped",
)
"""What `NGDT.last_step` always holds, beside the metric's own numbers."""

WATCHED = 20
"""First steps in which gradients are compared with what backward left."""

QUADRATIC = 4.0
"""A KL of so many times the budget isn't the square of the step's length any more: what is left
after the step was shortened is measured again."""

MOST_CUTS = 8
"""Times that a step is shortened."""

SHOCK = 5.0
"""A step after which the loss rises along it by more than this many times what it cost was a shock.
"""

BOUND = 0.99
"""A step that would cost less than this share of its budget is bounded by something else."""


USUAL_BUDGET = 0.01
"""Nats per step where none is asked for; more where little of them reaches other examples."""


class NGDT(Optimizer):
    """Thermodynamic natural-gradient descent: each step spends a set dissipation, in nats, and buys
    the most decrease for it.

        opt = NGDT(model, budget=0.03)
        loss = cross_entropy(model(x), y); loss.backward(); opt.step(); opt.zero_grad()

    One step (theory §7), with b the momentum of natural gradients, w weight decay, κ the
    calibration:

        b ← μ b + F_λ⁻¹ g,   v = ((1−μ) b + w θ)/κ,   a = vᵀ(κF_λ)v,
        η_T = s·min(η_max, √(2 budget/a)),   δ = −lr·η_T·v − η_null P₀g

    What is regulated is the applied update δ, momentum and decay included: ½ δᵀ(κF_λ)δ, to second
    order the KL divergence between the predictions on the step's minibatch before and after, equals
    lr²·s²·budget until η_max binds. v is an average of natural gradients, so that η_max = 1 is one
    Newton step. s ≤ 1 follows the signal (`optim.signal`): it is 1 while the next minibatch's
    gradient still points along the last step, and shrinks where steps go beyond what lowers the
    expected loss, because they follow noise or because the loss is spent. No step costs more nats
    than the minibatch's loss has left. κ is 1 for exact metrics; for approximate ones it follows
    the KL that steps really cause (one forward pass of a few examples of the minibatch, at first on
    every step, later on fewer: `Calibration`); a measured step that overspends is shortened.

    The loss must be the *mean* negative log-likelihood of ``likelihood`` over the batch (auxiliary
    terms are welcome); under gradient accumulation, the mean over all equally large parts. Pass the
    model that you call (a compiled one, if you compile). Under ``torch.distributed`` factors are
    averaged over processes and their inverses shared out; gradients are DistributedDataParallel's.

    ``last_step`` holds plain numbers, None where unknown: ``budget``, ``delta`` (Δ), ``eta`` (η_T),
    ``bound_by_eta_max`` (1 where η_max, or ``loss_left``, and not the budget limited the step),
    ``loss_left`` (nats: what the loss could still fall by), ``signal`` (s) and ``signal_ratio``
    (what the last step left to gain along it, over its cost), ``predicted`` and ``realised``
    dissipation in nats (realised: None where not measured; of a shortened step, the measurement
    times ``shortened``²), ``shortened``, ``decrease`` (predicted), ``alignment``,
    ``kappa`` (κ for this step's Δ), ``inflation`` (I, the running ratio of a step's KL on its own
    minibatch to its KL on the next, `optim.inflation`), ``loss_scale`` (by which factor the loss is
    larger than the mean negative log-likelihood), ``skipped`` (steps so far), ``damping`` and the
    metric's own.

    Cost beside the backward pass: the metric's (see `KFAC`), momentum, one copy of the parameters,
    and while a step is measured another. Sources: theory page, Sources.

    Args:
        model: the module being trained; hooks are attached to it (`close`, or use the optimizer as
            a context manager, removes them).
        budget: most nats per step, or a function of the step; it is the speed against dissipation
            knob. None: 0.01, and I/4 times as many, at most ten, where less than a quarter of a
            step's nats reach other examples: where the inflation I after 30 steps is above 4
            (`optim.inflation`). 0.03 suits long passes over much data.
        params: parameters or parameter groups (default: all that require grad). Group options:
            ``lr``, ``weight_decay``, ``share`` (the fraction of the budget that this group spends
            on its own; the others share the rest).
        lr: dimensionless multiplier of the step, for torch's schedulers.
        momentum: μ.
        weight_decay: w, decoupled, regulated with the step. None: for K-FAC kinds and predictions
            that can become certain ("categorical", "bernoulli") 0.3 over the number of weight
            matrices, of which there are at least 3, of parameters that a layer rule covers
            (`optim.weight_decay` says why), otherwise 0. 0 suits the finetuning of weights that
            were trained before, and losses that can be brought to zero.
        metric: "kfac" (default), "ekfac", or for small work a `thermo_opt.fisher` metric of each
            minibatch: "exact", "dense", "low-rank", "diagonal". An object `KFAC`, `EKFAC` or
            `Minibatch` holds their options.
        regulator: "dissipation" (default), "kl-clip" (the same without s: the KL clipping of K-FAC,
            TRPO and ACKTR; plain with ``calibration=None``), "heat", "fixed" (η_T = eta_max), or an
            object with the methods of `Regulator`.
        eta_max: η_max, or a function of the step.
        damping: λ, absolute, for the Fisher of one prediction's log-likelihood, or a function of
            the step. None: for K-FAC kinds max(1e-4, 10·p·(tr F/d)/N) for d parameters and N
            predictions per step (`optim.kronecker.refresh` says why), with p = (I − 1)/0.2 within
            0.3 and 30 where the inflation I is known; for metrics of a minibatch 1e-3; 0 where the
            metric's inverse is a pseudo-inverse.
        likelihood: "categorical" (logits), "bernoulli" (logits), "gaussian" (means), "poisson"
            (log-rates), or a `Likelihood`.
        sigma2: variance of the "gaussian" likelihood.
        calibration: `Calibration`, or None for none (κ = 1). "auto": `Calibration()` for K-FAC
            kinds and "diagonal", otherwise none.
        grad_scaler: the ``torch.amp.GradScaler`` in use; needed only when
            ``scaler.unscale_(opt)`` is called before the step.
        process_group: the processes that train this model together: "auto" (those of its
            DistributedDataParallel or ``fully_shard``, otherwise this process alone), a
            ``torch.distributed`` group, or None for this process alone.
        **old: keywords of earlier versions, which moved into the metric's object or
            `Calibration`; accepted for one release.

    Raises:
        InputError: for options, models and parameters that it can't train.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        budget: Schedule | None = None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        momentum: float = 0.8,
        weight_decay: float | None = None,
        metric: str | MetricOptions = "kfac",
        regulator: str | Regulator = "dissipation",
        eta_max: Schedule = 1.0,
        damping: Schedule | None = None,
        likelihood: str | Likelihood = "categorical",
        sigma2: float | None = None,
        calibration: Calibration | str | None = "auto",
        grad_scaler: Any = None,
        process_group: Any = "auto",
        **old: Any,
    ) -> None:
        validate.is_model(model)
        validate.number("budget", USUAL_BUDGET if budget is None else budget, above=True)
        validate.number("eta_max", eta_max, above=True)
        validate.number("damping", 0.0 if damping is None else damping)
        validate.number("lr", lr)
        validate.number("weight_decay", 0.0 if weight_decay is None else weight_decay)
        validate.fraction("momentum", momentum)
        options, calibrated = translated(metric, calibration, old, stacklevel=2)
        if options.inverse != "damped":
            damping = 0.0 if damping is None else damping
        elif damping == 0:
            raise InputError(
                "damping=0 needs a metric with inverse='pseudo' or 'pseudo+null': without damping "
                "the inverse exists only off the null space"
            )
        self.compiled = Compiled(model)
        self.model = validate.unwrap(model)
        validate.model(self.model)
        groups = validate.groups(self.model, params)
        self.likelihood = named_likelihood(likelihood, sigma2)
        self._usual_decay: float | None = None
        if weight_decay is None:
            held = [p for group in groups for p in group["params"]]
            weight_decay = default_weight_decay(held, self.likelihood) if options.per_layer else 0.0
            self._usual_decay = weight_decay
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "share": None}
        super().__init__(groups, defaults)
        self.options = options
        self.regulator = named(regulator, self._usual if budget is None else budget, eta_max)
        self.damping = damping
        self.processes = Processes(model, process_group)
        self.metric = options.attach(self._setup())
        if calibrated == "auto":
            calibrated = Calibration() if options.approximate else None
        self.calibration: Calibration | None = copy.copy(calibrated)
        self.grad_scaler = grad_scaler
        measures = self.calibration is not None and options.per_layer and not self.metric.eta_null
        self.inflation = Inflation() if measures else None
        follows = bool(getattr(self.regulator, "follows_signal", False))
        self.signal = Signal() if follows else None
        self.classes = ClassAxis(self.likelihood)
        self.notices = Notices(self.likelihood)
        self._watch = GradientWatch(min(self._params, key=lambda p: p.numel()))
        self.meter = KLMeter(self.likelihood, self.processes)
        self.steps = 0
        self.skipped = 0
        self.last_step: dict[str, float | None] = {}
        self._mark()
        classes = isinstance(self.likelihood, Categorical)
        self._recorder = PassRecorder(self.model, self._params, self.metric.discard, classes)
        self._closed = False
        self._arm()

    def _setup(self) -> Setup:
        """What the metric is to cover, from the parameter groups as they are now."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._trained = [p.requires_grad for p in self._params]
        self._fingerprint = validate.ModelFingerprint(self.model, self._params)
        pools, self._shares = validate.pools(self.param_groups)
        validate.common_momentum(self.param_groups)
        if is_sharded(self.model) and not self.options.per_layer:
            raise InputError(
                "a metric of a minibatch needs whole parameters, and the model's are sharded over "
                "processes: use metric='kfac' or 'ekfac'"
            )
        if not self.options.per_layer and self._shares != [1.0]:
            raise InputError(
                "a group's 'share' of the budget needs a block-diagonal metric: use metric='kfac' "
                "or 'ekfac'"
            )
        numbers = [k for k, group in enumerate(self.param_groups) for _ in group["params"]]
        return Setup(
            self.model,
            self._params,
            numbers,
            pools,
            self.likelihood,
            self.processes,
            bool(self.compiled),
        )

    def _rebuild(self) -> None:
        """Cover the parameters that there are now: frozen, unfrozen, or added."""
        self.metric.rebuild(self._setup())
        self._recorder.params = self._params

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in ``p.grad``.

        Without any gradient nothing happens. A non-finite loss or gradient skips the step: it is
        counted, warned of once, and leaves factors and momentum untouched.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            InputError: when the model was changed since construction, or when backward did not come
                through predictions that it returned. No weight has moved then.
        """
        try:
            return self._step(closure)
        except BaseException:
            self._recover()
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = self._evaluated(closure)
        self.processes.meet(self._recorder.parallel)
        seen, nothing = self._agreed(loss)
        if nothing:
            self._recorder.clear()
            return loss
        if seen is None:
            return self._skip(loss)
        gradients = [None if p.grad is None else whole(p.grad) for p in self._params]
        if all(g is None for g in gradients):  # of this process alone: it follows the others
            gradients = [zeros_like(p) for p in self._params]
        self._recorder.disarm()  # the metric runs the model too
        self._look_back(seen)
        self.metric.update(gradients, seen, self._damping())
        lengths = self.metric.direction(gradients, self._rule())
        if not lengths.finite:
            return self._skip(loss)
        taken = self._sized(lengths, seen.left)
        wanted = self._measured(taken)
        measurement = self._measurement(taken, seen) if wanted else None
        before = self._weights() if wanted else []
        self.metric.apply(taken.sizes, taken.null_size)
        realised, shortened = self._calibrate(taken, measurement, before) if wanted else (None, 1.0)
        sizes = [shortened * size for size in taken.sizes]
        if self.signal is not None:
            self.signal.took(sizes, taken.predicted * shortened**2)
        if self.inflation is not None:
            self.inflation.took(sizes, realised)
        self._report(taken, lengths, realised, shortened)
        self.steps += 1
        self._arm()
        return loss

    def _evaluated(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _agreed(self, loss: Any) -> tuple[StepInputs | None, bool]:
        """(what the step's passes showed, None for a step that has to be skipped; whether there
        are no gradients at all): the same verdict on all processes, so that none waits for another.
        """
        seen: StepInputs | None = None
        refusal: InputError | None = None
        idle = all(p.grad is None for p in self._params)
        try:
            seen = StepInputs(None, 0.0, 1.0, 0.0) if idle else self._checked(loss)
        except InputError as error:
            refusal = error
        skip = seen is None and refusal is None
        left = 0.0 if seen is None else seen.left
        idlers, refusals, skips, left = self.processes.total(
            [idle, refusal is not None, skip, left]
        )
        if refusals and refusal is None:
            refusal = InputError("another process refused this step; its own message says why")
        if refusal is not None:
            raise refusal
        if seen is not None:
            seen = replace(seen, left=left / self.processes.count)
        return (None if skips else seen), idlers == self.processes.count

    def _checked(self, loss: Any) -> StepInputs | None:
        """What the step's passes showed; None for a step that has to be skipped."""
        if self._closed:
            raise InputError("this NGDT was closed: make a new one to go on training")
        self._fingerprint.check()
        if self._trained != [p.requires_grad for p in self._params]:
            self._rebuild()
        passes = self._recorder.used()
        validate.gradients([p.grad for p in self._params])
        scale = self._loss_scale()
        overflow = getattr(self, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return None
        if isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            return None
        for seen in passes:
            self.classes.arrange(seen)
        self.notices.look(passes, scale)
        ratio = self._watch.ratio(scale)
        if ratio is not None:
            self.notices.compare(ratio)
        terms = effective_terms(passes) if self.metric.hooked else 0.0
        if self.metric.hooked and self.metric.reads_gradients and not self._recorder.called:
            validate.predictions_seen(passes, terms)
        largest = max(reversed(passes), key=lambda one: one.examples, default=None)
        left = loss_left(self.likelihood, passes, scale * (self.notices.scale or 1.0))
        return StepInputs(largest, terms, scale, left, of_one_loss(passes))

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
        if getattr(self, "found_inf", None) is not None and self.metric.reads_gradients:
            raise InputError(
                "scaler.unscale_(optimizer) hides the loss scale from NGDT: construct it with "
                "grad_scaler=scaler"
            )
        return 1.0

    def _damping(self) -> float | None:
        if self.damping is None:
            return None
        return value_at(self.damping, self.steps, "damping", zero=True)

    def _usual(self, step: int) -> float:
        """The budget where none is asked for."""
        return USUAL_BUDGET * (1.0 if self.inflation is None else self.inflation.budget)

    def _look_back(self, seen: StepInputs) -> None:
        """Where the last step was measured on its own minibatch, measure it on this one, too."""
        calibration, inflation = self.calibration, self.inflation
        if calibration is None or inflation is None or not inflation.own:
            return
        if len(inflation.sizes) != len(self._shares):  # groups were added since
            return
        some = calibration.sample(self.steps)
        measurement = self.meter.begin_all(seen.measured, some, self.steps, inflation.own)
        now = self._weights()
        try:
            self.metric.retrace(inflation.sizes, self._rule())
            found = self._realised(measurement)
        finally:
            self._restore(now)
        if found is not None and min(found[0], inflation.own) > ABOVE_FLOOR * found[1]:
            inflation.observe(self.steps, found[0])
        self.metric.prior = inflation.prior

    def _rule(self) -> UpdateRule:
        largest = self._rate
        decay, weights = [], []
        for group in self.param_groups:
            count, rate = len(group["params"]), float(group["lr"])
            decay += [float(group["weight_decay"])] * count
            weights += [rate / largest if largest > 0 else 0.0] * count
        for i in self.metric.unruled if self._usual_decay else ():
            decay[i] = 0.0 if decay[i] == self._usual_decay else decay[i]
        return UpdateRule(validate.common_momentum(self.param_groups), decay, weights)

    @property
    def _rate(self) -> float:
        """The largest learning rate of the groups."""
        return max(float(group["lr"]) for group in self.param_groups)

    def _sized(self, lengths: StepLengths, seen_left: float) -> _Taken:
        """From the lengths of v to the size of the step."""
        calibration, signal = self.calibration, self.signal
        kappa = 1.0
        if calibration is not None:
            kappa = calibration.scale(max(sum(lengths.delta), sum(lengths.a)))
        scale = 1.0
        left = None
        if signal is not None:
            signal.observe(self.steps, lengths.along, seen_left)
            scale, left = signal.scale, signal.left
        etas, costs = [], []
        for share, a in zip(self._shares, lengths.a, strict=True):
            size = self.regulator.step_size(a / kappa / share, self.steps) if share > 0 else 0.0
            if a > 0 and left is not None:
                size = min(size, math.sqrt(2 * left * share * kappa / a))
            etas.append(scale * size)
            costs.append(0.5 * size * size * a / kappa)
        rate = self._rate
        sizes = [rate * eta / kappa for eta in etas]
        pairs = zip(sizes, lengths.a, strict=True)
        predicted = sum(0.5 * kappa * size * size * a for size, a in pairs)
        budget = self.regulator.budget_at(self.steps)
        limit = None if budget is None else budget * (rate * scale) ** 2
        bound = None if budget is None else sum(costs) < BOUND * budget
        null_size = rate * self.metric.eta_null
        return _Taken(kappa, etas[0], sizes, null_size, predicted, budget, left, limit, bound)

    def _measured(self, taken: _Taken) -> bool:
        """Whether the step is to be measured: the same on all processes."""
        calibration = self.calibration
        if calibration is None:
            return False
        wanted = calibration.wanted(self.steps)
        return taken.predicted > 0 and (wanted or self._shocked(taken))

    def _shocked(self, taken: _Taken) -> bool:
        """Whether the last step raised this minibatch's loss by far more than the metric knows of,
        so that it may not know what this one costs, either; of no interest to a step that idles."""
        ratio = None if self.signal is None else self.signal.ratio
        idle = taken.predicted < IDLE * (taken.budget or 0.0)
        return not idle and ratio is not None and ratio < -SHOCK

    def _measurement(self, taken: _Taken, seen: StepInputs) -> Measurements | None:
        """What measures, on this process, the step that is about to be taken."""
        calibration = self.calibration
        if calibration is None:
            return None
        expected = max(taken.predicted, 0.01 * (taken.limit or 0.0))
        some = calibration.sample(self.steps, self._shocked(taken))
        return self.meter.begin_all(seen.measured, some, self.steps, expected)

    def _calibrate(
        self, taken: _Taken, measurement: Measurements | None, before: list[Tensor]
    ) -> tuple[float | None, float]:
        """(the KL that the step really caused, None where it is not measured; the factor by which
        it was then shortened). ``before``: the weights before it."""
        found = self._realised(measurement)
        if found is None:
            return None, 1.0
        realised, floor = found
        if math.isfinite(realised) and self.calibration is not None:
            self.calibration.observe(
                self.steps,
                taken.predicted,
                realised,
                floor,
                certain=self.meter.certain and taken.left is None,
                limit=taken.limit or 0.0,
                held=taken.left is not None and taken.left < (taken.limit or 0.0),
            )
        kept, limit = 1.0, taken.limit
        for _ in range(MOST_CUTS):
            if limit is None or realised <= max(EXCESS * limit, ABOVE_FLOOR * floor):
                break
            if not math.isfinite(realised):
                self._restore(before)
                return None, 0.0
            part = max(math.sqrt(limit / realised), 0.1)
            kept *= part
            self._restore(before)
            self.metric.apply([kept * size for size in taken.sizes], kept * taken.null_size)
            again = None
            if realised > QUADRATIC * limit:
                # The few examples that carry it may not be the sample's.
                measurement = None if measurement is None else measurement.of_all()
                again = self._realised(measurement)
            realised = realised * part**2 if again is None else again[0]
            if again is None:
                break
        return (realised if math.isfinite(realised) else None), kept

    def _realised(self, measurement: Measurements | None) -> tuple[float, float] | None:
        """The KL that the step has caused so far, and what rounding would feign of it, over all
        processes; None where none measures."""
        own, rounding = (0.0, 0.0) if measurement is None else measurement.finish()
        whole, lost, measured = self.processes.total(
            [own, rounding, float(measurement is not None)]
        )
        return (whole / measured, lost / measured) if measured else None

    def _weights(self) -> list[Tensor]:
        """A copy of this process's weights. A step that was far too long can't be taken back by
        adding it: what it leaves is its rounding."""
        return [own_part(p).clone() for p in self._params]

    def _restore(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_([own_part(p) for p in self._params], weights)

    def _report(
        self, taken: _Taken, lengths: StepLengths, realised: float | None, shortened: float
    ) -> None:
        total, delta = sum(lengths.a), sum(lengths.delta)
        slope = sum(lengths.decrease)
        decrease = sum(s * d for s, d in zip(taken.sizes, lengths.decrease, strict=True))
        self.last_step = {
            "budget": taken.budget,
            "delta": delta / taken.kappa,
            "eta": taken.eta,
            "bound_by_eta_max": None if taken.bound is None else float(taken.bound),
            "loss_left": taken.left,
            "signal": None if self.signal is None else self.signal.scale,
            "signal_ratio": None if self.signal is None else self.signal.ratio,
            "predicted": taken.predicted * shortened**2,
            "realised": realised,
            "shortened": shortened,
            "decrease": decrease * shortened,
            "alignment": slope * abs(slope) / (total * delta) if total > 0 and delta > 0 else None,
            "kappa": taken.kappa,
            "inflation": None if self.inflation is None else self.inflation.ratio,
            "loss_scale": self.notices.scale,
            "skipped": float(self.skipped),
            **self.metric.diagnostics(),
        }

    def _skip(self, loss: Any) -> Any:
        self.skipped += 1
        self.metric.discard()
        if self.inflation is not None:
            self.inflation.took([], None)
        if self.skipped == 1:
            warnings.warn(
                "a non-finite loss or gradient: the step was skipped (later ones only count in "
                "last_step['skipped']); if there are many, lower the budget or check the data",
                stacklevel=3,
            )
        known = (*REPORTED, *self.metric.diagnostics(), *self.last_step)
        self.last_step = {**dict.fromkeys(known), "skipped": float(self.skipped), "predicted": 0.0}
        self._arm()
        return loss

    def _recover(self) -> None:
        """Forget the passes of a step that raised, so that the next one is not theirs too."""
        self.metric.discard()
        self._recorder.clear()
        if not self._closed:
            self._arm()

    def _arm(self) -> None:
        """Prepare for the passes of the coming step."""
        self._recorder.clear()
        calibration = self.calibration
        self.metric.arm(self.steps, calibration is not None and calibration.breached)
        measuring = calibration is not None and calibration.due(self.steps)
        wanted = measuring or self.metric.hooked
        if wanted or not self.compiled:
            self._recorder.arm()
        else:
            self._recorder.disarm()
        if self.steps < WATCHED and self.processes.count == 1:
            self._watch.arm()
        else:
            self._watch.disarm()
        self.compiled.eager(wanted)

    # ---- torch's habits

    def _mark(self) -> None:
        """An entry in torch's ``state``: tools that find it empty take a step to fill it."""
        self.state[self._params[0]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and with them the passes that made them."""
        super().zero_grad(set_to_none)
        self._recorder.forget_used()
        self.metric.discard()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters; the new ones move from the second step on, when
        their curvature has been seen."""
        if "metric" not in vars(self):  # torch's constructor adds the first groups
            super().add_param_group(param_group)
            return
        (group,) = validate.groups(self.model, [param_group], trained=False)
        super().add_param_group(group)
        self._rebuild()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "an NGDT can't be copied or pickled, because its hooks belong to one model: make a new "
            "one for the other model and load this one's state_dict() into it"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's dictionary with one more entry, "ngdt": step count, calibration, running factors
        and momentum.

        Resuming from it continues bit for bit on the same machine (schedules given as functions are
        the caller's to give again).
        """
        return state.whole(super().state_dict(), self._own_state(), len(self._params))

    def _own_state(self) -> dict[str, Any]:
        return {
            "version": state.VERSION,
            "metric": self.metric.kind,
            "steps": self.steps,
            "skipped": self.skipped,
            "calibration": None if self.calibration is None else self.calibration.state_dict(),
            "signal": None if self.signal is None else self.signal.state_dict(),
            "inflation": None if self.inflation is None else self.inflation.state_dict(),
            "curvature": self.metric.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in this version or an earlier one.

        Raises:
            InputError: when the state is not NGDT's, or of another metric or model, or damaged; the
                optimizer is then as it was.
        """
        metric, calibration = dict(vars(self.metric)), copy.copy(self.calibration)
        signal, inflation = copy.copy(self.signal), copy.copy(self.inflation)
        before = self.steps, self.skipped
        try:
            own = state.current(state_dict, self.metric.kind)
            self.metric.load_state_dict(own["curvature"])
            if self.calibration is not None and own["calibration"] is not None:
                self.calibration.load_state_dict(own["calibration"])
            if self.signal is not None and own.get("signal") is not None:
                self.signal.load_state_dict(own["signal"])
            if self.inflation is not None and own.get("inflation") is not None:
                self.inflation.load_state_dict(own["inflation"])
                self.metric.prior = self.inflation.prior
            self.steps, self.skipped = int(own["steps"]), int(own["skipped"])
            both = {k: v for k, v in self._own_state().items() if v is not None}
            for part in ("calibration", "signal", "inflation"):  # settings: one may be without
                if own.get(part) is None or part not in both:
                    own.pop(part, None)
                    both.pop(part, None)
            every = own["version"] == state.VERSION
            state.read_as_written(own | {"version": state.VERSION}, both, every)
            super().load_state_dict(state.groups(state_dict, super().state_dict()))
            self._mark()
        except Exception as error:
            vars(self.metric).clear()
            vars(self.metric).update(metric)
            self.calibration, self.signal, self.inflation = calibration, signal, inflation
            self.steps, self.skipped = before
            if isinstance(error, InputError):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"the saved optimizer state is damaged ({type(error).__name__}: {first})"
            ) from None
        self._arm()

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can't step afterwards."""
        self._closed = True
        self.metric.close()
        self._recorder.clear()
        self._recorder.disarm()
        self._watch.disarm()
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


@dataclass(frozen=True)
class _Taken:
    """A step as it was taken: κ, η_T of the first pool, the size per pool, the size in the null
    space, its predicted dissipation, its budget, what the loss could still fall by and the limit
    (lr·s)²·budget (nats), and whether η_max or the loss left bounds it (None where there is no
    budget)."""

    kappa: float
    eta: float
    sizes: list[float]
    null_size: float
    predicted: float
    budget: float | None
    left: float | None
    limit: float | None
    bound: bool | None
