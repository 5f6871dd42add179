"""From a model and a batch to the blocks of K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker import factors
from thermo_opt.fisher.kronecker.blocks import EigenvalueCorrectedBlock, KroneckerBlock
from thermo_opt.fisher.kronecker.columns import Columns, one_by_one, pull_back
from thermo_opt.fisher.kronecker.layers import Cover, Layer, Use, cover, recording
from thermo_opt.fisher.kronecker.placement import (
    Placed,
    place_diagonal,
    place_kronecker,
    place_scale,
    place_tied,
)
from thermo_opt.fisher.kronecker.rules import KroneckerRule, ScaleRule
from thermo_opt.fisher.predictor import Predictor

DENSE_SCALES = 1024
"""Most scale and shift parameters of one layer that share a dense block; above it, one small block
a channel."""


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
    setting: str,
    corrected: bool = False,
    max_side: int = 8192,
) -> Estimate:
    """K-FAC's blocks on the predictor's batch; with ``corrected``, EKFAC's (a second pass)."""
    plan = cover(predictor.model, predictor.modules)
    sums = {layer: _sum_for(layer, setting, max_side) for layer in plan.layers}
    for layer, samples, gradients in _visits(predictor, columns, plan.layers):
        if gradients is None:
            sums[layer].add_inputs(samples)
        else:
            sums[layer].add_gradients(samples, gradients)
    result = _blocks(plan, sums, predictor, columns)
    if corrected:
        _correct(result, plan, predictor, columns)
    return result


@dataclass
class _Samples:
    """The uses of one layer in one microbatch, with equal numbers of examples: joined along the
    shared positions."""

    layer: Layer
    uses: list[Use]
    projected: Tensor | None = (
        None  # inputs in the eigenbasis of A, made once for all pieces of gradients
    )

    def inputs(self) -> Tensor:
        rule, module = self.layer.rule, self.layer.module
        assert isinstance(rule, KroneckerRule)
        if not rule.covers(module, "weight"):
            return self.uses[0].input()
        parts = [rule.inputs(module, use.input()) for use in self.uses]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1 if rule.one_hot else -2)

    def moment(self, setting: str, diagonal: bool) -> factors.Moment:
        """Their sum for the input factor."""
        rule, module = self.layer.rule, self.layer.module
        assert isinstance(rule, KroneckerRule)
        if len(self.uses) == 1:
            return factors.input_moment(
                rule, module, self.uses[0].input(), setting, diagonal=diagonal
            )
        return factors.samples_moment(rule, module, self.inputs(), setting, diagonal=diagonal)

    def gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """(…, K·n, r, out) from one (K, …) gradient a use."""
        rule, module = self.layer.rule, self.layer.module
        assert isinstance(rule, KroneckerRule)
        parts = []
        for use, g in zip(self.uses, grads, strict=True):
            x = use.x.repeat(len(g), *[1] * (use.x.dim() - 1)) if rule.one_hot else use.x
            parts.append(rule.gradients(module, x, g.flatten(0, 1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _visits(
    predictor: Predictor, columns: Columns, layers: Sequence[Layer]
) -> Iterator[tuple[Layer, _Samples, list[Tensor] | None]]:
    """For every microbatch and layer: its samples once with None, then with each piece of output
    gradients (K, …)."""
    with recording(layers) as uses:
        for number, (part, f, _) in enumerate(predictor.graphs(once=columns.single)):
            groups = _grouped(uses)
            for samples in groups:
                yield samples.layer, samples, None
            ordered = [use for samples in groups for use in samples.uses]
            ends, sizes = [use.output for use in ordered], [use.size for use in ordered]
            for grads in pull_back(f, columns.at(number, part, f), ends, sizes) if ordered else ():
                rest = iter(grads)
                for samples in groups:
                    own = [next(rest) for _ in samples.uses]
                    # A call whose result the outputs don't depend on has no gradient and no share
                    # in F.
                    kept = [
                        (use, g) for use, g in zip(samples.uses, own, strict=True) if g is not None
                    ]
                    if kept:
                        whole = len(kept) == len(own)
                        alive = (
                            samples if whole else _Samples(samples.layer, [use for use, _ in kept])
                        )
                        yield samples.layer, alive, [g for _, g in kept]
            uses.clear()  # also of what a checkpointed layer recomputed during the backward pass


def _grouped(uses: Sequence[Use]) -> list[_Samples]:
    groups: dict[tuple[str, int], _Samples] = {}
    for use in uses:
        key = (use.layer.name, use.x.shape[0] if use.x.dim() else 1)
        groups.setdefault(key, _Samples(use.layer, [])).uses.append(use)
    return list(groups.values())


class _KroneckerSum:
    """Running sums of a layer's A and G; a side wider than ``max_side`` keeps its diagonal only."""

    def __init__(self, layer: Layer, rule: KroneckerRule, setting: str, max_side: int) -> None:
        self.layer, self.rule, self.setting = layer, rule, setting
        _, out, inputs = rule.shape(layer.module)
        self.diagonal_A, self.diagonal_G = rule.one_hot or inputs > max_side, out > max_side
        self.A: factors.Moment | None = None
        self.G: Tensor | None = None

    def add_inputs(self, samples: _Samples) -> None:
        moment = samples.moment(self.setting, self.diagonal_A)
        if self.A is None:
            self.A = moment
        else:
            self.A.add(moment)

    def add_gradients(self, samples: _Samples, grads: list[Tensor]) -> None:
        setting = "expand" if self.rule.one_hot else self.setting
        rows = factors.flatten(samples.gradients(grads), setting, mean=False)
        total = factors.outer(rows, diagonal=self.diagonal_G)
        self.G = total if self.G is None else self.G.add_(total)

    def finish(self, count: int) -> tuple[Tensor, Tensor] | None:
        """A and G; the sums themselves are divided, so this is the end of them."""
        if self.A is None or self.G is None:
            return None
        return self.A.total.div_(self.A.rows), self.G.div_(count)


class _ScaleSum:
    """Running second moment of the per-example gradients of a layer's scale and shift."""

    def __init__(self, layer: Layer, rule: ScaleRule) -> None:
        self.layer, self.rule = layer, rule
        self.parts = len(layer.own)
        size = sum(getattr(layer.module, local).numel() for local, _ in layer.own)
        self.dense = size <= DENSE_SCALES
        self.total: Tensor | None = None

    def add_inputs(self, samples: _Samples) -> None:
        """Nothing to do: the rows need the gradients."""

    def add_gradients(self, samples: _Samples, grads: list[Tensor]) -> None:
        for k in range(len(grads[0])):
            rows = torch.stack(
                [
                    self.rule.rows(self.layer.module, use.input(), g[k])
                    for use, g in zip(samples.uses, grads, strict=True)
                ]
            ).sum(0)
            if self.dense:
                total = factors.outer(rows)
            else:
                per_channel = rows.unflatten(-1, (self.parts, -1))
                total = torch.einsum("npd,nqd->dpq", per_channel, per_channel)
            self.total = total if self.total is None else self.total.add_(total)

    def finish(self, count: int) -> Tensor | None:
        return None if self.total is None else self.total / count


def _sum_for(layer: Layer, setting: str, max_side: int) -> _KroneckerSum | _ScaleSum:
    if isinstance(layer.rule, ScaleRule):
        return _ScaleSum(layer, layer.rule)
    assert isinstance(layer.rule, KroneckerRule)
    return _KroneckerSum(layer, layer.rule, setting, max_side)


def _blocks(
    plan: Cover,
    sums: dict[Layer, _KroneckerSum | _ScaleSum],
    predictor: Predictor,
    columns: Columns,
) -> Estimate:
    placed: list[Placed] = []
    notes: list[str] = []
    loose = set(plan.rest)
    silent: list[str] = []
    shared: dict[int, list[tuple[Layer, Tensor, Tensor]]] = {i: [] for i in plan.tied}
    for layer, total in sums.items():
        done = total.finish(predictor.count)
        if done is None:
            silent.append(layer.name)
            loose.update(i for _, i in layer.own)
        elif isinstance(done, Tensor):
            if any(i in plan.tied for _, i in layer.own):
                loose.update(i for _, i in layer.own)
            else:
                placed.append(place_scale(layer, done))
        else:
            assert isinstance(total, _KroneckerSum)
            A, G = done
            tied = [(local, i) for local, i in layer.own if i in plan.tied]
            if not tied:
                placed.append(
                    place_kronecker(layer, KroneckerBlock(A, G, total.diagonal_A, total.diagonal_G))
                )
                continue
            for local, i in layer.own:
                if local != "weight" or A.dim() > 2:
                    loose.add(i)
                else:
                    bias = len(layer.own) > 1
                    weight_A = (A[:-1] if A.dim() == 1 else A[:-1, :-1]) if bias else A
                    shared[i].append((layer, weight_A, G))
    for i, terms in shared.items():
        block = place_tied(i, predictor.values[i], terms) if terms and i not in loose else None
        if block is None:
            loose.add(i)
        else:
            placed.append(block)
            notes.append(
                f"tied weights {block.name}: one block, the nearest Kronecker product of the sum "
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
    places = {
        placed.name: n
        for n, placed in enumerate(result.blocks)
        if isinstance(placed.block, KroneckerBlock)
    }
    layers = [layer for layer in plan.layers if layer.name in places]
    totals: dict[str, Tensor] = {}
    for layer, samples, grads in _visits(predictor, columns, layers):
        if grads is None:
            continue
        block = result.blocks[places[layer.name]].block
        assert isinstance(block, KroneckerBlock)
        if samples.projected is None:
            samples.projected = projected_inputs(layer, block, samples.inputs())
        squares = _squares(layer, block, samples.projected, samples.gradients(grads))
        totals[layer.name] = (
            squares if layer.name not in totals else totals[layer.name].add_(squares)
        )
    for name, total in totals.items():
        old = result.blocks[places[name]]
        assert isinstance(old.block, KroneckerBlock)
        block = EigenvalueCorrectedBlock(old.block, total / predictor.count)
        result.blocks[places[name]] = Placed(name, block, old.positions, old.gather, old.scatter)


def projected_squares(
    layer: Layer, block: KroneckerBlock, inputs: Tensor, gradients: Tensor
) -> Tensor:
    """``Σ_n (U_Gᵀ (Σ_r g_r a_rᵀ) U_A)²`` (…, out, in) from a layer's samples: n inputs, K·n
    gradients."""
    return _squares(layer, block, projected_inputs(layer, block, inputs), gradients)


def projected_inputs(layer: Layer, block: KroneckerBlock, inputs: Tensor) -> Tensor:
    """Input samples, bias column included, in the eigenbasis of A; indices and absent weights stay
    as they are."""
    rule, module = layer.rule, layer.module
    assert isinstance(rule, KroneckerRule)
    if rule.one_hot or not rule.covers(module, "weight"):
        return inputs
    bias = rule.covers(module, "bias")
    if block.A.diagonal:
        return (
            torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1) if bias else inputs
        )
    basis = _aligned(block.A.spectrum.basis)
    return (inputs @ basis[..., :-1, :]).add_(basis[..., -1:, :]) if bias else inputs @ basis


def _squares(layer: Layer, block: KroneckerBlock, a: Tensor, gradients: Tensor) -> Tensor:
    rule, module = layer.rule, layer.module
    assert isinstance(rule, KroneckerRule)
    g = gradients if block.G.diagonal else gradients @ _aligned(block.G.spectrum.basis)
    if rule.one_hot:
        return factors.squared_one_hot_gradients(
            a.repeat(len(g) // len(a), 1), g, rule.shape(module)[2]
        )
    if not rule.covers(module, "weight"):
        return g.sum(-2).square().sum(-2).unsqueeze(-1)
    total = None
    for piece in g.split(a.shape[-3], dim=-3):
        squares = factors.squared_example_gradients(a, piece)
        total = squares if total is None else total.add_(squares)
    assert total is not None
    return total


def _aligned(basis: Tensor) -> Tensor:
    """A basis (…, k, k) with an axis of examples to broadcast over."""
    return basis if basis.dim() == 2 else basis.unsqueeze(-3)
