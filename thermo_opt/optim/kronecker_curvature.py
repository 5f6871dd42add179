"""The Kronecker-factored metric in training: running factors from the ordinary passes, refreshed in
turn (THEORY §7).

A step pays for: the captures of the layers whose turn it is (a subsample of rows of one ordinary
backward pass), their inverses, and for all layers two small products, F_λ⁻¹g. The length of the
update, momentum included, needs inner products only: with b' = μb + F_λ⁻¹g,

    b'ᵀF_λb' = μ² bᵀF_λb + 2μ gᵀb + gᵀF_λ⁻¹g

exactly, while F_λ stays; a refreshed block's bᵀF_λb is computed anew. The last product adds to μb
in place, and gᵀF_λ⁻¹g follows from gᵀb' and gᵀb.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.fisher.kronecker import KroneckerRule, ScaleRule
from thermo_opt.fisher.kronecker.layers import Cover, Layer, cover
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.models import outputs_of, repeated
from thermo_opt.optim.curvature import Curvature, Lengths, Passes, Recipe
from thermo_opt.optim.damping import LEAST, damping_of
from thermo_opt.optim.distributed import Processes
from thermo_opt.optim.inverse import all_finite
from thermo_opt.optim.kronecker_unit import KroneckerUnit, TiedUnit
from thermo_opt.optim.observer import Forward, Tap, attach, on_gradient
from thermo_opt.optim.schedule import Refresh
from thermo_opt.optim.solvers import Solver, invert
from thermo_opt.optim.units import DiagonalUnit, LayerUnit, ScaleUnit, Settings, Unit

SIDES = (1024, 512, 256, 128)
"""Sides to which wide factors may be cut (block-diagonal factors) where solving with whole ones
would slow training."""

STACK = 8
"""Most layers of one shape that are stacked to one unit."""

_UNKNOWN = -1


def make_units(model: nn.Module, plan: Cover, settings: Settings) -> list[Unit]:
    """One unit a layer, one a weight that layers share, and a diagonal one for each parameter
    without a rule."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    units: list[Unit] = []
    rest = set(plan.rest)
    shared: dict[int, list[Layer]] = {}
    for layer in plan.layers:
        own = [i for _, i in layer.own]
        if not plan.tied.intersection(own):
            params = [trainable[i][1] for i in own]
            kind = ScaleUnit if isinstance(layer.rule, ScaleRule) else KroneckerUnit
            units.append(kind([layer], params, settings))
            continue
        for local, i in layer.own:
            if i in plan.tied and local == "weight" and isinstance(layer.rule, KroneckerRule):
                shared.setdefault(i, []).append(layer)
            else:
                rest.add(i)
    for i, layers in shared.items():
        rest.discard(i)
        units.append(TiedUnit(layers, trainable[i][1], settings))
    units += [DiagonalUnit(trainable[i][0], [trainable[i][1]], settings) for i in sorted(rest)]
    return units


class KroneckerCurvature(Curvature):
    """Running K-FAC or EKFAC factors of a model, diagonal where no layer rule applies.

    ``groups`` and ``pools``: numbers of the parameter group and the pool of each of ``params``; a
    unit belongs to the pool of its first parameter. ``targets``: "empirical" reads the factors from
    the user's own backward pass, "sampled" runs one more forward and backward pass with labels
    drawn from the model on refresh steps. Layers of one shape that the first step sees are stacked
    to one unit.
    """

    def __init__(
        self,
        model: nn.Module,
        params: list[nn.Parameter],
        groups: Sequence[int],
        pools: Sequence[int],
        likelihood: Likelihood,
        settings: Settings,
        refresh: Refresh,
        targets: str,
        processes: Processes,
    ) -> None:
        if targets not in ("empirical", "sampled"):
            raise InputError(f"targets must be 'empirical' or 'sampled', got {targets!r}")
        self.model, self.params, self.likelihood = model, params, likelihood
        self.settings, self.schedule, self.processes = settings, refresh, processes
        self.sampled = targets == "sampled"
        self._place = {id(p): i for i, p in enumerate(params)}
        self._groups, self._pools, self._pool_count = list(groups), list(pools), max(pools) + 1
        plan = cover(model)
        self.units = self._placed(make_units(model, plan, settings))
        if plan.unruled:
            named = ", ".join(
                f"{name or 'the model itself'} ({kind})" for name, kind in plan.unruled
            )
            warnings.warn(
                f"no layer rule for {named}: a diagonal metric is used for their own parameters "
                "(thermo_opt.fisher.kronecker.register adds a rule)",
                stacklevel=4,
            )
        self._handles: list[RemovableHandle] = []
        self._offset, self._urgent = 0, False
        self._turn: list[int] = []
        self._limit: int | None = _UNKNOWN
        self._directions: list[tuple[Unit, Tensor | None]] = []
        self._recipe = Recipe(0.0, [], [], False)
        self._fallback: list[str] = []
        self._stacks: list[list[str]] = []
        self._report: dict[str, float | None] = {}
        self.failures = 0
        self.damping = LEAST

    # ---- capture

    def due(self, step: int) -> list[int]:
        """Numbers of the units whose turn it is; one that has no curvature yet always has its
        turn."""
        count = len(self.units)
        return [
            i
            for i, u in enumerate(self.units)
            if self._urgent or u.solver is None or self.schedule.due(step, i, count)
        ]

    @property
    def hooked(self) -> bool:
        return bool(self._turn)

    def arm(self, step: int, urgent: bool = False) -> None:
        self._offset, self._urgent = step, urgent
        self._turn = self.due(step)
        if not self.sampled:
            self._attach(self._turn)

    def _attach(self, numbers: Sequence[int]) -> None:
        self._detach()
        for i in numbers:
            unit = self.units[i]
            if isinstance(unit, LayerUnit):
                for place, layer in enumerate(unit.layers):
                    self._handles.append(attach(layer.module, Tap(self, "saw", (unit, place))))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def saw(
        self,
        where: tuple[LayerUnit, int],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Called by a layer's tap in a training forward pass."""
        unit, place = where
        x = (args[0] if args else kwargs["input"]).detach()
        on_gradient(output, lambda g: unit.capture(place, x, g, self._offset))

    # ---- update

    def update(self, gradients: Sequence[Tensor], passes: Passes, damping: float | None) -> None:
        start = time.perf_counter()
        self._detach()
        terms = (passes.terms or 1.0) / passes.scale**2
        if self.sampled and passes.last is not None:
            terms = self._sample(self._turn, passes.last)
        found: list[tuple[Unit, list[Tensor]]] = []
        for unit in [self.units[i] for i in self._turn]:
            if isinstance(unit, DiagonalUnit):
                unit.see(gradients[self._place[id(unit.params[0])]])
            observed = unit.observed(terms)
            if observed is not None:
                found.append((unit, observed))
        if self._limit is _UNKNOWN and found:
            found = self._stack(self._divide(found))
        self.processes.average([t for _, observed in found for t in observed])
        refreshed = []
        for unit, observed in found:
            if all_finite(*observed):
                unit.fold(observed)
                refreshed.append(unit)
            else:
                unit.discard()
                self.failures += 1
        refreshed += self._fall_back([unit for unit, _ in found], gradients, terms)
        if damping is not None:
            self.damping = damping
        elif refreshed:
            self._adapt_damping(refreshed, passes.terms)
        for job, unit in enumerate(refreshed):
            unit.refresh(self.damping, compute=self.processes.mine(job))
        for job, unit in enumerate(refreshed):
            if self.processes.mine(job):
                invert(unit.damped)
        self.processes.hand_out([unit.shared() for unit in refreshed])
        for unit in refreshed:
            unit.finish(self.processes.average)
            unit.stale = True
            if unit.solver is not None and unit.solver.notes:
                self.failures += 1
        self._report = {
            "refreshed": float(
                sum(len(u.layers) if isinstance(u, LayerUnit) else 1 for u in refreshed)
            ),
            "refresh_seconds": time.perf_counter() - start,
            "solver_failures": float(self.failures),
            "damping": self.damping,
        }

    def _adapt_damping(self, refreshed: Sequence[Unit], terms: float) -> None:
        """λ for the curvature there is now (`damping_of`), where the predictions of this process's
        passes, ``terms``, were counted."""
        predictions = self.processes.mean(terms) * self.processes.count
        if predictions == 0:
            return
        found = {
            unit: trace
            for unit in self.units
            if (unit.total is None or unit in refreshed) and (trace := unit.trace()) is not None
        }
        for unit, total in zip(found, _floats(list(found.values())), strict=True):
            unit.total = total
        known = [unit for unit in self.units if unit.total is not None]
        size = sum(p.numel() for unit in known for p in unit.params)
        self.damping = damping_of(sum(unit.total or 0.0 for unit in known), size, predictions)

    def _divide(self, found: list[tuple[Unit, list[Tensor]]]) -> list[tuple[Unit, list[Tensor]]]:
        """Choose, once, the largest side of a block such that solving stays within
        `Settings.overhead` of the passes' work."""
        blocks = [u for u in self.units if isinstance(u, KroneckerUnit)]
        limit: int | None = None
        for limit in (None, *SIDES):
            work = [u.work(limit) for u in blocks]
            if sum(s for _, s in work) <= self.settings.overhead * sum(p for p, _ in work):
                break
        self._set_limit(limit)
        return [(u, u.cut(limit, t) if isinstance(u, KroneckerUnit) else t) for u, t in found]

    def _set_limit(self, limit: int | None) -> None:
        self._limit = limit
        for unit in self.units:
            if isinstance(unit, KroneckerUnit):
                unit.cut(limit)

    def _stack(self, found: list[tuple[Unit, list[Tensor]]]) -> list[tuple[Unit, list[Tensor]]]:
        """Stack, once, the units of one kind and parameter group that were seen, at most `STACK` at
        a time."""
        alike: dict[tuple[object, ...], list[tuple[Unit, list[Tensor]]]] = {}
        for unit, observed in found:
            kind = unit.kind() if isinstance(unit, LayerUnit) else None
            groups = tuple(None if i is None else self._groups[i] for i in unit.places)
            like = unit.params[0]
            key = (id(unit),) if kind is None else (*kind, groups, like.dtype, like.device)
            alike.setdefault(key, []).append((unit, observed))
        stacked: list[tuple[Unit, list[Tensor]]] = []
        for members in alike.values():
            size = math.ceil(len(members) / math.ceil(len(members) / STACK))
            for part in (members[i : i + size] for i in range(0, len(members), size)):
                unit = part[0][0] if len(part) == 1 else self._join([u.name for u, _ in part])
                stacked.append((unit, [t for _, observed in part for t in observed]))
        return stacked

    def _join(self, names: list[str]) -> Unit:
        """Put a stack of the units of these names in the place of the first."""
        parts = [u for u in self.units if isinstance(u, LayerUnit) and u.name in names]
        whole = parts[0].joined(parts)
        self.units = self._placed(
            [whole if u is parts[0] else u for u in self.units if u not in parts[1:]]
        )
        self._stacks.append(names)
        return whole

    def _sample(self, numbers: Sequence[int], forward: Forward) -> float:
        """One more pass on the step's inputs with labels drawn from the model; the factors see that
        one."""
        if not numbers:
            return 1.0
        self._attach(numbers)
        with torch.enable_grad(), repeated(self.model):
            f = self.likelihood.outputs(outputs_of(self.model(*forward.args, **forward.kwargs)))
            nll = self.likelihood.nll(f, self.likelihood.sample(f.detach()))
            torch.autograd.grad(
                nll.mean(), [p for p in self.params if p.requires_grad], allow_unused=True
            )
        self._detach()
        return float(nll.numel())

    def _fall_back(
        self, seen: Sequence[Unit], gradients: Sequence[Tensor], terms: float
    ) -> list[DiagonalUnit]:
        """Give a layer whose parameters have gradients although the layer was never seen a diagonal
        metric; returns the new units."""
        lost = []
        for unit in self.units:
            if (
                unit.solver is not None
                or not isinstance(unit, LayerUnit)
                or unit in seen
                or any(r.count for r in unit.running())
            ):
                continue
            own = [gradients[j] for j in unit.places if j is not None]
            if any(bool(g.any()) for g in own) and all_finite(*own):
                lost.append(unit.name)
        fresh: list[DiagonalUnit] = []
        if lost:
            warnings.warn(
                f"{', '.join(lost)}: gradients arrive although the module's own forward was never "
                "seen (its weight is used elsewhere); "
                "a diagonal metric is used for it",
                stacklevel=5,
            )
            fresh = self._replace(lost)
            for unit in fresh:
                unit.see(gradients[self._place[id(unit.params[0])]])
                observed = unit.observed(terms)
                assert observed is not None
                unit.fold(observed)
        return fresh

    def _replace(self, names: Sequence[str]) -> list[DiagonalUnit]:
        """Give the units of these names a diagonal metric; returns the new units."""
        units: list[Unit] = []
        fresh: list[DiagonalUnit] = []
        for unit in self.units:
            if unit.name in names and not isinstance(unit, DiagonalUnit):
                own = [
                    DiagonalUnit(f"{unit.name}[{j}]", [p], self.settings)
                    for j, p in enumerate(unit.params)
                ]
                units += own
                fresh += own
                self._fallback.append(unit.name)
            else:
                units.append(unit)
        self.units = self._placed(units)
        return [unit for unit in fresh if unit in self.units]

    def _placed(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that hold parameters of the optimizer, told where in `params` those stand."""
        for unit in units:
            unit.places = [self._place.get(id(p)) for p in unit.params]
        return [unit for unit in units if any(i is not None for i in unit.places)]

    def _measure(self, unit: Unit) -> None:
        """The lengths that `direction` carries along, from scratch in the refreshed metric."""
        if unit.solver is None or unit.momentum is None:
            return
        image = unit.solver.matvec(unit.momentum)
        unit.squared = max(float(torch.dot(unit.momentum.reshape(-1), image.reshape(-1))), 0.0)
        decay = self._decay(unit)
        if decay is not None:
            w = decay.to(image.dtype)
            unit.crossed = float(torch.sum(w * image))
            unit.decayed = max(float(torch.sum(w * unit.solver.matvec(w))), 0.0)

    def _decay(self, unit: Unit) -> Tensor | None:
        """w, the weight-decay direction of a unit, or None where nothing decays."""
        if not self._recipe.decay:
            return None
        rates = [0.0 if i is None else self._recipe.decay[i] for i in unit.places]
        if not any(rates):
            return None
        return unit.gather([rate * p.detach() for rate, p in zip(rates, unit.params, strict=True)])

    # ---- step

    def direction(self, gradients: Sequence[Tensor], recipe: Recipe) -> Lengths:
        self._recipe = recipe
        mu = recipe.momentum
        work: list[tuple[Unit, Solver, Tensor, Tensor | None]] = []
        numbers: list[Tensor] = []  # of each unit: gᵀb (gᵀg where there is no momentum yet), gᵀw
        zero = torch.zeros((), device=self.params[0].device)
        lengths = Lengths(*([0.0] * self._pool_count for _ in range(3)))
        for unit in self.units:
            solver = unit.solver
            if solver is None:
                if not all_finite(*(gradients[i] for i in unit.places if i is not None)):
                    lengths.delta[0] = math.nan
                    return lengths
                continue
            if unit.stale:
                self._measure(unit)
                unit.stale = False
            V = unit.gather(
                [
                    torch.zeros_like(p) if i is None else gradients[i]
                    for i, p in zip(unit.places, unit.params, strict=True)
                ]
            )
            null = None
            if recipe.null:
                null = solver.null(V)  # type: ignore[attr-defined]
                V = V - null
            V = V.float() if V.dtype.itemsize < 4 else V
            flat = V.reshape(-1)
            carried = unit.momentum if mu else None
            numbers.append(torch.dot(flat, flat if carried is None else carried.reshape(-1)))
            decay = self._decay(unit)
            numbers.append(
                zero if decay is None else torch.dot(flat, decay.reshape(-1).to(flat.dtype))
            )
            work.append((unit, solver, V, null))
        before = _floats(numbers)
        if not all(
            map(math.isfinite, before)
        ):  # then some gradient is not finite: momentum stays untouched
            lengths.delta[0] = math.nan
            return lengths
        numbers = []
        for unit, solver, V, _ in work:
            if mu and unit.momentum is not None:
                solver.accumulate(unit.momentum, mu, V)
            else:
                unit.momentum = solver.solve(V)
                unit.squared = unit.crossed = 0.0
                before[2 * len(numbers)] = 0.0
            numbers.append(torch.dot(V.reshape(-1), unit.momentum.reshape(-1)))
        after = _floats(numbers)
        if not all(map(math.isfinite, after)):  # an overflow: this momentum is of no more use
            for unit, *_ in work:
                unit.momentum = None
            lengths.delta[0] = math.nan
            return lengths
        self._directions = []
        for k, (unit, _, _, null) in enumerate(work):
            along, against = before[2 * k : 2 * k + 2]
            delta = max(after[k] - mu * along, 0.0)  # gᵀF_λ⁻¹g = gᵀb' − μ gᵀb
            first = next(i for i in unit.places if i is not None)
            pool, weight = self._pools[first], recipe.weights[first]
            unit.squared = max(mu * mu * unit.squared + 2 * mu * along + delta, 0.0)
            unit.crossed = mu * unit.crossed + against
            if unit.decayed == 0.0 and any(recipe.decay[i] for i in unit.places if i is not None):
                self._measure(unit)
            a = unit.squared + 2 * unit.crossed + unit.decayed
            lengths.a[pool] += weight * weight * max(a, 0.0)
            lengths.delta[pool] += delta
            lengths.decrease[pool] += weight * (after[k] + against)
            self._directions.append((unit, null))
        return lengths

    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        recipe = self._recipe
        moves: dict[float, tuple[list[Tensor], list[Tensor]]] = {}

        def move(p: Tensor, along: Tensor, size: float) -> None:
            params, directions = moves.setdefault(size, ([], []))
            params.append(p)
            directions.append(along if along.dtype == p.dtype else along.to(p.dtype))

        for unit, null in self._directions:
            parts = unit.scattered_momentum()
            nulls = unit.scatter(null) if null is not None and null_size else [None] * len(parts)
            for p, i, part, lost in zip(unit.params, unit.places, parts, nulls, strict=True):
                if i is None:
                    continue
                size = sizes[self._pools[i]] * recipe.weights[i]
                if recipe.decay[i]:
                    p.mul_(1 - size * recipe.decay[i])
                move(p, part, size)
                if lost is not None:
                    move(p, lost, null_size * recipe.weights[i])
        for size, (params, directions) in moves.items():
            torch._foreach_add_(params, directions, alpha=-size)

    # ---- housekeeping

    def discard(self) -> None:
        for unit in self.units:
            unit.discard()

    def close(self) -> None:
        self._detach()

    def diagnostics(self) -> dict[str, float | None]:
        ranks = [getattr(unit.solver, "rank", None) for unit in self.units]
        known = [r for r in ranks if r is not None]
        return {
            **self._report,
            "rank": float(sum(known))
            if self.settings.spectral and len(known) == len(ranks)
            else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "fallback": list(self._fallback),
            "failures": self.failures,
            "damping": self.damping,
            "limit": self._limit,
            "stacks": list(self._stacks),
            "units": {unit.name: unit.state_dict() for unit in self.units},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._limit, self._fallback, self._stacks = _UNKNOWN, [], []
        self.units = self._placed(make_units(self.model, cover(self.model), self.settings))
        self._replace(state["fallback"])
        if state["limit"] != _UNKNOWN:
            self._set_limit(state["limit"])
        known = {unit.name for unit in self.units}
        for names in state["stacks"]:
            if known.issuperset(names):
                self._join(list(names))
        names = [unit.name for unit in self.units]
        if sorted(names) != sorted(state["units"]):
            different = sorted(set(names) ^ set(state["units"]))
            raise InputError(
                f"the saved optimizer state is of another model: {', '.join(different[:5])} on one "
                "side only"
            )
        for unit in self.units:
            unit.load_state_dict(state["units"][unit.name])
        self.failures, self.damping = int(state["failures"]), float(state.get("damping", LEAST))


def _floats(numbers: Sequence[Tensor]) -> list[float]:
    """Scalars from the device in one transfer."""
    if len({x.dtype for x in numbers}) > 1:
        numbers = [x.double() for x in numbers]
    values: list[float] = torch.stack(list(numbers)).tolist() if numbers else []
    return values
