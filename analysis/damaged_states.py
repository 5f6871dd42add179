"""Damaged states of NGD-T, loaded one after the other: ``python -m analysis states --count 1000``.

Each trial takes the state that an optimizer saved after three steps, changes one thing somewhere in
it (another type, another shape, not-a-number, an entry dropped, another's in its place), and loads
it into a fresh optimizer that has taken a step of its own. A trial ends well in two ways only:

- refused: an `InputError` of one sentence, and nothing has changed: parameters, settings and state
  are as before, and the next step is bit for bit that of a twin that never tried.
- loaded: what the optimizer then says of itself is what the state said, and the next two steps
  leave finite weights.

Counted as failures: any other exception, a refusal that changed something, a state read otherwise
than it was written. Seeded: ``--seed 17 --count 1`` repeats one. Writes damaged_states.csv.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import thermo_opt as to
from analysis.fuzz import changed
from analysis.timing import report
from thermo_opt.errors import InputError

KINDS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac, momentum 0.9": {"momentum": 0.9},
    "ekfac": {"metric": "ekfac"},
    "exact": {"metric": "exact"},
    "diagonal": {"metric": "diagonal"},
}
"""Optimizers by name, and their settings."""


def main(arguments: list[str]) -> int:
    """Run trials and print their counts; exit status 1 if any failed."""
    parser = argparse.ArgumentParser(prog="analysis states", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="trials over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    saved = {kind: saved_state(kind) for kind in KINDS}
    for k in range(options.seed, options.seed + options.count):
        kind = list(KINDS)[k % len(KINDS)]
        verdict, what = trial(kind, saved[kind], k)
        counts[kind, verdict] += 1
        if verdict.startswith("FAILED"):
            print(f"seed {k}, {kind}: {verdict}: {what}", flush=True)
    verdicts = sorted({verdict for _, verdict in counts} | {"refused", "loaded"}, reverse=True)
    rows = [
        {"optimizer": kind, **{verdict: counts[kind, verdict] for verdict in verdicts}}
        for kind in KINDS
    ]
    if options.seed == 0 and options.count >= 1000:
        report("damaged states", rows, "damaged_states")
    else:
        print(*rows, sep="\n")
    return int(any(verdict.startswith("FAILED") for verdict in verdicts))


def trial(kind: str, saved: bytes, seed: int) -> tuple[str, str]:
    """Load a damaged state: ``(verdict, what was wrong)``."""
    chance = random.Random(f"{kind} {seed}")
    state = torch.load(io.BytesIO(saved), weights_only=True)
    part = chance.choice(("ngdt", "ngdt", "ngdt", "param_groups", "anywhere"))
    damaged: Any = (
        changed(state, chance)
        if part == "anywhere"
        else {**state, part: changed(state[part], chance)}
    )
    model, optimizer, batch = _built(kind, 1)
    twin_model, twin, _ = _built(kind, 1)
    for one, other in ((model, optimizer), (twin_model, twin)):
        _step(one, other, batch)
    before = copy.deepcopy(_all(model, optimizer))
    try:
        optimizer.load_state_dict(damaged)
    except InputError as error:
        if "\n" in str(error) or not str(error):
            return "FAILED: words", repr(str(error))
        if (where := difference(before, _all(model, optimizer))) is not None:
            return "FAILED: changed", f"{where} after {error}"
        for one, other in ((model, optimizer), (twin_model, twin)):
            _step(one, other, batch)
        where = difference(_all(twin_model, twin), _all(model, optimizer))
        return ("refused", "") if where is None else ("FAILED: next step", f"{where}: {error}")
    except Exception:
        return "FAILED: exception", traceback.format_exc()
    try:
        where = difference(_told(damaged), _told(optimizer.state_dict(), _own(damaged)))
    except Exception:  # not even of the form of a state
        where = traceback.format_exc()
    if where is not None:
        return "FAILED: read otherwise", where
    try:
        for _ in range(2):
            _step(model, optimizer, batch)
    except Exception:
        return "FAILED: step after loading", traceback.format_exc()
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return "FAILED: weights", "not finite"
    return "loaded", ""


def difference(one: Any, other: Any, where: str = "state") -> str | None:
    """Where two trees of plain values and tensors differ, if they do."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            return f"{where}: {sorted(map(str, set(one) ^ set(other)))[:3]} on one side only"
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        pairs = [(a, b, f"{where}[{k}]") for k, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.layout == other.layout
        same = same and torch.equal(one.double().nan_to_num(7e77), other.double().nan_to_num(7e77))
        return None if same else f"{where}: tensors"
    else:
        same = one is other or (one == other and isinstance(one, bool) is isinstance(other, bool))
        return None if same else f"{where}: {one!r:.60} and {other!r:.60}"
    return next((found for pair in pairs if (found := difference(*pair)) is not None), None)


def _told(state: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a state says: its settings and its own entry. Left out are the version, without which a
    state is one of the first release, and what ``like`` (or itself) says there is none of."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    like = _own(state) if like is None else like
    own = {k: v for k, v in _own(state).items() if k != "version" and like.get(k) is not None}
    return {"param_groups": groups, "ngdt": own}


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """NGD-T's entry, which stands twice: at the top and with the first parameter."""
    found: dict[str, Any] = state["ngdt"] if "ngdt" in state else state["state"][0]["ngdt"]
    return found


def _all(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"weights": dict(model.state_dict()), **_told(optimizer.state_dict())}


def _built(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    return model, to.NGDT(model, budget=0.01, **KINDS[kind]), batch


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(7)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def saved_state(kind: str) -> bytes:
    model, optimizer, batch = _built(kind, 0)
    for _ in range(3):
        _step(model, optimizer, batch)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()
