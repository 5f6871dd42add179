"""What every lens is given: the run, which of its snapshots to use, the clock, and what the user
added."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt import likelihoods
from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.lenses.predictions import build_model
from thermo_opt.models import outputs_of
from thermo_opt.runs import Probe, Run, adapters
from thermo_opt.runs.probe import (
    CONDITIONAL,
    is_causal,
    shifted_labels,
    wants_shift,
    with_decoder_inputs,
)
from thermo_opt.runs.readers.huggingface import likelihood_of

Progress = Callable[[str, int], Callable[[int], None]]
"""``progress(description, total)`` starts a bar and returns ``advance(n)``."""


def _class_logits(_model: nn.Module, _arguments: Any, returned: Any) -> Tensor:
    return outputs_of(returned).log()


def _binary_logits(_model: nn.Module, _arguments: Any, returned: Any) -> Tensor:
    return outputs_of(returned).logit()


_LOGITS = {"categorical": _class_logits, "bernoulli": _binary_logits}
"""Forward hooks that turn a model's probabilities into logits, which have the same distribution."""


class Unsupported(InputError):
    """The run lacks what a lens needs; the message says what."""


@dataclass(kw_only=True)
class LensInputs:
    """A run as an audit looks at it.

    Attributes:
        run: The recorded run.
        clock: The unit of τ: step, flow, wall, examples or tokens.
        indices: Positions of the audited snapshots, increasing; at least two.
        architecture: What rebuilds the model: a module, ``package.module:factory``, or None.
        given_probe: The user's probe, or None for the run's own.
        given_batch_size: The user's batch size, or None for the recorded one.
        intervals: The audited intervals that the parameter lens looks at; None for all.
        jobs: Processes.
        quadrature: Whether the parameter lens's values are those at each step's start, or the mean
            of both ends'.
        damping: The parameter lens's λ; None for its default.
        device_name: Where the parameter lens computes; None for a GPU if there is one.
        progress: Starts progress bars, if any are wanted.
        given_likelihood: What the outputs are, as the user says; None for what the record says.
        given_sigma2: A Gaussian's variance, as the user says.
        given_kind: What outputs of classes are, as the user says.
    """

    run: Run
    clock: str = "step"
    indices: Sequence[int]
    architecture: str | nn.Module | None = None
    given_probe: Probe | None = None
    given_batch_size: int | None = None
    intervals: slice | Sequence[int] | None = None
    jobs: int = 1
    quadrature: Literal["start", "trapezoid"] = "start"
    damping: float | None = None
    device_name: str | None = None
    progress: Progress | None = None
    given_likelihood: str | None = None
    given_sigma2: float | None = None
    given_kind: str | None = None

    def __post_init__(self) -> None:
        if self.quadrature not in ("start", "trapezoid"):
            raise InputError(
                f"quadrature {self.quadrature!r} is unknown: use 'start' or 'trapezoid'"
            )
        if self.jobs == 0:
            raise InputError("jobs must be a number of processes, or -1 for one per core, not 0")
        self.device  # noqa: B018 (an unknown device is refused here)

    @cached_property
    def device(self) -> torch.device:
        """Where the parameter lens computes."""
        default = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.device(self.device_name or default)
        except (RuntimeError, TypeError):
            raise InputError(
                f"device is {self.device_name!r}; give one of torch's, such as 'cpu' or 'cuda'"
            ) from None

    @property
    def steps(self) -> np.ndarray:
        """Step numbers of the audited snapshots."""
        return np.array([self.run.snapshots[i].step for i in self.indices])

    @cached_property
    def probe(self) -> Probe | None:
        """The user's probe, else the run's own."""
        probe = self.given_probe if self.given_probe is not None else self.run.probe
        if self.run.info.hf_config_path:
            architecture = self.run.info.notes.get("architecture")
        else:
            architecture = None if self.given_probe is None else self._given_class
        if probe is None or not isinstance(architecture, str):
            return probe
        shifts = is_causal(architecture)
        if architecture.endswith(CONDITIONAL) and probe.as_labels:
            config = getattr(adapters.base_of(self.model), "config", None)
            if getattr(config, "is_encoder_decoder", False):
                return with_decoder_inputs(probe, self.model)
            shifts = True
        return shifted_labels(probe) if shifts and wants_shift(probe) else probe

    @property
    def _replays(self) -> bool:
        """Whether predictions are made by a model that the user gave."""
        first = self.run.snapshots[0]
        return self.architecture is not None and first.has_group("params")

    @property
    def _given_class(self) -> str | None:
        """Name of the class of the model that the user gave, without what adapts it."""
        return type(adapters.base_of(self.model)).__name__ if self._replays else None

    @property
    def _given_likelihood(self) -> str | None:
        """What the config of a Hugging Face model that the user gave says of its outputs."""
        if not self._replays or self.run.snapshots[0].has_group("probe"):
            return None
        config = getattr(adapters.base_of(self.model), "config", None)
        if config is None or self._given_class is None or not hasattr(config, "to_dict"):
            return None
        return likelihood_of(config.to_dict(), [self._given_class])

    @property
    def batch_size(self) -> int | None:
        """Loss terms per optimizer step, as the user or the record says."""
        return (
            self.given_batch_size if self.given_batch_size is not None else self.run.info.batch_size
        )

    @property
    def kind(self) -> str | None:
        """What outputs of classes are, one of `thermo_opt.likelihoods.KINDS`, where that was
        said."""
        return self.given_kind if self.given_kind is not None else self.run.info.kind

    @property
    def likelihood(self) -> tuple[str, list[str]]:
        """The outputs' likelihood, and a note when it had to be assumed."""
        said = self.given_likelihood or self.run.info.likelihood or self._given_likelihood
        if said is None:
            return "categorical", [
                f"outputs taken for class {self.kind or 'logits'} (the record doesn't say)"
            ]
        return said, []

    def family(
        self, last: Callable[[], np.ndarray], targets: np.ndarray | None
    ) -> tuple[str, float, list[str]]:
        """The outputs' likelihood, their variance where it is Gaussian, and what had to be assumed.

        Args:
            last: Gives the outputs of the last audited snapshot, from which a variance that nobody
                said is estimated.
            targets: The probe's, or None.

        Raises:
            InputError: The variance is needed and can't be told.
        """
        name, notes = self.likelihood
        sigma2 = self.given_sigma2 if self.given_sigma2 is not None else self.run.info.sigma2
        if name != "gaussian":
            if self.given_sigma2 is not None:
                raise InputError(
                    f"{self.run.path}: sigma2 is the variance of gaussian outputs, and these are "
                    f"{name}: say likelihood='gaussian', or leave it out"
                )
            return name, 1.0, notes
        if sigma2 is None:
            if targets is None:
                raise InputError(
                    f"{self.run.path}: distances between gaussian outputs are in units of their "
                    "standard deviation, which nothing here tells: give sigma2"
                )
            try:
                sigma2 = likelihoods.residual_variance(last(), targets)
            except InputError as error:
                raise InputError(f"{self.run.path}: {error}") from None
            notes = [
                *notes,
                f"sigma2 wasn't given: {sigma2:.4g}, the mean squared residual at the last "
                "snapshot, is used; dissipations and squared lengths are in proportion to 1/sigma2",
            ]
        return name, sigma2, notes

    @cached_property
    def model(self) -> nn.Module:
        """The architecture, built once."""
        try:
            return build_model(self.run, self.architecture)
        except InputError as error:
            if self.architecture is not None:
                raise
            raise Unsupported(str(error)) from None

    def exact_model(self) -> nn.Module:
        """A copy of the model in float64 and evaluation mode that puts out the family's own
        parameters: of declared probabilities p, the logits log p or log p/(1 − p)."""
        model = copy.deepcopy(self.model).to(device=self.device, dtype=torch.float64).eval()
        likelihood = self.likelihood[0]
        if self.kind == "probabilities" and likelihood in _LOGITS:
            model.register_forward_hook(_LOGITS[likelihood])
        return model

    def tau(self, steps: np.ndarray) -> np.ndarray:
        """Durations of the intervals between these steps on the chosen clock."""
        readings = self.run.clock_readings(self.clock, steps)
        for k in np.flatnonzero(np.diff(readings) < 0):
            raise InputError(
                f"{self.run.path}: clock {self.clock!r} runs backwards from step {steps[k]} to "
                f"{steps[k + 1]}: correct what the run logged, or use clock 'step'"
            )
        return td.durations(readings)

    def training_loss(self, steps: np.ndarray) -> np.ndarray:
        """The training loss logged last before or at these steps (nats), NaN where there is none
        yet."""
        if "loss" not in self.run.steps:
            return np.full(len(steps), np.nan)
        logged = self.run.steps["loss"].astype(np.float64).dropna()
        at = np.searchsorted(logged.index.to_numpy(), steps, side="right") - 1
        return (
            np.where(at >= 0, logged.to_numpy()[np.maximum(at, 0)], np.nan)
            if len(logged)
            else np.full(len(steps), np.nan)
        )

    def advance(self, description: str, total: int) -> Callable[[int], None] | None:
        """Start a progress bar if the user asked for any."""
        return None if self.progress is None else self.progress(description, total)


def recorded_settings(run: Run) -> dict[str, str | int | float]:
    """What the record says of how a run was trained, by name: its optimizer, batch size, learning
    rate and the like; only single numbers and words."""
    info = run.info
    found: dict[str, Any] = {**info.notes, **info.settings}
    found |= {"optimizer": info.optimizer, "batch_size": info.batch_size}
    return {
        str(key): value
        for key, value in found.items()
        if isinstance(value, str | int | float) and value == value
    }
