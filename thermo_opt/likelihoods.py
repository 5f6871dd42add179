"""Output families p(y | f): their names, where a distribution's parameters lie, what targets and
weights must be.

Said once for the Recorder, the audit (NumPy arrays) and the metrics and NGD-T (torch tensors):
every function takes either kind. The geometry of the families is `thermo_opt.manifold`'s, their
Fisher matrices are `thermo_opt.fisher`'s.

| family | outputs f | targets y |
|---|---|---|
| categorical | logits (..., c) | class numbers (...), −100 not counted; or soft targets (..., c),
rows that sum to 1 |
| bernoulli | logits | the same shape, in [0, 1] |
| gaussian | means, of one variance σ² | the same shape |
| poisson | log-rates | the same shape, ≥ 0 |
| heteroscedastic | (..., 2c): c means, then c log-variances | (..., c) |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from thermo_opt.errors import InputError

FAMILIES = ("categorical", "bernoulli", "gaussian", "poisson", "heteroscedastic")
KINDS = ("logits", "log-probabilities", "probabilities")
"""What recorded outputs of classes may be; for the other families they are the family's parameters
as listed above."""
IGNORED = -100
"""Target that marks a prediction as not counted (categorical), as in
``torch.nn.functional.cross_entropy``."""
ROUNDED = 1e-3
"""How far probabilities may be from summing to 1: as far as rounding to bfloat16, or to four
printed digits, takes them."""


def known(name: Any) -> str:
    """The family's name, or `InputError` listing them."""
    if name not in FAMILIES:
        raise InputError(f"likelihood {name!r} is unknown: use one of {', '.join(FAMILIES)}")
    return str(name)


def known_kind(kind: Any) -> str:
    """What the outputs are, one of `KINDS`, or `InputError` listing them."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
    return str(kind)


def class_axis(shape: Sequence[int], targets: Sequence[int] | None = None) -> int:
    """The axis of the classes: the last, or 1 by torch's convention for images (N, C, H, W) and (N,
    C, L).

    Decided by which of the two the targets' shape fits; where both or none do (no targets, soft
    targets), outputs of four and more dimensions follow torch, others have their classes last.
    """
    shape, torchlike = tuple(shape), len(shape) >= 4
    if targets is None or len(shape) < 3 or len(targets) != len(shape) - 1:
        return 1 if torchlike else -1
    last, first = (tuple(targets[1:]) == inner for inner in (shape[1:-1], shape[2:]))
    return 1 if first and (torchlike or not last) else -1


def axis_note(
    likelihood: str, shape: Sequence[int], targets: Sequence[int] | None = None
) -> str | None:
    """A note where the shapes alone don't tell which axis the classes lie along, or None.

    Args:
        likelihood: The outputs' family.
        shape: The outputs' shape.
        targets: The targets' shape, or None without any.
    """
    shape = tuple(shape)
    if likelihood != "categorical" or len(shape) < 3:
        return None
    if targets is not None:
        inner = tuple(targets[1:])
        if len(targets) != len(shape) - 1 or inner != shape[1:-1] or inner != shape[2:]:
            return None
    taken, other = "axis 1", "the last axis"
    why = "where torch has it for outputs of four axes and more"
    if class_axis(shape, targets) == -1:
        taken, other = other, taken
        why = "where outputs of three axes have it"
    known = "" if targets is None else f" and targets of shape {tuple(targets)}"
    return (
        f"outputs of shape {shape}{known} don't tell which axis the classes lie along: {taken} is "
        f"taken, {why}; if it is {other}, move that axis there"
    )


def parameters_last(likelihood: str, outputs: Any, targets: Any = None) -> Any:
    """Outputs with the classes along the last axis; of the other families as they are."""
    if likelihood != "categorical" or outputs.ndim < 3:
        return outputs
    axis = class_axis(outputs.shape, None if targets is None else targets.shape)
    return outputs if axis == -1 else _moved(outputs, axis)


def soft_targets_last(shape: Sequence[int], targets: Any) -> Any:
    """Soft targets with the classes along the last axis, as outputs of this shape have them.

    Those of images lie along axis 1 by torch's convention, unless their last axis has
    probabilities already; other targets are given as they are.
    """
    if not _floating(targets) or targets.ndim != len(shape) or targets.ndim < 4:
        return targets
    moved = _moved(targets, 1)
    if tuple(moved.shape) != tuple(shape):
        return targets
    return targets if tuple(targets.shape) == tuple(shape) and _are_rows(targets) else moved


def checked_outputs(likelihood: str, outputs: Any) -> Any:
    """The outputs, or `InputError` where no family of this name could be read from their shape or
    type."""
    if not outputs.ndim or not _floating(outputs):
        raise InputError(
            f"the {likelihood} likelihood needs floating-point outputs (n, c) or (n, t, c), got "
            f"{outputs.dtype} of shape "
            f"{tuple(outputs.shape)}"
        )
    if likelihood == "categorical" and (
        outputs.ndim < 2 or outputs.shape[class_axis(outputs.shape)] < 2
    ):
        raise InputError(
            f"outputs of shape {tuple(outputs.shape)} aren't class logits, which have a row of "
            f"two or more for each "
            "example; say which likelihood they have: for one logit 'bernoulli', for a mean "
            "'gaussian'"
        )
    if likelihood == "heteroscedastic" and (outputs.ndim < 2 or outputs.shape[-1] % 2):
        raise InputError(
            f"heteroscedastic outputs of shape {tuple(outputs.shape)} can't be halved along their "
            f"last axis, which must "
            "hold means, then as many log-variances"
        )
    return outputs


def checked_targets(likelihood: str, outputs: Any, targets: Any) -> Any:
    """Targets in the family's form for outputs that have their `parameters_last`.

    Categorical: integers of the leading shape, or floating-point soft targets of the outputs'
    shape (of images, with the classes along axis 1 as torch has them); the others: of the outputs'
    shape (heteroscedastic: half as wide).

    Raises:
        InputError: shapes that don't fit, a class that isn't there, values outside the family's
            support.
    """
    if getattr(targets, "is_complex", lambda: np.iscomplexobj(targets))():
        raise InputError(f"the {likelihood} targets are complex numbers; give real ones")
    if likelihood == "categorical":
        return _class_targets(outputs, targets)
    shape = tuple(outputs.shape)
    if likelihood == "heteroscedastic":
        shape = (*shape[:-1], shape[-1] // 2)
    if tuple(targets.shape) != shape:
        if _size(targets.shape) != _size(shape) or tuple(targets.shape[:1]) != shape[:1]:
            raise InputError(
                f"the {likelihood} targets of shape {tuple(targets.shape)} don't fit outputs of "
                f"shape "
                f"{tuple(outputs.shape)}: they must have shape {shape}"
            )
        targets = targets.reshape(shape)
    if likelihood == "bernoulli":
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise InputError("the bernoulli targets must lie in [0, 1]")
    elif not bool((abs(targets) < float("inf")).all()):
        raise InputError(f"the {likelihood} targets hold NaN or infinity; remove those examples")
    elif likelihood == "poisson" and bool((targets < 0).any()):
        raise InputError("the poisson targets must be counts ≥ 0")
    return targets


def _class_targets(outputs: Any, targets: Any) -> Any:
    shape, classes = tuple(outputs.shape), outputs.shape[-1]
    targets = soft_targets_last(shape, targets)
    if tuple(targets.shape) == shape and _floating(targets):
        return _soft_targets(targets)
    if tuple(targets.shape) != shape[:-1]:
        if tuple(targets.shape) == shape:
            raise InputError(
                f"class targets of the outputs' shape {shape} must be floating-point rows that "
                f"sum to 1; for several "
                "independent labels per example use likelihood='bernoulli'"
            )
        raise InputError(
            f"class targets of shape {tuple(targets.shape)} don't fit outputs of shape {shape}: "
            f"they must have shape "
            f"{shape[:-1]}, or be soft targets of shape {shape}"
        )
    if _floating(targets) and not bool((targets % 1 == 0).all()):
        raise InputError(
            "class targets must be whole numbers, or soft targets with a probability for each class"
        )
    targets = targets.long() if hasattr(targets, "long") else targets.astype(np.int64)
    inside = _size(targets.shape) and int(targets.min()) >= 0 and int(targets.max()) < classes
    if not inside:
        counted = targets[targets != IGNORED]
        if not _size(counted.shape):
            raise InputError(
                f"every target is {IGNORED}, so no prediction counts; give at least one class"
            )
        wrong = counted[(counted < 0) | (counted >= classes)]
        if _size(wrong.shape):
            raise InputError(
                f"target {int(wrong[0])} is outside the classes 0 … {classes - 1} of the outputs, "
                "which count from 0; correct the targets"
            )
    return targets


def _soft_targets(targets: Any) -> Any:
    counted = targets[targets[..., 0] != IGNORED]
    if not _size(counted.shape):
        raise InputError(
            f"every target is {IGNORED}, so no prediction counts; give at least one class"
        )
    if not _are_rows(counted):
        raise InputError(
            "soft class targets must be ≥ 0 and sum to 1 in each row; for several independent "
            "labels per example use "
            "likelihood='bernoulli'"
        )
    return targets


def _are_rows(targets: Any) -> bool:
    """Whether the last axis holds probabilities, wherever a prediction is counted."""
    counted = targets[targets[..., 0] != IGNORED]
    return bool(((counted >= 0).all(-1) & (abs(counted.sum(-1) - 1) < ROUNDED)).all())


def is_soft(likelihood: str, targets: Any) -> bool:
    """Whether checked targets give a probability for each class."""
    return likelihood == "categorical" and _floating(targets)


def counted_targets(likelihood: str, targets: Any) -> Any:
    """Which predictions count, a boolean array of the leading shape; None when all do. ``targets``:
    checked ones."""
    if likelihood != "categorical":
        return None
    ignored = (targets[..., 0] if _floating(targets) else targets) == IGNORED
    return ~ignored if bool(ignored.any()) else None


def checked_weights(weights: Any, leading: Sequence[int]) -> Any:
    """Weights of examples (n,) or of predictions, broadcast to the outputs' leading shape; zero
    means not counted.

    Raises:
        InputError: another shape, negative or non-finite weights, or nothing but zeros.
    """
    leading = tuple(leading)
    if tuple(weights.shape) != leading[: len(weights.shape)] or not len(weights.shape):
        raise InputError(
            f"weights of shape {tuple(weights.shape)} don't fit predictions of shape {leading}: "
            f"give one per example"
        )
    if not bool(((weights >= 0) & (weights < float("inf"))).all()) or not bool((weights > 0).any()):
        raise InputError("weights must be finite and ≥ 0, and not all zero")
    wide = weights.reshape(tuple(weights.shape) + (1,) * (len(leading) - len(weights.shape)))
    return wide.expand(leading) if hasattr(wide, "expand") else np.broadcast_to(wide, leading)


def look_like_probabilities(likelihood: str, outputs: Any) -> bool:
    """Whether outputs of classes are probabilities rather than logits: rows ≥ 0 that sum to 1, or
    all within [0, 1] and near both ends.

    ``outputs``: floating-point, with their `parameters_last`. The single logits of an untrained
    network often all lie within [0, 1], about their common bias; logits that reach both ends of it
    and never pass them don't, so sixteen such outputs are asked for.
    """
    if likelihood not in ("categorical", "bernoulli") or not _size(outputs.shape):
        return False
    low = float(outputs.min())
    if not low >= 0:
        return False
    if likelihood == "categorical":
        return bool((abs(outputs.sum(-1) - 1) < ROUNDED).all())
    return _size(outputs.shape) >= 16 and low < 0.1 and 0.9 < float(outputs.max()) <= 1


def refuse_probabilities(likelihood: str, outputs: Any) -> None:
    """`InputError` for outputs that were given as logits and `look_like_probabilities`."""
    if look_like_probabilities(likelihood, outputs):
        raise InputError(
            "the outputs look like probabilities, not logits: give the logits, before the softmax "
            "or sigmoid, or say "
            "kind='probabilities' (--kind probabilities)"
        )


def residual_variance(outputs: Any, targets: Any) -> float:
    """σ² of Gaussian outputs as their residuals have it: mean (y − f)², its maximum-likelihood
    estimate.

    Raises:
        InputError: the residuals vanish, so that they say nothing of σ².
    """
    gap = np.asarray(targets, dtype=np.float64).reshape(np.shape(outputs)) - np.asarray(
        outputs, dtype=np.float64
    )
    estimate = float(np.mean(np.square(gap)))
    if not 0 < estimate < float("inf"):
        raise InputError(
            "sigma2 can't be estimated from the residuals, which are zero or not finite: give "
            "sigma2"
        )
    return estimate


def _moved(x: Any, axis: int) -> Any:
    return x.movedim(axis, -1) if hasattr(x, "movedim") else np.moveaxis(x, axis, -1)


def _floating(x: Any) -> bool:
    return (
        bool(x.is_floating_point())
        if hasattr(x, "is_floating_point")
        else bool(np.issubdtype(x.dtype, np.floating))
    )


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
