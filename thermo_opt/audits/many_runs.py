"""Many runs in the space of predictions: how far apart, how far along, and in one picture
(theory §14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import numpy as np

from thermo_opt import arguments
from thermo_opt.errors import InputError
from thermo_opt.lenses.inputs import LensInputs
from thermo_opt.lenses.noise import memory
from thermo_opt.lenses.predictions import RecordedPredictions, array_of, targets_of
from thermo_opt.manifold.maps import trajectory_map
from thermo_opt.manifold.progress import progress
from thermo_opt.noise import Estimate
from thermo_opt.runs import Run, load_run
from thermo_opt.theory import uncertainty


@dataclass(frozen=True)
class Ensemble:
    """Predictions of R runs at K common steps on n examples with c classes.

    Attributes:
        runs: (R,) their names.
        optimizers: (R,) names of their optimizers, None where unknown.
        steps: (K,) the common steps.
        amplitudes: (R, K, n, c) unit amplitudes √p, float32.
        targets: (n,) class numbers, or None without targets.
        memoryless: whether every run was by an optimizer without momentum at a constant learning
            rate.
    """

    runs: tuple[str, ...]
    optimizers: tuple[str | None, ...]
    steps: np.ndarray
    amplitudes: np.ndarray
    targets: np.ndarray | None
    memoryless: bool

    def distances(self, step: int | None = None) -> np.ndarray:
        """(R, R) Fisher–Rao distances between the runs (√nats) at a common step, by default the
        last."""
        u = self.amplitudes[:, self._position(step)].astype(np.float64)
        total = np.zeros((len(u), len(u)))
        for i in range(u.shape[1]):
            total += 4 * np.arccos(np.clip(u[:, i] @ u[:, i].T, -1.0, 1.0)) ** 2
        np.fill_diagonal(total, 0.0)
        return np.sqrt(total / u.shape[1])

    @cached_property
    def _along(self) -> tuple[np.ndarray, np.ndarray]:
        if self.targets is None:
            raise InputError("progress towards the truth needs a probe with targets")
        runs, steps, n, c = self.amplitudes.shape
        equal = np.full((n, c), c**-0.5)
        truth = np.eye(c)[self.targets]
        found = progress(self.amplitudes.reshape(runs * steps, n, c), equal, truth)
        return found[0].reshape(runs, steps), found[1].reshape(runs, steps)

    @property
    def progress(self) -> np.ndarray:
        """(R, K) progress along the geodesic from equal probabilities to the truth, 0 to 1."""
        return self._along[0]

    @property
    def off_geodesic(self) -> np.ndarray:
        """(R, K) distance from that geodesic (√nats)."""
        return self._along[1]

    def map(self, dimensions: int = 2) -> tuple[list[np.ndarray], float]:
        """Intensive principal components of all runs together: one (K, dimensions) array a run, and
        the share of the spread that they show. Cost O((RK)² n c)."""
        return trajectory_map(list(self.amplitudes), dimensions)

    def entropy_bound(self) -> Estimate:
        """The entropy that the ensemble produced at least (nats), from the precision of its
        progress: `thermo_opt.theory.uncertainty.relaxing_bound`.

        Raises:
            InputError: for momentum or a learning rate that changes, for which the relation does
                not hold; for fewer than three runs.
        """
        if not self.memoryless:
            raise InputError(
                "the uncertainty relation holds for optimizers without momentum at a constant "
                "learning rate: not for all of these runs"
            )
        moved = self.progress - self.progress[:, :1]
        try:
            return uncertainty.relaxing_bound(moved[:, 1:], self.steps[1:] - self.steps[0])
        except ValueError as error:
            raise InputError(f"no bound on the entropy produced: {error}") from None

    def _position(self, step: int | None) -> int:
        if step is None:
            return len(self.steps) - 1
        found = np.flatnonzero(self.steps == step)
        if not len(found):
            raise InputError(
                f"step {step} is not common to all runs: use one of "
                f"{', '.join(map(str, self.steps[:8]))}, …"
            )
        return int(found[0])


def ensemble(
    runs: Sequence[Run | str | PathLike[str]], *, snapshots: int = 12, examples: int = 200
) -> Ensemble:
    """Several recorded runs of classifiers in one space: that of predictions on their common probe.

    Args:
        runs: recorded with predictions, on one probe.
        snapshots: common steps to use, at most; evenly spread.
        examples: of the probe to use, at most; its first.

    Returns:
        The ensemble. Cost: reading the snapshots used; memory R·K·n·c floats.

    Raises:
        InputError: for runs without recorded class predictions, on different probes, or with fewer
            than two common steps.
    """
    snapshots = arguments.whole("snapshots", snapshots, least=2)
    examples = arguments.whole("examples", examples)
    opened = [run if isinstance(run, Run) else load_run(run) for run in runs]
    if not opened:
        raise InputError("there are no runs: give at least one")
    prints = {None if run.probe is None else run.probe.fingerprint for run in opened}
    if len(prints) > 1:
        raise InputError("the runs were recorded on different probes: record or choose runs on one")
    common = sorted(set.intersection(*({s.step for s in run.snapshots} for run in opened)))
    if len(common) < 2:
        raise InputError("the runs have fewer than two snapshots at common steps")
    chosen = np.unique(np.linspace(0, len(common) - 1, min(snapshots, len(common))).round())
    steps = np.array(common)[chosen.astype(int)]
    amplitudes = np.stack([_amplitudes(run, steps, examples) for run in opened])
    targets = targets_of(opened[0].probe)
    if targets is not None and (targets.ndim != 1 or targets.dtype.kind not in "iu"):
        targets = None
    return Ensemble(
        tuple(run.name for run in opened),
        tuple(run.info.optimizer for run in opened),
        steps,
        amplitudes,
        None if targets is None else targets[: amplitudes.shape[2]].astype(int),
        all(_memoryless(run) for run in opened),
    )


def _amplitudes(run: Run, steps: np.ndarray, examples: int) -> np.ndarray:
    """(K, n, c) unit amplitudes of a run at these steps."""
    position = {snapshot.step: i for i, snapshot in enumerate(run.snapshots)}
    if "probe/logits" not in run.snapshots[0].names():
        raise InputError(f"{run.path}: it recorded no predictions on a probe: record them")
    inputs = LensInputs(run=run, indices=[0, len(run.snapshots) - 1])
    family, sigma2, _ = inputs.family(
        lambda: array_of(run.snapshots[-1].load("probe/logits")), targets_of(run.probe)
    )
    if family != "categorical":
        raise InputError(f"{run.path}: maps of many runs are of classes, not {family} outputs")
    source = RecordedPredictions(run, family, sigma2, run.info.kind)
    points = [source.point(position[int(step)]) for step in steps]
    for step, point in zip(steps, points, strict=True):
        if not point.finite:
            raise InputError(f"{run.path}: its predictions at step {step} are NaN or infinite")
    return np.stack([p.first(min(examples, len(p.w))).astype(np.float32) for p in points])


def _memoryless(run: Run) -> bool:
    rates = run.steps["lr"].dropna() if "lr" in run.steps else None
    constant = rates is not None and len(rates) > 0 and float(rates.max()) == float(rates.min())
    return run.info.optimizer == "SGD" and memory(run.info) <= 1 and constant
