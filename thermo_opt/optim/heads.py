"""Which of the tensors that a model returns are its predictions: one, or several heads side by
side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical
from torch.nn.functional import pad

from thermo_opt.models import outputs_of

NOTHING = -1e4
"""The logit of a class that a narrower head doesn't have: its probability is 0."""


@dataclass(frozen=True)
class Heads:
    """Where the predictions are in what a model returns.

    Attributes:
        places: numbers among `parts_of`; none where `outputs_of` finds them.
        fill: what narrower heads are filled up with.
        rest: other tensors that may be predictions, which can't be put beside these.
    """

    places: tuple[int, ...] = ()
    fill: float = 0.0
    rest: tuple[int, ...] = ()

    @property
    def several(self) -> bool:
        """Whether there are more heads than one."""
        return len(self.places) > 1

    def each(self, result: Any) -> list[Tensor]:
        """The heads, one by one.

        Raises:
            InputError: where there are no predictions, or none can be told from the others.
        """
        if not self.places:
            return [outputs_of(result)]
        parts = parts_of(result)
        return [parts[k] for k in self.places]

    def together(self, heads: Sequence[Tensor], fill: float | None = None) -> Tensor:
        """One head as it is; several, (n, c_k) or (n,), as (n, heads, max c_k)."""
        if len(heads) == 1:
            return heads[0]
        rows = [h if h.dim() > 1 else h.unsqueeze(-1) for h in heads]
        most = max(h.shape[-1] for h in rows)
        value = self.fill if fill is None else fill
        return torch.stack([pad(h, (0, most - h.shape[-1]), value=value) for h in rows], 1)


def found(result: Any, classes: bool) -> Heads:
    """The heads in what a training pass has returned.

    Of a tuple, a list or a dictionary without "logits": the tensors, or parameters of returned
    distributions, that training goes through. The first that is wide decides; those that others
    were computed from (a latent code, hidden states) are none, nor is a loss per example or another
    one's transpose.

    Args:
        result: what the model returned.
        classes: whether predictions have classes; then tensors of width 1 (a value beside a policy)
            are heads only beside others.
    """
    named = isinstance(result, Mapping) and ("logits" in result or "start_logits" in result)
    if named or not isinstance(result, Mapping | tuple | list | Distribution):
        return Heads()
    parts = parts_of(result)
    trained = [k for k, t in enumerate(parts) if t.requires_grad and t.dim() > 0]
    trained = [k for k in trained if not _is_turned(parts[k], parts)]
    wide = [k for k in trained if is_wide(parts[k], classes)]
    narrow = [k for k in trained if k not in wide]
    if not wide:
        inner = _inner([parts[k] for k in narrow])
        return Heads() if inner else beside(parts, narrow, classes)
    inner = _inner([parts[k] for k in wide])
    wide = [k for k in wide if parts[k].grad_fn not in inner]
    made = {parts[k].grad_fn for k in wide}
    narrow = [k for k in narrow if not made & _before([parts[k]])]
    return beside(parts, [*wide, *narrow], classes)


def is_wide(t: Tensor, classes: bool) -> bool:
    """Whether a tensor may be a head by itself, and isn't one number per example."""
    return t.dim() > 1 and (t.shape[-1] > 1 or not classes)


def beside(parts: Sequence[Tensor], places: Sequence[int], classes: bool) -> Heads:
    """The first of these places, and those that may be heads beside it: (n, c), of as many
    examples."""
    if not places:
        return Heads()
    first = parts[places[0]]
    same = [k for k in places if parts[k].dim() <= 2 and len(parts[k]) == len(first)]
    same = sorted(same) if first.dim() <= 2 else [places[0]]
    rest = tuple(k for k in places if k not in same)
    return Heads(tuple(same), NOTHING if classes else 0.0, rest)


def parts_of(result: Any) -> list[Tensor]:
    """The floating-point tensors among what a model returned; of a distribution its logits, or its
    mean."""
    if isinstance(result, Distribution):
        return [_parameter(result)]
    values = result.values() if isinstance(result, Mapping) else result
    found = [_parameter(v) if isinstance(v, Distribution) else v for v in values]
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]


def _parameter(d: Distribution) -> Tensor:
    while isinstance(d, Independent):
        d = d.base_dist
    if isinstance(d, Categorical | OneHotCategorical | Bernoulli):
        return d.logits
    return d.mean


def _is_turned(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a tensor is another one's transpose, as the logits of images are those of texts in
    contrastive models."""
    node = t.grad_fn
    if node is None or node.name() not in ("TBackward0", "TransposeBackward0"):
        return False
    return any(other.grad_fn is node.next_functions[0][0] for other in others)


def _inner(tensors: Sequence[Tensor]) -> set[Any]:
    """The autograd nodes of those tensors that others of them were computed from."""
    return {t.grad_fn for t in tensors} & _before(tensors)


def _before(tensors: Sequence[Tensor]) -> set[Any]:
    """The autograd nodes that tensors were computed from, without their own."""
    seen: set[Any] = set()
    ahead = [n for t in tensors if t.grad_fn is not None for n, _ in t.grad_fn.next_functions]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return seen
