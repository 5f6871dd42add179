"""The Kronecker-factored metric in training: running factors from the ordinary passes, refreshed in
turn (theory §7).

A step pays for: the captures of the layers whose turn it is (a sample of rows of one ordinary
backward pass), their inverses, and for all layers two small products, F_λ⁻¹g. The length of the
update, momentum included, costs inner products only (`CarriedMomentum`).
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.fisher.kronecker.uses import UsedRule
from thermo_opt.models import repeated, tensors_in
from thermo_opt.optim.forward_pass import ForwardPass
from thermo_opt.optim.hooks import StepByStep, after_forward, on_gradient, on_node_gradient
from thermo_opt.optim.kronecker.agreement import agreed
from thermo_opt.optim.kronecker.blocks import LayerBlock, ParameterBlock, UnruledBlock
from thermo_opt.optim.kronecker.cholesky import all_finite, total
from thermo_opt.optim.kronecker.inverses import BlockInverse, invert
from thermo_opt.optim.kronecker.layout import BlockLayout
from thermo_opt.optim.kronecker.matrix import MatrixBlock
from thermo_opt.optim.kronecker.refresh import LEAST, RefreshSchedule, default_damping
from thermo_opt.optim.sharding import own_part, part_like, whole
from thermo_opt.optim.training_metric import (
    Gradients,
    Setup,
    StepInputs,
    StepLengths,
    TrainingMetric,
    UpdateRule,
)

if TYPE_CHECKING:
    from thermo_opt.optim.metrics import KFAC


REPORTED = ("refreshed", "refresh_seconds", "solver_failures", "damping")
"""What `NGDT.last_step` holds of this metric, beside the rank."""


class KroneckerMetric(TrainingMetric):
    """Running K-FAC or EKFAC factors of a model, diagonal where no layer rule applies.

    With ``fisher_type="empirical"`` the factors are read from the user's own backward pass, with
    "mc" from one more forward and backward pass on refresh steps, with labels drawn from the model.
    A block belongs to the pool of its first parameter.
    """

    reads_gradients = True

    def __init__(self, kind: str, setup: Setup, options: KFAC) -> None:
        self.kind, self.setup, self.options = kind, setup, options
        self.eta_null = options.eta_null if options.inverse == "pseudo+null" else 0.0
        staggered = options.fisher_type == "empirical" and not setup.compiled
        self.schedule = RefreshSchedule(options.max_refresh_interval, staggered=staggered)
        self.layout = BlockLayout(setup, options)
        self.layout.warn_of_unruled(stacklevel=4)
        self.failures = 0
        self.damping = LEAST
        self._hooks: list[tuple[Any, RemovableHandle]] = []
        self._step, self._urgent = 0, False
        self._turn: list[ParameterBlock] = []
        self._moved: list[tuple[ParameterBlock, Tensor | None]] = []
        self._rule = UpdateRule(0.0, [], [])
        self._still: set[int] = set()
        self._report: dict[str, float | None] = dict.fromkeys(REPORTED)

    @property
    def blocks(self) -> list[ParameterBlock]:
        """The blocks, in the order in which they take turns."""
        return self.layout.blocks

    @property
    def unruled(self) -> set[int]:
        alone = [block for block in self.blocks if isinstance(block, UnruledBlock)]
        return {i for block in alone for i in block.places if i is not None}

    def rebuild(self, setup: Setup) -> None:
        layout = BlockLayout(setup, self.options)
        layout.adopt(self.layout)
        self.setup, self.layout = setup, layout
        self._turn = [block for block in self._turn if block in self.blocks]

    # ---- before the passes

    @property
    def hooked(self) -> bool:
        return bool(self._turn)

    def arm(self, step: int, urgent: bool = False) -> None:
        self._step, self._urgent = step, urgent
        self._turn = self._due(step)
        if self.options.fisher_type == "empirical":
            self._attach()

    def _due(self, step: int) -> list[ParameterBlock]:
        """The blocks whose turn it is; one without curvature always has its turn."""
        count = len(self.blocks)
        return [
            block
            for i, block in enumerate(self.blocks)
            if self._urgent or block.inverse is None or self.schedule.due(step, i, count)
        ]

    def _attach(self) -> None:
        self._detach()
        recurrent = set()
        for block in self._turn:
            if isinstance(block, LayerBlock):
                for place, layer in enumerate(block.layers):
                    if isinstance(layer.watched, nn.RNNBase):
                        recurrent.add(layer.watched)
                    call = _LayerCalls(block, place, self._step)
                    self._hooks.append((call, after_forward(layer.watched, call.on_forward)))
        for module in recurrent:
            one = StepByStep()
            self._hooks += [(one, handle) for handle in one.attach(module)]

    def _detach(self) -> None:
        for _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    # ---- from captures to inverses

    def update(self, gradients: Gradients, seen: StepInputs, damping: float | None) -> None:
        start = time.perf_counter()
        self._detach()
        terms = seen.terms / seen.scale**2
        if self.options.fisher_type == "mc" and seen.last is not None and self._turn:
            terms = self._sample(seen.last)
        everywhere = self.setup.processes.total([terms])[0]
        found = self._captured(gradients, terms, everywhere)
        self.setup.processes.average([t for _, captured in found for t in captured])
        refreshed: list[ParameterBlock] = []
        sums = _floats([total(captured) for _, captured in found])
        for (block, captured), known in zip(found, map(math.isfinite, sums), strict=True):
            if known:
                block.update(captured)
                refreshed.append(block)
            else:
                block.discard()
                self.failures += 1
        refreshed += self._replace_uncalled([block for block, _ in found], gradients, everywhere)
        if damping is not None:
            self.damping = damping
        elif refreshed:
            self._adapt_damping(refreshed, seen.terms)
        self._refresh(refreshed)
        count = float(sum(block.layer_count for block in refreshed))
        spent = time.perf_counter() - start
        reported = (count, spent, float(self.failures), self.damping)
        self._report = dict(zip(REPORTED, reported, strict=True))

    def _captured(
        self, gradients: Gradients, terms: float, everywhere: float
    ) -> list[tuple[ParameterBlock, list[Tensor]]]:
        """The blocks whose turn it was and that saw something, on this process or another, with
        what they captured; none where no prediction took part in the loss. ``terms``: of this
        process; ``everywhere``: of all."""
        found: list[tuple[ParameterBlock, list[Tensor]]] = []
        if not terms:
            self.discard()
        for block in self._turn if everywhere else []:
            if isinstance(block, UnruledBlock):  # of gradients that average over all processes
                if block.own(gradients):
                    block.see(block.gather(gradients))
                captured = block.captured(everywhere)
            else:
                captured = block.captured(terms)
            if captured is not None:
                found.append((block, captured))
        if self.setup.processes.count > 1:
            found = agreed(self.setup.processes, self._turn, found)
        return self.layout.decide(found) if found and not self.layout.decided else found

    def _sample(self, forward: ForwardPass) -> float:
        """One more pass on the step's inputs with labels drawn from the model; the factors see that
        one. Returns its number of loss terms."""
        self._attach()
        model, likelihood = forward.module, self.setup.likelihood
        with torch.enable_grad(), repeated(model), forward.precision():
            f = likelihood.outputs(forward.predictions(model(*forward.args, **forward.kwargs)))
            nll = likelihood.nll(f, likelihood.sample(f.detach()))
            if others := forward.others:
                noise = f.detach()[:, others] + torch.randn_like(f[:, others])
                nll[:, others] = 0.5 * (f[:, others] - noise).square().sum(-1)
            trained = [p for p in self.setup.params if p.requires_grad]
            torch.autograd.grad(nll.mean(), trained, allow_unused=True)
        self._detach()
        return float(nll.numel())

    def _replace_uncalled(
        self, seen: Sequence[ParameterBlock], gradients: Gradients, terms: float
    ) -> list[UnruledBlock]:
        """Give a layer whose parameters have gradients although it was never called a diagonal
        metric; returns the new blocks."""
        lost = []
        for block in self.blocks:
            if block not in self._turn or block in seen or isinstance(block, UnruledBlock):
                continue
            if block.inverse is not None:
                continue
            if any(average.count for average in block.averages()):
                continue
            own = block.own(gradients)
            if any(bool(g.any()) for g in own) and all_finite(*own):
                lost.append(block.name)
        if not lost:
            return []
        warnings.warn(
            f"{', '.join(lost)}: gradients arrive, but the module's own forward was never seen, or "
            "uses them in a way that no layer rule knows; a diagonal metric is used",
            stacklevel=5,
        )
        fresh = self.layout.replace(lost)
        for block in fresh:
            block.see(block.gather(gradients))
            block.update(block.captured(terms) or [])
        return fresh

    def _adapt_damping(self, refreshed: Sequence[ParameterBlock], terms: float) -> None:
        """λ for the curvature there is now (`default_damping`), where the predictions of this
        process's passes, ``terms``, were counted."""
        predictions = self.setup.processes.mean(terms) * self.setup.processes.count
        if predictions == 0:
            return
        traces = {
            block: trace
            for block in self.blocks
            if (block.total is None or block in refreshed) and (trace := block.trace()) is not None
        }
        for block, value in zip(traces, _floats(list(traces.values())), strict=True):
            block.total = value
        known = [(block, block.total) for block in self.blocks if block.total is not None]
        size = sum(p.numel() for block, _ in known for p in block.params)
        whole_trace = sum(total for _, total in known)
        self.damping = default_damping(whole_trace, size, predictions, self.prior)

    def _refresh(self, blocks: Sequence[ParameterBlock]) -> None:
        """Make the inverses of these blocks, each on one process, and send them to all."""
        processes = self.setup.processes
        for job, block in enumerate(blocks):
            mine = processes.mine(job)
            block.refresh(self.damping, compute=mine)
            if mine:
                invert(block.damped)
        processes.hand_out([block.broadcastable() for block in blocks])
        for block in blocks:
            block.finish(processes.average)
            block.momentum.stale = True
            if block.inverse is not None and block.inverse.notes:
                self.failures += 1

    # ---- the step

    def direction(self, gradients: Gradients, rule: UpdateRule) -> StepLengths:
        self._rule, self._still = rule, {i for i, g in enumerate(gradients) if g is None}
        mu = rule.momentum
        if not _finite(gradients):  # momentum stays untouched
            return StepLengths.unknown()
        active: list[_Active] = []
        products: list[Tensor] = []
        for block in self.blocks:
            if block.inverse is None or not block.own(gradients):
                continue
            momentum, w, mask = block.momentum, self._decay_of(block), block.mask(gradients)
            momentum.begin(block.inverse, w)
            g, null = self._split(block.inverse, block.gather(gradients))
            products += momentum.inner_products(g, w)
            block.rest()
            products.append(momentum.accumulate(block.inverse, g, mu, mask))
            active.append(_Active(block, block.inverse, null, w, mask))
        numbers = _floats(products)
        if not all(map(math.isfinite, numbers)):  # an overflow: this momentum is of no more use
            for one in active:
                one.block.momentum.vector = None
            return StepLengths.unknown()
        pools = max(self.setup.pools) + 1
        lengths = StepLengths(*([0.0] * pools for _ in range(4)))
        for k, one in enumerate(active):
            along, across, after = numbers[3 * k : 3 * k + 3]
            of_block = one.block.momentum.finish(
                one.inverse, one.w, mu, (along, across), after, one.mask
            )
            first = next(i for i in one.block.places if i is not None)
            pool, weight = self.setup.pools[first], rule.weights[first]
            lengths.a[pool] += weight * weight * of_block.a
            lengths.delta[pool] += of_block.delta
            lengths.decrease[pool] += weight * of_block.decrease
            lengths.along[pool] += weight * of_block.along
        self._moved = [(one.block, one.null) for one in active]
        return lengths

    def _split(self, inverse: BlockInverse, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what the natural gradient is taken of, the part of g in the null space if wanted)."""
        null = None
        if self.options.inverse == "pseudo+null":
            null = inverse.null(g)
            g = g - null
        return (g.float() if g.dtype.itemsize < 4 else g), null

    def _decay_of(self, block: ParameterBlock) -> Tensor | None:
        """w, the weight-decay direction of a block, or None where nothing decays."""
        rates = [
            0.0 if i is None or i in self._still else self._rule.decay[i] for i in block.places
        ]
        if not any(rates):
            return None
        own = [whole(p.detach()) for p in block.params]
        if len(set(rates)) == 1:
            return rates[0] * block.coordinates.gather(own)
        return block.coordinates.gather([r * p for r, p in zip(rates, own, strict=True)])

    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        rule, pools = self._rule, self.setup.pools
        moves: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        shrinks: dict[float, list[Tensor]] = {}

        def move(p: Tensor, along: Tensor, size: float) -> None:
            params, directions = moves.setdefault(size, ([], []))
            part = part_like(along, p)
            params.append(own_part(p))
            directions.append(part if part.dtype == p.dtype else part.to(p.dtype))

        for block, null in self._moved:
            parts = block.scattered_momentum()
            nulls: Sequence[Tensor | None] = [None] * len(parts)
            if null is not None and null_size:
                nulls = block.coordinates.scatter(null)
            for p, i, part, lost in zip(block.params, block.places, parts, nulls, strict=True):
                if i is None or i in self._still:
                    continue
                size = sizes[pools[i]] * rule.weights[i]
                if rule.decay[i]:
                    shrinks.setdefault(1 - size * rule.decay[i], []).append(own_part(p))
                move(p, part, size * rule.share)
                if lost is not None:
                    move(p, lost, null_size * rule.weights[i])
        for kept, params in shrinks.items():
            torch._foreach_mul_(params, kept)
        for size, (params, directions) in moves.items():
            torch._foreach_add_(params, directions, alpha=-size)

    def retrace(self, sizes: Sequence[float], rule: UpdateRule) -> None:
        self._rule = rule
        self._moved = [(b, None) for b in self.blocks if b.momentum.vector is not None]
        self.apply([-size for size in sizes], 0.0)

    # ---- housekeeping

    def discard(self) -> None:
        for block in self.blocks:
            block.discard()

    def close(self) -> None:
        self._detach()

    def diagnostics(self) -> dict[str, float | None]:
        ranks = [None if b.inverse is None else b.inverse.rank for b in self.blocks]
        known = [r for r in ranks if r is not None]
        complete = self.options.spectral and len(known) == len(ranks)
        return {**self._report, "rank": float(sum(known)) if complete else None}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.layout.state_dict(),
            "failures": self.failures,
            "damping": self.damping,
            "still": sorted(self._still),
            "blocks": {block.name: block.state_dict() for block in self.blocks},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layout = BlockLayout(self.setup, self.options)
        self.layout.load_state_dict(state)
        names = {block.name for block in self.blocks}
        if names != set(state["blocks"]):
            different = sorted(names ^ set(state["blocks"]))
            raise InputError(
                f"the saved optimizer state is of another model: {', '.join(different[:5])} on one "
                "side only"
            )
        for block in self.blocks:
            block.load_state_dict(state["blocks"][block.name])
        self.failures, self.damping = int(state["failures"]), float(state["damping"])
        self._still = {int(place) for place in state.get("still", ())}


class _Active(NamedTuple):
    """A block in one step: its inverse, the gradient's null part, weight-decay direction, mask."""

    block: ParameterBlock
    inverse: BlockInverse
    null: Tensor | None
    w: Tensor | None
    mask: Tensor | None


class _LayerCalls:
    """What one layer's hook calls: capture the layer's input and the gradient at its output."""

    def __init__(self, block: LayerBlock, place: int, offset: int) -> None:
        self.block, self.place, self.offset = block, place, offset

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """The layer has been called in a training pass."""
        layer = self.block.layers[self.place]
        module = layer.module
        if [name for name, _ in layer.rule.parameters(module)] != [name for name, _ in layer.own]:
            return  # frozen or unfrozen since: the next step rebuilds the block
        if isinstance(layer.rule, UsedRule):
            self._watch_uses(layer.rule, module, (args, kwargs), output)
            return
        found = layer.rule.read(args, kwargs, module)
        if found is not None:
            x = found.detach()
            on_gradient(output, lambda g: self.block.capture(self.place, x, g, self.offset))

    def _watch_uses(self, rule: UsedRule, module: nn.Module, given: Any, output: Any) -> None:
        block = self.block
        if not isinstance(block, MatrixBlock) or block.options.spectral:
            return
        for use in rule.uses(module, tensors_in(given), tensors_in(output)):
            receive = functools.partial(block.capture_use, self.place, use, offset=self.offset)
            on_node_gradient(use.node, receive)


def _finite(gradients: Gradients) -> bool:
    """Whether no gradient holds a NaN or infinity: one read of each, one transfer."""
    found = [g for g in gradients if g is not None]
    half = [g for g in found if g.dtype.itemsize < 4]  # whose lengths may exceed what they can hold
    norms: list[Tensor] = []
    for same, dtype in (([g for g in found if g.dtype.itemsize >= 4], None), (half, torch.float32)):
        if same:
            norms += torch._foreach_norm(same, 2, dtype=dtype)
    return all(map(math.isfinite, _floats(norms)))


def _floats(numbers: Sequence[Tensor]) -> list[float]:
    """Scalars from the device in one transfer."""
    if len({x.dtype for x in numbers}) > 1:
        numbers = [x.double() for x in numbers]
    values: list[float] = torch.stack(list(numbers)).tolist() if numbers else []
    return values
