"""What a recorded run is in memory: its settings, its training curve, its snapshots and its
probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import pandas as pd
from torch import Tensor

from thermo_opt import arguments
from thermo_opt.errors import InputError, printable
from thermo_opt.likelihoods import FAMILIES
from thermo_opt.runs.probe import Probe, load_probe, make_probe

Likelihood: TypeAlias = Literal[
    "categorical", "bernoulli", "gaussian", "poisson", "heteroscedastic"
]

LIKELIHOODS = FAMILIES
CLOCKS = ("step", "flow", "wall", "examples", "tokens")

_CONSTANT_GROUPS = ("params", "probe")
"""Groups that must hold the same tensors in every snapshot."""


class Contents(Protocol):
    """Where a snapshot's tensors come from: one file or several, by the names this package uses."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name."""

    def load(self, name: str) -> Tensor:
        """The tensor of this name; InputError or KeyError when it isn't one of `shapes`."""

    def moments_meta(self) -> dict[str, Any] | None:
        """``{"step": int, "betas": (b1, b2)}`` of Adam's moments, or None."""

    def absent(self, group: str) -> str | None:
        """Why a group that the files seem to hold can't be given, if so."""


@runtime_checkable
class Streamed(Protocol):
    """Contents that verify a tensor while it is read, piece by piece, instead of in a pass of its
    own."""

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Elements in order, ``size`` at a time; raises `InputError` after the last if they are
        damaged."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state after ``step`` optimizer steps (0: before the first), read only when asked for.

    Names are ``group/name``; groups: ``params`` (weights), ``buffers`` (BatchNorm statistics and
    other non-trained tensors), ``probe`` (``probe/logits``, ``probe/targets``), ``grad`` (the
    gradient used by the step that led here), ``exp_avg`` and ``exp_avg_sq`` (Adam's raw moments,
    without bias correction). ``load`` and ``load_group`` raise `InputError` when the file is
    damaged, or when a tensor's shape, or the set of weights, isn't that of the run's first
    snapshot.

    Attributes:
        step: optimizer steps done.
        path: the file or folder.
        contents: where the tensors come from, see `Contents`.
        first: the run's first snapshot, whose layout the others must have; None for itself.
    """

    step: int
    path: Path
    contents: Contents = field(repr=False, compare=False)
    first: Snapshot | None = field(default=None, repr=False, compare=False)

    @cached_property
    def layout(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name, read once and kept: of a run's first snapshot, which all others are held
        against."""
        return dict(self.contents.shapes)

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self.contents.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        return self._require(name)[name]

    def has_group(self, group: str) -> bool:
        """Whether there is any tensor in this group."""
        return any(name.startswith(group + "/") for name in self.names())

    def load(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU, in the dtype in which it was recorded."""
        try:
            tensor = self.contents.load(name)
        except (InputError, KeyError):
            self._require(
                name
            )  # knows why a tensor is absent; asked first, it would double a small file's cost
            raise
        self._check_shape(name, tuple(tensor.shape))
        return tensor

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """`load` for a tensor to be read once, in order: flat pieces of ``size`` (a multiple of
        8192) elements.

        Damage is noticed when the last piece has been taken: exhaust it before trusting what was
        computed.
        """
        self._check_shape(name, self.shape(name))
        if isinstance(self.contents, Streamed):
            return self.contents.pieces(name, size)
        return iter(self.contents.load(name).reshape(-1).split(size))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        reference = self.first.layout.get(name) if self.first else None
        if reference is not None and reference != shape:
            assert self.first is not None
            raise InputError(
                f"{self.path}: {name} has shape {shape} at step {self.step} but {reference} at "
                f"step {self.first.step}; "
                "a run must keep one layout: audit the two parts as separate runs"
            )

    def load_group(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, keyed by name without the group; raises `InputError` when there
        are none."""
        names = self._group(group)
        if not names:
            raise InputError(f"{self.path} holds no {group}: {self.absent(group)}")
        if self.first is not None and group in _CONSTANT_GROUPS:
            changed = sorted(set(names) ^ set(self.first._group(group)))
            if changed:
                where = "appears" if changed[0] in self.contents.shapes else "is gone"
                raise InputError(
                    f"{self.path}: {changed[0]} {where} at step {self.step}, unlike at step "
                    f"{self.first.step}; a run "
                    "must keep "
                    "one layout: audit the two parts as separate runs"
                )
        return {name[len(group) + 1 :]: self.load(name) for name in names}

    def absent(self, group: str) -> str:
        """Why a group is not there."""
        return self.contents.absent(group) or "it was not recorded"

    def moments_meta(self) -> dict[str, Any]:
        """``{"step": int, "betas": (β1, β2)}`` of Adam's moments, for bias correction; raises
        `InputError` when there are none.
        """
        meta = self.contents.moments_meta()
        if meta is None:
            raise InputError(f"{self.path} holds no optimizer moments: {self.absent('exp_avg')}")
        return meta

    @property
    def optimizer_step(self) -> int:
        """The optimizer's own step count t in Adam's bias correction 1 − β^t (differs from ``step``
        if it was restarted).
        """
        return int(self.moments_meta()["step"])

    def _group(self, group: str) -> list[str]:
        return [name for name in self.names() if name.startswith(group + "/")]

    def _require(self, name: str) -> Mapping[str, tuple[int, ...]]:
        """All shapes, ``name``'s among them."""
        shapes = self.contents.shapes
        if name not in shapes:
            raise InputError(f"{self.path} has no {name}: {self.absent(name.split('/')[0])}")
        return shapes


@dataclass(frozen=True)
class RunInfo:
    """What a run's files say of how it was trained; None where they don't.

    ``settings``: the optimizer's, common to all its groups, and ``groups`` where they differ.
    ``parameters``: one ``{name, shape, dtype, trainable}`` each. ``tied``: other names of shared
    parameters → the name under which they are stored. ``model``: ``package.module:factory`` that
    builds the architecture. ``adapter_path``: the settings of a PEFT adapter, where the weights are
    an adapter's alone. ``step_unit``: what one step counts (``step`` or ``epoch``), and
    ``step_source``: where its number was read. ``notes``: free metadata. ``kind``: what the
    recorded outputs of classes are, one of `thermo_opt.likelihoods.KINDS`. ``sketch``: ``width``
    and ``seed`` of recorded sketches (§13).
    """

    optimizer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    clock: str | None = None
    likelihood: Likelihood | None = None
    sigma2: float | None = None
    batch_size: int | None = None
    parameters: list[dict[str, Any]] | None = None
    tied: dict[str, str] = field(default_factory=dict)
    probe_fingerprint: str | None = None
    model: str | None = None
    hf_config_path: Path | None = None
    adapter_path: Path | None = None
    schema_version: int | None = None
    created: str | None = None
    step_unit: str = "step"
    step_source: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    sketch: dict[str, int] | None = None

    @property
    def betas(self) -> tuple[float, float] | None:
        """Adam's (β1, β2), where the settings hold two numbers in [0, 1)."""
        betas = self.settings.get("betas")
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            return None
        if not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
            return None
        return float(betas[0]), float(betas[1])


@dataclass
class Run:
    """One recorded run, whatever tool wrote it. ``steps`` and the list of snapshots are in memory,
    the tensors are not.

    ``steps``: index ``step`` (optimizer steps done), columns any of ``loss`` (nats), ``lr``,
    ``wall`` (seconds since the start), ``examples``, ``tokens`` (seen since the row before), and
    whatever else was logged.
    ``remarks``: sentences of the reader on what it took for granted or left out. ``key``: the state
    dict that was asked for.
    """

    name: str
    path: Path
    format: str
    info: RunInfo
    steps: pd.DataFrame
    snapshots: Sequence[Snapshot]
    probe_path: Path | None = None
    remarks: list[str] = field(default_factory=list)
    key: str | None = None

    def __post_init__(self) -> None:
        self.name = printable(self.name)  # it goes to terminals and pages

    @cached_property
    def probe(self) -> Probe | None:
        """The probe, read when first asked for; None when the run has none."""
        if self.probe_path is not None:
            probe = load_probe(self.probe_path)
            expected = self.info.probe_fingerprint
            if expected is not None and probe.fingerprint != expected:
                raise InputError(
                    f"{self.probe_path} isn't the probe that was recorded (its fingerprint differs "
                    "from run.json's); "
                    "restore the file"
                )
            return probe
        if self.snapshots and "probe/targets" in self.snapshots[0].names():
            return make_probe(None, self.snapshots[0].load("probe/targets"))
        return None

    def assuming(self, likelihood: Likelihood | None = None, sigma2: float | None = None) -> Run:
        """This run with another output distribution than its files say, where one is given.

        Args:
            likelihood: one of `LIKELIHOODS`.
            sigma2: variance σ² of a Gaussian likelihood.

        Raises:
            InputError: for an unknown likelihood, or a variance that isn't positive.
        """
        if likelihood is None and sigma2 is None:
            return self
        info = self.info
        if likelihood is not None:
            if likelihood not in LIKELIHOODS:
                raise InputError(
                    f"likelihood is {likelihood!r}; use one of {', '.join(LIKELIHOODS)}"
                )
            info = replace(info, likelihood=likelihood)
        if sigma2 is not None:
            info = replace(info, sigma2=arguments.positive("sigma2", sigma2))
        return replace(self, info=info)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the run's files itself: nothing but the path is sent."""
        info = self.info
        return _reopened, (self.path, self.format, self.key, info.likelihood, info.sigma2)

    def clock_readings(self, clock: str, steps: np.ndarray | Sequence[int]) -> np.ndarray:
        """Cumulative reading of a clock at these step numbers (§1).

        Differences of successive readings are the τ of the intervals between.

        Args:
            clock: ``step``: the numbers themselves; ``flow``: Σ lr; ``wall``: seconds;
                ``examples``, ``tokens``: data seen.
            steps: (K,) step numbers.

        Returns:
            (K,) float64.

        Raises:
            InputError: naming the data that are absent.
        """
        at = np.asarray(steps, dtype=np.int64)
        if clock not in CLOCKS:
            raise InputError(f"unknown clock {clock!r}; choose one of {', '.join(CLOCKS)}")
        if clock == "step" or at.size == 0:
            return at.astype(np.float64)
        if (
            clock == "examples"
            and "examples" not in self.steps
            and self.info.batch_size is not None
        ):
            return at.astype(np.float64) * self.info.batch_size
        column = {"flow": "lr"}.get(clock, clock)
        if column not in self.steps:
            raise InputError(
                f"{self.path}: clock {clock!r} needs {column!r} for each step, which this run "
                "didn't log; use clock "
                "'step'"
            )
        values = self.steps[column].astype(np.float64)
        values = values[values.index > 0]
        if clock == "flow":
            logged = values.index[
                np.isfinite(values.to_numpy()) & (values.index <= at.max())
            ].to_numpy()
            if len(logged) < at.max():
                gap = int(np.searchsorted(logged - np.arange(1, len(logged) + 1), 1)) + 1
                self._refuse_clock(clock, column, gap, int(at.max()) - len(logged), int(at.max()))
        elif clock == "wall":
            self._require_rows(clock, column, values, at[at > 0])
            return np.where(at > 0, values.reindex(at).to_numpy(), 0.0)
        else:
            self._require_rows(clock, column, values, at[at > 0])
            self._require_rows(
                clock, column, values, values.index[values.index <= at.max()].to_numpy()
            )
        total = np.concatenate([[0.0], np.cumsum(values.to_numpy())])
        return total[np.searchsorted(values.index.to_numpy(), at, side="right")]

    def _require_rows(self, clock: str, column: str, values: pd.Series, needed: np.ndarray) -> None:
        missing = needed[~np.isfinite(values.reindex(needed).to_numpy())]
        if missing.size:
            self._refuse_clock(clock, column, int(missing[0]), missing.size, needed.size)

    def _refuse_clock(self, clock: str, column: str, first: int, missing: int, needed: int) -> None:
        raise InputError(
            f"{self.path}: clock {clock!r} needs {column!r} at step {first}, which this run didn't "
            "log "
            f"({missing} of {needed} needed steps lack it); log every step, or use clock 'step'"
        )


def _reopened(
    path: Path, format: str, key: str | None, likelihood: Likelihood | None, sigma2: float | None
) -> Run:
    from thermo_opt.runs import load_run

    return load_run(path, format, key=key, likelihood=likelihood, sigma2=sigma2)
