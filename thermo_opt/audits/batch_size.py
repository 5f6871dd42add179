"""The critical batch size along a run, and a batch schedule that follows it (§11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thermo_opt import arguments
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses.noise import Split, critical_table
from thermo_opt.noise import Estimate


@dataclass(frozen=True)
class BatchSchedule:
    """Batch sizes in proportion to the critical one, at the run's own steps and examples.

    Attributes:
        batch_sizes: (T,) one per optimizer step, whole numbers.
        noise: What the run dissipated as noise (nats).
        predicted_noise: What it would with these batch sizes, noise of a step going as 1/B.
    """

    batch_sizes: np.ndarray
    noise: Estimate
    predicted_noise: Estimate


@dataclass(frozen=True)
class CriticalBatch:
    """B* = B·Q_noise/Q_drift over stretches of a run of an optimizer without momentum (§11).

    Attributes:
        step: (K,) first step of each stretch; ``step_end`` (K,) the step after its last.
        step_end: see ``step``.
        value: (K,) B*, loss terms; NaN where drift can't be told from zero.
        error: (K,) its standard error.
        lower: (K,) B* at least, two standard errors off, also where ``value`` is NaN.
        noise: (K,) Q_noise per step, nats; ``noise_error`` (K,) its standard error.
        noise_error: see ``noise``.
        batch_size: B of the run.
    """

    step: np.ndarray
    step_end: np.ndarray
    value: np.ndarray
    error: np.ndarray
    lower: np.ndarray
    noise: np.ndarray
    noise_error: np.ndarray
    batch_size: int

    @property
    def overall(self) -> Estimate:
        """B* of the steps needed: the mean over the run, a step counted as the t/(t + n) of a step
        without noise that it was worth (after McCandlish et al. 2018, appendix D). Stretches where
        it isn't told count with its lower end, which makes it a lower bound."""
        star = np.where(np.isfinite(self.value), self.value, np.nan_to_num(self.lower))
        worth = (self.step_end - self.step) / (1 + star / self.batch_size)
        mean = float(worth @ star / worth.sum())
        known = np.nan_to_num(self.error)
        relative = np.sqrt((worth**2 * known**2).sum()) / worth.sum()
        return Estimate(mean, float(relative))

    def steps_saved(self, batch_size: int) -> float:
        """Share of the optimizer steps that this batch size would save to the same loss, each at
        its own best learning rate: ``S ∝ 1 + B*/B``. Negative for a smaller one."""
        star = self.overall.value
        return 1 - (1 + star / batch_size) / (1 + star / self.batch_size)

    def examples_saved(self, batch_size: int) -> float:
        """Share of the examples saved: ``E ∝ 1 + B/B*``."""
        star = self.overall.value
        return 1 - (batch_size + star) / (self.batch_size + star)

    def schedule(self, least: int = 1, most: int | None = None) -> BatchSchedule:
        """Batch sizes that follow B* along the run, with the run's own number of examples in all.

        Between the middles of stretches B* is interpolated on a logarithmic scale; where it isn't
        told, its lower end is taken, or what it was before if that is more. At one fixed learning
        rate such sizes need not lower the loss (they did not on two tasks, see
        ``analysis/README.md``): B* compares sizes each at its own best rate.

        Args:
            least: the smallest batch size.
            most: the largest.

        Raises:
            InputError: when bounds leave no room for the run's examples.
        """
        least = arguments.whole("least", least)
        top = np.inf if most is None else float(arguments.whole("most", most))
        if not least <= self.batch_size <= top:
            raise InputError(
                f"batch sizes from {least} to {most} leave no room for the run's examples, "
                f"{self.batch_size} a step on average"
            )
        known = np.nan_to_num(np.where(np.isfinite(self.value), self.value, self.lower))
        star = np.where(np.isfinite(self.value), known, np.maximum.accumulate(known))
        middle = 0.5 * (self.step + self.step_end - 1)
        every = np.arange(int(self.step[0]), int(self.step_end[-1]))
        star = np.exp(np.interp(every, middle, np.log(np.maximum(star, 1e-9))))
        sizes = _filled(star, float(self.batch_size), float(least), top)
        share = self.batch_size / sizes
        spans = [(every >= a) & (every < b) for a, b in zip(self.step, self.step_end, strict=True)]
        before = np.array([s.sum() for s in spans], dtype=float)
        after = np.array([share[s].sum() for s in spans])
        error = np.nan_to_num(self.noise_error)
        return BatchSchedule(
            sizes.astype(np.int64),
            *(
                Estimate(float(w @ self.noise), float(np.sqrt((w**2 * error**2).sum())))
                for w in (before, after)
            ),
        )


def critical_batch(audits: Audit | Sequence[Audit]) -> CriticalBatch:
    """The critical batch size along an audited run, or along several of the same settings (§11).

    Args:
        audits: Of a run without momentum, recorded with ``replica=…`` and ``batch_size=…``, through
            the outputs lens; several, as of several seeds, are averaged.

    Returns:
        B* over stretches, as many as the record can tell apart from noise.

    Raises:
        InputError: When a run has no replicas or no batch size, when it has momentum, when
            runs differ in batch size, length or replicas, or when drift can't be told from zero.
    """
    runs = [audits] if isinstance(audits, Audit) else list(audits)
    if not runs:
        raise InputError("there is no audit to read a critical batch size from: give at least one")
    splits = [_split(run) for run in runs]
    batch = int(runs[0].settings["batch_size"])
    curve = splits[0].curve.copy()
    for run, split in zip(runs, splits, strict=True):
        same = split.curve[["step", "step_end"]].equals(curve[["step", "step_end"]])
        if run.settings["batch_size"] != batch or not same:
            raise InputError(
                f"{run.run} and {runs[0].run} differ in batch size, length or replicas: give runs "
                "of the same settings"
            )
    for key in ("noise", "drift"):
        curve[key] = np.mean([split.curve[key] for split in splits], axis=0)
        errors = [np.nan_to_num(split.curve[f"{key}_error"]) for split in splits]
        curve[f"{key}_error"] = np.sqrt(np.sum(np.square(errors), axis=0)) / len(splits)
    table = critical_table(curve, float(batch))
    if not table["critical_batch"].notna().any():
        raise InputError(
            f"{runs[0].run}: its drift can't be told from zero: record more replicas, more "
            "seeds, or a longer run"
        )
    columns = {key: table[key].to_numpy(float) for key in table}
    return CriticalBatch(
        step=columns["step"],
        step_end=columns["step_end"],
        value=columns["critical_batch"],
        error=columns["critical_batch_error"],
        lower=columns["critical_batch_lower"],
        noise=columns["noise"],
        noise_error=columns["noise_error"],
        batch_size=batch,
    )


def _split(audit: Audit) -> Split:
    lens = audit.lenses.get("outputs")
    split = None if lens is None else lens.split
    if split is None or not split.replicas or split.curve["noise_error"].isna().any():
        raise InputError(
            f"{audit.run}: a critical batch size needs three replica steps at least: record with "
            "replica=…"
        )
    if split.memory > 1:
        raise InputError(
            f"{audit.run}: with momentum the drift of a step holds earlier minibatches, and no "
            "critical batch size can be read from it: record a run without momentum"
        )
    if not split.scatters:
        raise InputError(
            f"{audit.run}: its replicas made the same steps: full batches have no noise to read a "
            "critical batch size from"
        )
    if not audit.settings.get("batch_size"):
        raise InputError(f"{audit.run}: its batch size is unknown: record with batch_size=…")
    return split


def _filled(weights: np.ndarray, mean: float, least: float, most: float) -> np.ndarray:
    """Whole numbers in proportion to weights within bounds, whose sum is that of ``mean`` each."""
    low, high = 0.0, most / weights.min() if np.isfinite(most) else mean * len(weights)
    high = max(high, mean * len(weights) / weights.min())
    for _ in range(200):
        factor = 0.5 * (low + high)
        if np.clip(factor * weights, least, most).mean() < mean:
            low = factor
        else:
            high = factor
    sizes = np.clip(high * weights, least, most)
    # rounded so that the running sum never strays by more than one example
    return np.maximum(np.diff(np.round(np.concatenate([[0.0], np.cumsum(sizes)]))), least)
