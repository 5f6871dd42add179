"""What a loss's gradients at the outputs say of the loss: its scale, and whether it is the
likelihood's.

For targets that are outcomes of the likelihood, the gradient of c times the mean negative
log-likelihood of M predictions is c (p − y)/M for every prediction, with y known from its sign: so
c follows in closed form, prediction by prediction. One common c ≠ 1 is a scaled (or summed) loss;
c that vary are weights (class weights, returns); what fits no c is another loss.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Bernoulli, Categorical, Likelihood
from thermo_opt.optim.class_axis import ZERO_SUM
from thermo_opt.optim.forward_pass import ForwardPass

MOST = 4096
"""Predictions that are looked at."""

COMMON = 0.01
"""Scales that differ by less than this are one scale."""

UNDECIDED = 0.5
"""Share of predictions with a gradient that must be missed by more than 0.05 for the scale to be
read. Where the loss is spent, rounding has emptied many gradients: too few terms are counted."""

FIRST, EVERY = 32, 16
"""The first passes are all looked at, later ones in turn: a loss seldom changes its form."""

NEAR = 3.0
"""A scale within this factor of 1 is not worth a word."""


@dataclass(frozen=True)
class LossScale:
    """By which factor a loss is larger than the mean negative log-likelihood.

    Attributes:
        typical: the median over predictions.
        common: whether all predictions have the same.
    """

    typical: float
    common: bool


def loss_scale(
    likelihood: Likelihood, seen: ForwardPass, terms: float, scale: float
) -> LossScale | None:
    """The loss's scale as one pass shows it (`LossScale`).

    Args:
        likelihood: what the outputs mean; only "categorical" and "bernoulli" tell.
        seen: a pass whose output gradients were kept.
        terms: predictions of all passes of the step.
        scale: by how much a GradScaler has multiplied the loss.

    Returns:
        None where it can't be told.
    """
    rows = _rows(likelihood, seen)
    if rows is None:
        return None
    f, g = rows[0], rows[1] * (terms / scale)
    if isinstance(likelihood, Categorical):
        least, label = g.min(-1, keepdim=True)
        missed = 1 - f.softmax(-1).gather(-1, label)[:, 0]
        found = 0.5 * g.abs().sum(-1)
        # of a prediction that is certain and right, rounding leaves no gradient at its own class
        known = (missed > 0.05) & (least[:, 0] < 0)
    elif isinstance(likelihood, Bernoulli):
        p = f.sigmoid()
        missed, found = torch.where(g < 0, 1 - p, p).flatten(), g.abs().flatten()
        known = (missed > 0.05) & (found > 0)
    else:
        return None
    if not float(known.float().mean()) > UNDECIDED:
        return None
    scales = found[known] / missed[known]
    typical = float(scales.median())
    if not math.isfinite(typical):
        return None
    spread = float((scales / max(typical, 1e-30) - 1).abs().max())
    return LossScale(typical, spread < COMMON)


def squashed(likelihood: Likelihood, seen: ForwardPass) -> str | None:
    """What the gradients say of a softmax or sigmoid too many, as an advice; None where there is
    none.

    Held against what a loss would have left that takes the squashed outputs for logits, and, of
    binary outcomes, one that takes the outputs for probabilities. Up to a common factor.
    """
    rows = _rows(likelihood, seen)
    if rows is None:
        return None
    f, g = rows
    if isinstance(likelihood, Categorical):
        y = torch.zeros_like(g).scatter_(-1, g.argmin(-1, keepdim=True), 1.0)
        f = f.clone().requires_grad_()
        with torch.enable_grad():
            nll = likelihood.nll(f.softmax(-1), y).sum()
        if _proportional(g, torch.autograd.grad(nll, f)[0]):
            return (
                "the loss takes a softmax of the model's outputs for logits: drop that softmax, "
                "since cross_entropy has one of its own"
            )
    elif isinstance(likelihood, Bernoulli):
        y, p = (g < 0).to(f), f.sigmoid()
        if _proportional(g, (p.sigmoid() - y) * p * (1 - p)):
            return (
                "the loss takes a sigmoid of the model's outputs for logits: drop that sigmoid, "
                "since binary_cross_entropy_with_logits has one of its own"
            )
        within = float(f.min()) >= 0 and float(f.max()) <= 1
        if within and _proportional(g, (f - y) / (f * (1 - f)).clamp_min(1e-12)):
            return (
                "the loss takes the model's outputs for probabilities, and NGDT takes them for "
                "logits: leave the model's sigmoid out, and give its outputs to "
                "binary_cross_entropy_with_logits"
            )
    return None


def _rows(likelihood: Likelihood, seen: ForwardPass) -> tuple[Tensor, Tensor] | None:
    """Outputs and their gradients, a row for each of up to `MOST` predictions that have any."""
    if seen.gradient is None or seen.outputs.shape != seen.gradient.shape:
        return None
    f = likelihood.outputs(seen.outputs).detach().flatten(0, -2)
    g = seen.gradient.reshape(f.shape)
    active = (g != 0).any(-1).nonzero()[:, 0]
    active = active[:: max(len(active) // MOST, 1)]
    return (f[active].float(), g[active].float()) if len(active) else None


def _proportional(g: Tensor, expected: Tensor) -> bool:
    """Whether ``g`` is, for most of its size, a positive multiple of ``expected``."""
    factor = float((g * expected).sum() / expected.square().sum())
    gap = float((g - factor * expected).abs().sum())
    return factor > 0 and gap < COMMON * float(g.abs().sum())


def zero_sum(seen: ForwardPass, unit: float) -> bool:
    """Whether the output gradients sum to zero along the classes, as softmax cross-entropy's do.

    ``unit``: 1/M times whatever factors the loss has: what the sum of one prediction's
    probabilities is rounded by, over the precision. Where the loss is spent, nothing else is left
    of p − y.
    """
    g = seen.gradient
    if g is None or not g.dim() > 1:
        return True
    rounding = 4 * torch.finfo(g.dtype).eps * unit * g.numel() / g.shape[-1]
    g = g.float()
    return not float(g.sum(-1).abs().sum()) > ZERO_SUM * float(g.abs().sum()) + rounding


class GradientWatch:
    """Remembers how long one parameter's gradient was when backward had left it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._length: float | None = None
        self._handle: RemovableHandle | None = None

    def arm(self) -> None:
        """Watch the next backward pass."""
        self._length = None
        if self._handle is None and self._parameter.requires_grad:
            me = weakref.ref(self)

            def hook(parameter: Tensor) -> None:
                watch = me()
                if watch is not None:
                    watch._after(parameter)

            self._handle = self._parameter.register_post_accumulate_grad_hook(hook)

    def disarm(self) -> None:
        """Watch no more."""
        self._length = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def ratio(self, scale: float) -> float | None:
        """The gradient's length now over the one after backward, a GradScaler's factor apart."""
        now = self._parameter.grad
        if now is None or not self._length:
            return None
        found = float(torch.linalg.vector_norm(now.float())) * scale / self._length
        return found if math.isfinite(found) else None

    def _after(self, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.layout == torch.strided:
            self._length = float(torch.linalg.vector_norm(parameter.grad.float()))


class Notices:
    """Looks at the first passes of training and says, once, what is unusual about the loss."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self.scale: float | None = None
        self._said: set[str] = set()
        self._steps = 0

    def look(self, passes: Sequence[ForwardPass], scale: float) -> None:
        """Look at a step's passes, if it is their turn.

        Raises:
            InputError: for a loss that is summed over its terms.
        """
        self._steps += 1
        if self._steps > FIRST and self._steps % EVERY:
            return
        if any(one.missed for one in passes):
            seen = passes[-1]
            self._say(
                "heads",
                f"the loss uses several of the tensors that {type(seen.module).__name__} returns, "
                f"and steps are measured on those like the first, {tuple(seen.shape)}: return "
                "(n, c) each for all to be measured, or watch the others' part of the loss",
            )
        if not passes or passes[-1].gradient is None:
            return
        seen, terms = passes[-1], sum(one.terms for one in passes)
        if not terms:  # a gradient that is zero everywhere, as of a margin that holds
            return
        unit = scale / terms * max(1.0, self.scale or 1.0)
        if isinstance(self.likelihood, Categorical) and not zero_sum(seen, unit):
            self._say("likelihood", _other_loss(seen))
            return
        found = loss_scale(self.likelihood, seen, float(terms), scale)
        if found is None:
            return
        self.scale = found.typical
        if found.common and seen.terms >= 8 and abs(self.scale / terms - 1) < COMMON:
            raise InputError(f"the loss looks summed over its {terms} terms: use reduction='mean'")
        if not found.common and (advice := squashed(self.likelihood, seen)) is not None:
            self._say("likelihood", advice)
        elif not 1 / NEAR < self.scale < NEAR:
            self._say("scale", _scaled(self.scale, found.common))

    def compare(self, ratio: float) -> None:
        """Take the ratio of a gradient's length in step() to the one that backward left."""
        if ratio < 1 / NEAR:
            self._say(
                "clipping",
                f"gradients were multiplied by {ratio:.3g} between backward() and step() "
                "(clipped?). The budget bounds the step whatever the gradient's length; a shorter "
                "gradient only makes η_max bind, which bounds the natural gradient: leave clipping "
                "out (last_step['bound_by_eta_max'] says when it binds)",
            )

    def _say(self, topic: str, text: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(text, stacklevel=5)


def _scaled(scale: float, common: bool) -> str:
    what = "is" if common else "is weighted: it is, in the median over predictions,"
    return (
        f"the loss {what} {scale:.3g} times the mean negative log-likelihood. The budget stays in "
        "nats of the model's predictions, but the natural gradient, which η_max bounds, is not in "
        "the loss's own scale: leave the factor out, or set eta_max to suit it"
    )


def _other_loss(seen: ForwardPass) -> str:
    f = seen.outputs
    start = "the output gradients don't sum to zero along the classes, so the loss is no softmax "
    start += "cross-entropy of these outputs: "
    if float(f.min()) >= 0 and bool(((f.float().sum(-1) - 1).abs() < 1e-3).all()):
        return start + "they look like probabilities; return logits"
    return start + (
        "give likelihood='gaussian' for squared errors (with sigma2), 'bernoulli' for binary "
        "cross-entropies, 'poisson' for counts; otherwise steps are measured in the KL of a "
        "softmax that the loss doesn't have"
    )
