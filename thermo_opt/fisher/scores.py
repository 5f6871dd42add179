"""Score rows: the matrix S whose Gram matrix is the Fisher, F = SᵀS/n (theory §7).

A prediction contributes rows BᵀJ_i, where the columns of B (c × m) satisfy B Bᵀ = Λ_i ("type-2":
all classes, m = c), or are the residual of the data's target ("empirical", m = 1) or of m targets
drawn from the model ("mc", divided by √m). The names are those of curvlinops and of NGD-T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import vjp, vmap

from thermo_opt.errors import InputError
from thermo_opt.fisher.metric import flatten
from thermo_opt.fisher.predictor import Part, Predictor, materialise
from thermo_opt.models import is_batched, map_tensors, slice_inputs

FisherType = Literal["type-2", "mc", "empirical"]

ENTRIES = 2**25
"""Most numbers in the score rows computed at once (256 MB in float64)."""


def check_fisher_type(predictor: Predictor, fisher_type: str) -> None:
    """Raise `InputError` for an unknown Fisher type, and for the empirical Fisher of a batch
    without targets."""
    if fisher_type not in get_args(FisherType):
        raise InputError(
            f"fisher_type must be one of {', '.join(get_args(FisherType))}, got {fisher_type!r}"
        )
    if fisher_type == "empirical":
        predictor.require_targets("the empirical Fisher")


def cotangents(
    predictor: Predictor,
    part: Part,
    f: Tensor,
    fisher_type: FisherType,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The columns B of every prediction, shape (…, c, m); zero where a prediction isn't counted."""
    family = predictor.likelihood
    if fisher_type == "type-2":
        columns = family.factor(f)
    elif fisher_type == "empirical":
        assert part.targets is not None
        columns = family.residual(f, part.targets).unsqueeze(-1)
    else:
        draws = [family.residual(f, family.sample(f, generator)) for _ in range(samples)]
        columns = torch.stack(draws, dim=-1) / samples**0.5
    return columns if part.mask is None else columns * part.mask[..., None, None]


def score_rows(
    predictor: Predictor,
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Blocks (rows, P) of S, in order, examples × positions × columns; rows of uncounted
    predictions are zero.

    Per-example gradients by ``vmap`` over ``vjp``; where the model can't be traced by
    ``torch.func`` (control flow that depends on the data), by one backward pass a row, which a note
    says. Cost: c·m backward passes per example at most.
    """
    generator = None if seed is None else torch.Generator(device=predictor.device).manual_seed(seed)
    size = sum(p.numel() for p in predictor.values)
    for part in predictor.parts:
        with torch.no_grad(), predictor.evaluation():
            f = predictor.call(predictor.values, part.inputs)
        columns = cotangents(predictor, part, f, fisher_type, samples, generator)
        examples, rows_each = f.shape[0], columns[0].numel() // f.shape[-1]
        chunk = max(1, ENTRIES // max(1, size * rows_each))
        for start in range(0, examples, chunk):
            stop = min(start + chunk, examples)
            if predictor.vmappable:
                try:
                    inputs = slice_inputs(part.inputs, start, stop, examples)
                    yield _vmapped(predictor, inputs, _spread(columns[start:stop]))
                    continue
                except RuntimeError as error:
                    predictor.vmappable = False
                    reason = (str(error).strip().splitlines() or ["unknown reason"])[0][:160]
                    predictor.note(
                        f"torch.func can't vectorise this model ({reason}): one backward pass a "
                        "row used"
                    )
            for i in range(start, stop):
                one = Part(
                    *(_example(t, i, examples) for t in (part.inputs, part.targets, part.mask))
                )
                yield _looped(predictor, one, fisher_type, samples, generator)


def _example(tree: Any, i: int, examples: int) -> Any:
    return None if tree is None else slice_inputs(tree, i, i + 1, examples)


def _spread(columns: Tensor) -> Tensor:
    """Cotangents of one example's whole output, (examples, rows, …, c), from per-prediction columns
    (examples, …, c, m)."""
    examples, m = columns.shape[0], columns.shape[-1]
    flat = columns.reshape(examples, -1, *columns.shape[-2:])  # examples, positions, c, m
    positions, c = flat.shape[1], flat.shape[2]
    eye = torch.eye(positions, dtype=columns.dtype, device=columns.device)
    spread = torch.einsum("st,etcm->esmtc", eye, flat)
    return spread.reshape(examples, positions * m, *columns.shape[1:-2], c)


def _looped(
    predictor: Predictor,
    part: Part,
    fisher_type: FisherType,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    f, leaves = predictor.graph(part)
    rows = []
    for u in _spread(cotangents(predictor, part, f.detach(), fisher_type, samples, generator))[0]:
        gradients = torch.autograd.grad(
            f, leaves, u.unsqueeze(0), retain_graph=True, allow_unused=True
        )
        rows.append(flatten(materialise(gradients, leaves)))
    return torch.stack(rows)


def _vmapped(predictor: Predictor, inputs: Any, spread: Tensor) -> Tensor:
    examples, each = spread.shape[:2]
    values = tuple(predictor.values)
    batched: list[Tensor] = []
    map_tensors(inputs, lambda t: batched.append(t) if is_batched(t, examples) else None)

    def one(tensors: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        queue = iter(tensors)
        single = map_tensors(
            inputs, lambda t: next(queue).unsqueeze(0) if is_batched(t, examples) else t
        )
        pull = vjp(lambda *p: predictor.call(p, single)[0], *values)[1]
        return vmap(pull)(u)

    with torch.no_grad(), predictor.evaluation():
        blocks = vmap(one)(tuple(batched), spread)
    return torch.cat([b.reshape(examples * each, -1) for b in blocks], dim=1)
