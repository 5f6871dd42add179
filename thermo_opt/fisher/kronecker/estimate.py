"""From a model and a batch to the blocks of K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker import factors
from thermo_opt.fisher.kronecker.blocks import (
    EigenvalueCorrectedBlock,
    KroneckerBasis,
    KroneckerBlock,
)
from thermo_opt.fisher.kronecker.columns import Columns, one_by_one, pull_back
from thermo_opt.fisher.kronecker.layers import (
    Call,
    Cover,
    KroneckerLayer,
    ScaleLayer,
    cover,
    recording,
)
from thermo_opt.fisher.kronecker.placement import (
    Placed,
    place_diagonal,
    place_kronecker,
    place_scale,
    place_tied,
)
from thermo_opt.fisher.predictor import Predictor


@dataclass
class Estimate:
    """Blocks covering every trainable parameter once, and what was approximated (``diagonal``:
    worth a warning)."""

    blocks: list[Placed]
    notes: list[str] = field(default_factory=list)
    diagonal: str = ""


def estimate(
    predictor: Predictor,
    columns: Columns,
    kfac_approx: str,
    corrected: bool = False,
    max_side: int = 8192,
) -> Estimate:
    """K-FAC's blocks on the predictor's batch; with ``corrected``, EKFAC's (a second pass)."""
    plan = cover(predictor.model, predictor.modules)
    sums: dict[str, _KroneckerSum | _ScaleSum] = {
        layer.name: _ScaleSum(layer)
        if isinstance(layer, ScaleLayer)
        else _KroneckerSum(layer, kfac_approx, max_side)
        for layer in plan.layers
    }
    for samples, gradients in _visits(predictor, columns, plan.layers):
        if gradients is None:
            sums[samples.layer.name].add_inputs(samples.calls)
        else:
            sums[samples.layer.name].add_gradients(samples.calls, gradients)
    result = _blocks(plan, list(sums.values()), predictor, columns)
    if corrected:
        _correct(result, plan, predictor, columns)
    return result


@dataclass
class _Samples:
    """The calls of one layer in one microbatch, with equal numbers of examples.

    ``projected``: their inputs in the eigenbasis of A, made once for all pieces of gradients.
    """

    layer: KroneckerLayer | ScaleLayer
    calls: list[Call]
    projected: Tensor | None = None


def _joined_inputs(layer: KroneckerLayer, calls: Sequence[Call]) -> Tensor:
    """Input samples of several calls, joined along the shared positions."""
    if not layer.covers("weight"):
        return calls[0].input()
    parts = [layer.inputs(call.input()) for call in calls]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1 if layer.rule.one_hot else -2)


def _joined_gradients(
    layer: KroneckerLayer, calls: Sequence[Call], grads: Sequence[Tensor]
) -> Tensor:
    """(…, K·n, r, out) from one (K, …) gradient per call."""
    parts = []
    for call, g in zip(calls, grads, strict=True):
        repeats = (len(g), *[1] * (call.x.dim() - 1))
        x = call.x.repeat(*repeats) if layer.rule.one_hot else call.x
        parts.append(layer.gradients(x, g.flatten(0, 1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _visits(
    predictor: Predictor, columns: Columns, layers: Sequence[KroneckerLayer | ScaleLayer]
) -> Iterator[tuple[_Samples, list[Tensor] | None]]:
    """For every microbatch and layer: its samples once with None, then with each piece of output
    gradients (K, …)."""
    with recording(layers) as calls:
        for number, (part, f, _) in enumerate(predictor.graphs(once=columns.single)):
            groups = _grouped(calls)
            for samples in groups:
                yield samples, None
            ordered = [call for samples in groups for call in samples.calls]
            ends, sizes = [call.output for call in ordered], [call.size for call in ordered]
            for grads in pull_back(f, columns.at(number, part, f), ends, sizes) if ordered else ():
                rest = iter(grads)
                for samples in groups:
                    own = [next(rest) for _ in samples.calls]
                    # A call whose result the outputs don't depend on has no gradient and no share
                    # in F.
                    pairs = zip(samples.calls, own, strict=True)
                    kept = [(call, g) for call, g in pairs if g is not None]
                    if len(kept) < len(own):
                        samples = _Samples(samples.layer, [call for call, _ in kept])
                    if kept:
                        yield samples, [g for _, g in kept]
            calls.clear()  # also of what a checkpointed layer recomputed during the backward pass


def _grouped(calls: Sequence[Call]) -> list[_Samples]:
    groups: dict[tuple[str, int], _Samples] = {}
    for call in calls:
        key = (call.layer.name, call.x.shape[0] if call.x.dim() else 1)
        groups.setdefault(key, _Samples(call.layer, [])).calls.append(call)
    return list(groups.values())


class _KroneckerSum:
    """Running sums of a layer's A and G; a side wider than ``max_side`` keeps its diagonal only."""

    def __init__(self, layer: KroneckerLayer, kfac_approx: str, max_side: int) -> None:
        self.layer, self.kfac_approx = layer, kfac_approx
        _, out, inputs = layer.shape
        self.diagonal_A, self.diagonal_G = layer.rule.one_hot or inputs > max_side, out > max_side
        self.A: factors.Moment | None = None
        self.G: Tensor | None = None

    def add_inputs(self, calls: Sequence[Call]) -> None:
        rule, module, kind = self.layer.rule, self.layer.module, self.kfac_approx
        if len(calls) == 1:
            x = calls[0].input()
            moment = factors.input_moment(rule, module, x, kind, diagonal=self.diagonal_A)
        else:
            x = _joined_inputs(self.layer, calls)
            moment = factors.samples_moment(rule, module, x, kind, diagonal=self.diagonal_A)
        if self.A is None:
            self.A = moment
        else:
            self.A.add(moment)

    def add_gradients(self, calls: Sequence[Call], grads: list[Tensor]) -> None:
        kind = "expand" if self.layer.rule.one_hot else self.kfac_approx
        rows = factors.flatten(_joined_gradients(self.layer, calls, grads), kind, mean=False)
        total = factors.outer(rows, diagonal=self.diagonal_G)
        self.G = total if self.G is None else self.G.add_(total)

    def finish(self, count: int) -> tuple[Tensor, Tensor] | None:
        """A and G; the sums themselves are divided, so this is the end of them."""
        if self.A is None or self.G is None:
            return None
        return self.A.total.div_(self.A.rows), self.G.div_(count)


class _ScaleSum:
    """Running second moment of the per-example gradients of a layer's scale and shift."""

    def __init__(self, layer: ScaleLayer) -> None:
        self.layer = layer
        self.total: Tensor | None = None

    def add_inputs(self, calls: Sequence[Call]) -> None:
        """Nothing to do: the rows need the gradients."""

    def add_gradients(self, calls: Sequence[Call], grads: list[Tensor]) -> None:
        rule, module = self.layer.rule, self.layer.module
        for k in range(len(grads[0])):
            pairs = zip(calls, grads, strict=True)
            rows = torch.stack([rule.rows(module, call.input(), g[k]) for call, g in pairs]).sum(0)
            if self.layer.dense:
                total = factors.outer(rows)
            else:
                per_channel = rows.unflatten(-1, (len(self.layer.own), -1))
                total = torch.einsum("npd,nqd->dpq", per_channel, per_channel)
            self.total = total if self.total is None else self.total.add_(total)

    def finish(self, count: int) -> Tensor | None:
        return None if self.total is None else self.total / count


def _blocks(
    plan: Cover,
    sums: Sequence[_KroneckerSum | _ScaleSum],
    predictor: Predictor,
    columns: Columns,
) -> Estimate:
    placed: list[Placed] = []
    notes: list[str] = []
    loose = set(plan.rest)
    silent: list[str] = []
    shared: dict[int, list[tuple[KroneckerLayer, Tensor, Tensor]]] = {i: [] for i in plan.tied}
    for total in sums:
        positions = {i for _, i in total.layer.own}
        tied = not plan.tied.isdisjoint(positions)
        if isinstance(total, _ScaleSum):
            moment = total.finish(predictor.count)
            if moment is None:
                silent.append(total.layer.name)
            if moment is None or tied:
                loose |= positions
            else:
                placed.append(place_scale(total.layer, moment))
            continue
        layer, pair = total.layer, total.finish(predictor.count)
        if pair is None:
            silent.append(layer.name)
            loose |= positions
            continue
        A, G = pair
        if not tied:
            block = KroneckerBlock(A, G, total.diagonal_A, total.diagonal_G)
            placed.append(place_kronecker(layer, block))
            continue
        for local, i in layer.own:
            if local != "weight" or A.dim() > 2:
                loose.add(i)
            else:
                bias = len(layer.own) > 1
                weight_A = (A[:-1] if A.dim() == 1 else A[:-1, :-1]) if bias else A
                shared[i].append((layer, weight_A, G))
    for i, terms in shared.items():
        one = place_tied(i, predictor.values[i], terms) if terms and i not in loose else None
        if one is None:
            loose.add(i)
        else:
            placed.append(one)
            notes.append(
                f"tied weights {one.name}: one block, the nearest Kronecker product of the sum "
                "over uses"
            )
    # A layer that never ran doesn't loosen a parameter to which another layer has given a block.
    covered = {i for block in placed for i in block.positions}
    loose -= covered
    diagonal = ""
    if loose:
        order = sorted(loose)
        values = _diagonal(predictor, columns, order)
        placed += [
            place_diagonal(predictor.names[i], i, v) for i, v in zip(order, values, strict=True)
        ]
        names = ", ".join(predictor.names[i] for i in order)
        diagonal = f"no Kronecker rule applies to {names}: diagonal blocks there"
        notes.append(diagonal)
    if silent:
        notes.append(
            "modules never called in the forward pass, or without effect on the outputs: "
            f"{', '.join(silent)}"
        )
    return Estimate(placed, notes, diagonal)


def _diagonal(predictor: Predictor, columns: Columns, positions: Sequence[int]) -> list[Tensor]:
    """Diagonal of F for some parameters, example by example: exact for one loss term each, else
    unbiased by the signs."""
    single = one_by_one(predictor)
    values = [predictor.values[i] for i in positions]
    totals = [torch.zeros_like(v, dtype=factors.working_dtype(v.dtype)) for v in values]
    for number, (part, f, leaves) in enumerate(single.graphs()):
        ends = [leaves[i] for i in positions]
        for grads in pull_back(f, columns.at(number, part, f), ends, [e.numel() for e in ends]):
            for total, g in zip(totals, grads, strict=True):
                if g is not None:
                    total += g.square().sum(0)
    return [total / predictor.count for total in totals]


def _correct(result: Estimate, plan: Cover, predictor: Predictor, columns: Columns) -> None:
    """Replace each untied layer's Kronecker block by its eigenvalue-corrected one (George et al.
    2018)."""
    bases = {one.name: one.block for one in result.blocks if isinstance(one.block, KroneckerBlock)}
    layers = {
        layer.name: layer
        for layer in plan.layers
        if isinstance(layer, KroneckerLayer) and layer.name in bases
    }
    totals: dict[str, Tensor] = {}
    for samples, grads in _visits(predictor, columns, list(layers.values())):
        if grads is None:
            continue
        layer = layers[samples.layer.name]
        basis = bases[layer.name]
        if samples.projected is None:
            samples.projected = projected_inputs(layer, basis, _joined_inputs(layer, samples.calls))
        gradients = _joined_gradients(layer, samples.calls, grads)
        squares = _squares(layer, basis, samples.projected, gradients)
        known = totals.get(layer.name)
        totals[layer.name] = squares if known is None else known.add_(squares)
    result.blocks = [
        replace(
            one,
            block=EigenvalueCorrectedBlock(bases[one.name], totals[one.name] / predictor.count),
        )
        if one.name in totals
        else one
        for one in result.blocks
    ]


def projected_squares(
    layer: KroneckerLayer, basis: KroneckerBasis, inputs: Tensor, gradients: Tensor
) -> Tensor:
    """``Σ_n (U_Gᵀ (Σ_r g_r a_rᵀ) U_A)²`` (…, out, in) from a layer's samples: n inputs, K·n
    gradients."""
    return _squares(layer, basis, projected_inputs(layer, basis, inputs), gradients)


def projected_inputs(layer: KroneckerLayer, basis: KroneckerBasis, inputs: Tensor) -> Tensor:
    """Input samples, bias column included, in the eigenbasis of A; indices and absent weights stay
    as they are."""
    if layer.rule.one_hot or not layer.covers("weight"):
        return inputs
    bias = layer.covers("bias")
    if basis.A.diagonal:
        ones = inputs.new_ones(*inputs.shape[:-1], 1)
        return torch.cat([inputs, ones], dim=-1) if bias else inputs
    axes = _aligned(basis.A.spectrum.basis)
    return (inputs @ axes[..., :-1, :]).add_(axes[..., -1:, :]) if bias else inputs @ axes


def _squares(layer: KroneckerLayer, basis: KroneckerBasis, a: Tensor, gradients: Tensor) -> Tensor:
    g = gradients if basis.G.diagonal else gradients @ _aligned(basis.G.spectrum.basis)
    if layer.rule.one_hot:
        indices = a.repeat(len(g) // len(a), 1)
        return factors.squared_one_hot_gradients(indices, g, layer.shape[2])
    if not layer.covers("weight"):
        return g.sum(-2).square().sum(-2).unsqueeze(-1)
    first, *rest = g.split(a.shape[-3], dim=-3)
    total = factors.squared_example_gradients(a, first)
    for piece in rest:
        total.add_(factors.squared_example_gradients(a, piece))
    return total


def _aligned(basis: Tensor) -> Tensor:
    """A basis (…, k, k) with an axis of examples to broadcast over."""
    return basis if basis.dim() == 2 else basis.unsqueeze(-3)
