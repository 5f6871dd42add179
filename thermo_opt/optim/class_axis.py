"""Along which axis of a pass's outputs the classes lie, as the loss's own gradient tells it.

Predictions of images are (N, C, H, W) by torch's convention, of a transducer (N, T, U, C), and
no shape tells the two apart. The gradient of a softmax cross-entropy does: it sums to zero along
the classes, and along no other axis.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from thermo_opt import likelihoods
from thermo_opt.fisher.likelihoods import Categorical, Likelihood
from thermo_opt.optim.forward_pass import ForwardPass

ZERO_SUM = 1e-2
"""A softmax cross-entropy's output gradients sum to zero along the classes, up to this share of
their size: low precision and small auxiliary terms leave no more."""

ROWS = 64
"""Predictions that are asked whether they are logarithms of probabilities."""

NORMALISED = 1e-3
"""How far log Σ exp of such a prediction may be from 0."""


class ClassAxis:
    """Turns categorical passes so that their classes are last, whatever axis the loss sums over.

    Decided by the first pass whose gradient fits one of the two axes in question, 1 and the last,
    for all outputs with as many dimensions. Until then, and where a loss fits neither, torch's
    convention holds (`thermo_opt.likelihoods.class_axis`). The first pass also decides whether
    outputs are log-probabilities. Similarities (n, n) of a contrastive loss in both directions,
    such as CLIP's, are predictions in both.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        self._axes: dict[int, int] = {}
        self._logarithms: dict[int, bool] = {}
        self._contrastive = False

    def arrange(self, seen: ForwardPass) -> None:
        """Turn a pass that backward came through, and where its outputs are log-probabilities, take
        its gradient back to the logits.

        Raises:
            InputError: for outputs that hold no classes.
        """
        if not isinstance(self.likelihood, Categorical) or seen.outputs.dim() < 2:
            return
        if seen.heads.several:
            _sort_heads(seen)
            return
        self._contrastive |= _is_contrastive(seen)
        if self._contrastive and _is_square(seen.outputs):
            seen.double()
        elif seen.outputs.dim() > 2 and seen.axis is None:
            seen.turn(self._axis(seen))
        if (g := seen.gradient) is not None:
            rank = seen.outputs.dim()
            if rank not in self._logarithms:
                self._logarithms[rank] = _log_probabilities(seen.outputs, -1)
            if self._logarithms[rank]:
                seen.gradient = _back_to_logits(seen.outputs, g)

    def _axis(self, seen: ForwardPass) -> int:
        rank = seen.outputs.dim()
        if rank not in self._axes:
            found = _decided(seen)
            if found is None:
                likelihoods.checked_outputs(self.likelihood.name, seen.outputs)
                return likelihoods.class_axis(seen.outputs.shape)
            self._axes[rank] = found
            if found == 1:
                warnings.warn(
                    f"of the model's outputs {tuple(seen.outputs.shape)} axis 1 is taken for the "
                    "classes, since the loss's gradient sums to zero along it; return the classes "
                    "last if this is wrong",
                    stacklevel=6,
                )
        return self._axes[rank]


def _is_square(f: Tensor) -> bool:
    return f.dim() == 2 and f.shape[0] == f.shape[1] > 1


def _is_contrastive(seen: ForwardPass) -> bool:
    """Whether the gradient is that of cross-entropies along the columns, and perhaps along the rows
    too, with the labels on the diagonal."""
    g = seen.gradient
    if g is None or not _is_square(seen.outputs):
        return False
    g = g.float()
    if _sums_to_zero(g, 1):
        return False
    own = g.diagonal()
    others = g - torch.diag(own)
    return bool((own <= 0).all() and (others >= 0).all()) and _sums_to_zero(g.flatten(), 0)


def _sort_heads(seen: ForwardPass) -> None:
    """Set the heads apart that have another loss, if one has a softmax's."""
    if (given := seen.gradient) is None:
        return
    heads = range(given.shape[1])
    g = torch.stack([_of_logits(seen.outputs[:, k], given[:, k]) for k in heads], 1)
    sums, sizes = g.float().sum(-1).abs().sum(0), g.float().abs().sum((0, -1))
    fits = sums <= ZERO_SUM * sizes
    if bool(fits.any()):
        seen.keep(fits.tolist())
        g = g.where(fits[:, None], 0.0)
    seen.gradient = g


def _of_logits(f: Tensor, g: Tensor) -> Tensor:
    """The gradient at log-probabilities taken back to their logits, another as it is."""
    return _back_to_logits(f, g) if _log_probabilities(f, -1) else g


def _back_to_logits(f: Tensor, g: Tensor) -> Tensor:
    return g - f.to(g.dtype).exp() * g.sum(-1, keepdim=True)


def _decided(seen: ForwardPass) -> int | None:
    """The one of the two axes along which the gradient sums to zero or, failing that, along which
    the outputs are log-probabilities."""
    if seen.gradient is None:
        return None
    g = seen.gradient.float()
    fits = [axis for axis in (-1, 1) if _sums_to_zero(g, axis)]
    if len(fits) != 1:
        fits = [axis for axis in (-1, 1) if _log_probabilities(seen.outputs, axis)]
    return fits[0] if len(fits) == 1 else None


def _sums_to_zero(g: Tensor, axis: int) -> bool:
    return not float(g.sum(axis).abs().sum()) > ZERO_SUM * float(g.abs().sum())


def _log_probabilities(f: Tensor, axis: int) -> bool:
    """Whether the first predictions, with the classes along this axis, are logarithms of
    probabilities."""
    rows = f[:ROWS].movedim(axis, -1).reshape(-1, f.shape[axis])[:ROWS].float()
    return bool(torch.logsumexp(rows, -1).abs().max() < NORMALISED) if rows.numel() else False
