"""Whether two checkouts of this project train, resume and audit to the same bits.

    python tests/compare_checkouts.py OLD NEW [--only PATTERN] [--runs FOLDER] [--keep FOLDER]

Each checkout runs in a process of its own with the same torch. Compared are: the weights after 60
steps of NGD-T on every configuration below; the same, continued by NEW from the optimizer state
that OLD saved after 30; and every summary and table of steps of the audits of all runs in ``data/``
(of OLD, or ``--runs``) and of a run that OLD's Recorder writes. Numbers must agree to the last bit.
Options and keys that were renamed between the two are translated (`NEW_OPTIONS`, `NEW_KEYS`). Exit
status: the number of differences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, HALF = 60, 30

NEW_KEYS = {"geodesic": "distance", "frontier": "least_distance"}
"""Keys of summaries and columns of tables: old → new."""

NEW_OPTIONS = {
    "decay": "factor_decay",
    "rows": "max_rows",
    "refresh_every": "max_refresh_interval",
    "overhead": "max_solve_overhead",
    "setting": "kfac_approx",
    "targets": "fisher_type",
    "null_space": "inverse",
    "eta_null": "eta_null",
    "rtol": "rtol",
    "atol": "atol",
}
"""Options of NGDT that went into the metric's object: old → new."""

NEW_VALUES = {"sampled": "mc", "none": "pseudo", "hybrid": "pseudo+null"}


# ---- the networks


class Tied(nn.Module):
    """A next-token model whose read-out is its table of tokens."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(24, 16, padding_idx=0), nn.Embedding(8, 16)
        self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        h = h + torch.tanh(self.mix(self.norm(h))).cumsum(1) / 8
        return self.head(h)


class Stacked(nn.Module):
    """Blocks of one shape, some of them left out of every other pass."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 20), nn.Linear(20, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 20)) for _ in range(10)
        )
        self.skip, self.passes = skip, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            if not (self.skip and i % 3 == 1 and self.passes % 2 == 0):
                x = x + torch.tanh(block(x))
        return self.last(x)


class Unruled(nn.Module):
    """A parameter of the model's own, and a layer whose weight is used without calling the
    layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))
        self.hidden, self.out = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(F.linear(x * self.scale, self.hidden.weight, self.hidden.bias)))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def grouped() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Unflatten(1, (2, 4, 4)),
            nn.Conv2d(2, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ),
        *(
            nn.Conv2d(8, 8, 3, padding=1, groups=4),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 12, 2, stride=2),
        ),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(48, 10)),
    )


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Groups with a learning rate, a weight decay and a share of the budget of their own."""
    first, *rest = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [
        {"params": list(first.parameters()), "lr": 0.5, "share": 0.3},
        {"params": [p for m in rest for p in m.parameters()], "weight_decay": 0.0},
    ]


# ---- the configurations: network, options in old words, and what else is special


def config(build: Callable[[], nn.Module], data: str = "rows", **options: Any) -> dict[str, Any]:
    return {"build": build, "data": data, "options": options}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "kfac": config(lambda: mlp(32, 24, 16, 10)),
    "ekfac": config(grouped, metric="ekfac"),
    "tied": config(Tied, "tokens"),
    "stacked": config(lambda: Stacked(False), weight_decay=0.05),
    "stacked, some layers skipped": config(lambda: Stacked(True)),
    "grouped convolution": config(grouped),
    "embedding": config(lambda: Tied(False), "tokens", rows=64),
    "weight decay and groups": config(lambda: mlp(32, 24, 16, 10), groups=True, weight_decay=0.1),
    "hybrid null space": config(
        lambda: mlp(32, 24, 16, 10), null_space="hybrid", rtol=1e-3, eta_null=0.02
    ),
    "low precision": config(lambda: mlp(32, 24, 16, 10).bfloat16(), weight_decay=0.01),
    "autocast": config(grouped, autocast=True),
    "diagonal blocks": config(lambda: mlp(32, 300, 10), overhead=1e-9),
    "wide norm": config(
        lambda: nn.Sequential(nn.Linear(32, 600), nn.LayerNorm(600), nn.Linear(600, 10))
    ),
    "sampled labels, reduce": config(
        lambda: Tied(False), "tokens", targets="sampled", setting="reduce", rows=None
    ),
    "pseudo-inverse": config(lambda: Stacked(False), null_space="none", atol=1e-6),
    "ekfac, embedding": config(
        lambda: Tied(False), "tokens", metric="ekfac", decay=0.9, damping=1e-3
    ),
    "no momentum, accumulation": config(
        grouped, momentum=0.0, parts=2, calibrate=3, refresh_every=8
    ),
    "parameters without a rule": config(Unruled),
    "exact": config(lambda: mlp(32, 16, 10), metric="exact", weight_decay=0.02),
    "low-rank": config(lambda: mlp(32, 16, 10), metric="low-rank", null_space="hybrid"),
    "diagonal": config(lambda: mlp(32, 16, 10), metric="diagonal", regulator="heat", budget=10.0),
}


def batches(kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same 60 noisy batches in every process."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 10, generator=generator)
    while True:
        if kind == "tokens":
            x = torch.randint(24, (16, 9), generator=generator)
            x[:, 1::2] = (x[:, :-1:2] * 5 + 1) % 24
            yield x[:, :-1], x[:, 1:]
        else:
            x = torch.randn(48, 32, generator=generator)
            noise = torch.randn(48, 10, generator=generator)
            yield x, (x @ teacher + noise).argmax(-1)


# ---- what runs in a checkout


def optimizer(model: nn.Module, options: dict[str, Any]) -> Any:
    """NGDT of whichever checkout this is, from options in old words."""
    import thermo_opt as to
    from thermo_opt import optim

    options = {k: v for k, v in options.items() if k not in ("autocast", "parts")}
    if options.pop("groups", False):
        options["params"] = groups_of(model)
    if not hasattr(optim, "KFAC"):
        return to.NGDT(model, **options)
    own = {new: options.pop(old) for old, new in NEW_OPTIONS.items() if old in options}
    own = {k: NEW_VALUES.get(v, v) if isinstance(v, str) else v for k, v in own.items()}
    name = options.pop("metric", "kfac")
    kinds = {"kfac": optim.KFAC, "ekfac": optim.EKFAC}
    metric = kinds[name](**own) if name in kinds else optim.Minibatch(name, **own)
    if "calibrate" in options:
        options["calibration"] = optim.Calibration(every=options.pop("calibrate"))
    return to.NGDT(model, metric=metric, **options)


def train(model: nn.Module, opt: Any, chosen: dict[str, Any], first: int, last: int) -> None:
    options = chosen["options"]
    dtype = next(model.parameters()).dtype
    parts = options.get("parts", 1)
    for step, (x, y) in enumerate(batches(chosen["data"])):
        if step >= last:
            return
        if step < first:
            continue
        torch.manual_seed(step)
        opt.zero_grad(set_to_none=False)  # a layer that was skipped has a gradient of 0
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            x_part = x_part.to(dtype) if x_part.is_floating_point() else x_part
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                outputs = model(x_part)
                loss = F.cross_entropy(outputs.flatten(0, -2).float(), y_part.flatten()) / parts
            loss.backward()
        opt.step()


def trained(name: str, folder: Path, given: Path | None) -> None:
    """Train 60 steps and save; with ``given``, also continue from the state in that folder."""
    chosen = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = chosen["build"]()
    opt = optimizer(model, chosen["options"])
    train(model, opt, chosen, 0, HALF)
    torch.save(
        {"model": model.state_dict(), "optimizer": opt.state_dict()}, folder / f"{name}.state"
    )
    train(model, opt, chosen, HALF, STEPS)
    results = {
        "weights": model.state_dict(),
        "last": {k: v for k, v in opt.last_step.items() if "seconds" not in k},
    }
    if given is not None:
        saved = torch.load(given / f"{name}.state", weights_only=True)
        torch.manual_seed(7)
        other = chosen["build"]()
        if isinstance(model, Stacked):
            other.passes = HALF
        other.load_state_dict(saved["model"])
        resumed = optimizer(other, chosen["options"])
        resumed.load_state_dict(saved["optimizer"])
        train(other, resumed, chosen, HALF, STEPS)
        results["resumed"] = other.state_dict()
    torch.save(results, folder / f"{name}.pt")


def record(folder: Path) -> None:
    """Record a short run."""
    import thermo_opt as to

    torch.manual_seed(0)
    model = mlp(32, 16, 10)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    source = batches("rows")
    options = {"params": True, "moments": True, "every": 2, "batch_size": 48}
    with to.Recorder(
        folder / "recorded", model=model, optimizer=opt, probe=next(source), **options
    ) as recorder:
        for _ in range(20):
            x, y = next(source)
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            recorder.step(loss=loss)


def audited(run: Path) -> dict[str, Any]:
    """Every summary and table of a run's audit, as plain numbers."""
    import thermo_opt as to

    model = None
    if run.name.startswith("digits"):
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    elif run.name == "recorded":
        model = mlp(32, 16, 10)
    steps = [0, 5] if run.name.startswith("text") else None
    audit = to.audit(run, model=model, steps=steps)
    found: dict[str, Any] = {}
    for name, lens in audit.lenses.items():
        table = {f"step {column}": [float(v) for v in lens.steps[column]] for column in lens.steps}
        found[name] = {**lens.summary, **table}
    return found


def work(folder: Path, given: Path | None, runs: Path | None, names: list[str]) -> None:
    """Everything, in this process's checkout."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names:
        if name in CONFIGURATIONS:
            trained(name, folder, given)
    if "audits" in names:
        if given is None:
            record(folder)
        recorded = (given or folder) / "recorded"
        found = [
            recorded,
            *(sorted(p for p in runs.iterdir() if p.is_dir()) if runs is not None else []),
        ]
        audits = {run.name: audited(run) for run in found}
        (folder / "audits.json").write_text(json.dumps(audits))


# ---- the comparison


def differences(old: Path, new: Path, names: list[str]) -> Iterator[str]:
    """What differs, one line each; says what agrees on the way."""
    for name in names:
        found = list(_audits(old, new) if name == "audits" else _weights(name, old, new))
        print(f"{'same' if not found else 'DIFFERENT'}: {name}", flush=True)
        yield from found


def _weights(name: str, old: Path, new: Path) -> Iterator[str]:
    was, now = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (old, new))
    for kind in ("weights", "resumed"):
        for key, tensor in was["weights"].items():
            other = now[kind][key]
            if not torch.equal(tensor, other):
                apart = float(
                    (tensor.double() - other.double()).norm()
                    / tensor.double().norm().clamp(min=1e-300)
                )
                yield f"{name}, {kind}: {key} differs (relative {apart:.1e})"
    for key, value in was["last"].items():
        if key in now["last"] and now["last"][key] != value:
            yield f"{name}: last_step[{key!r}] is {now['last'][key]!r}, was {value!r}"


def _audits(old: Path, new: Path) -> Iterator[str]:
    was, now = (json.loads((folder / "audits.json").read_text()) for folder in (old, new))
    for run, lenses in was.items():
        for lens, values in lenses.items():
            for key, value in values.items():
                name = NEW_KEYS.get(key, key)
                there = now[run].get(lens, {})
                other = there.get(name, there.get(key, "(missing)"))
                if not _same(value, other):
                    yield f"audit of {run}, {lens}: {name} is {other!r}, was {value!r}"[:400]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def main() -> None:
    """Run both checkouts, compare, and exit with the number of differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--only", default="", help="configurations whose name contains this ('audits' is one)"
    )
    parser.add_argument("--weights", action="store_true", help="no audits")
    parser.add_argument("--runs", type=Path, help="folder of recorded runs (default: OLD/data)")
    parser.add_argument(
        "--keep", type=Path, help="where OLD's results are kept, and taken from the next time"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = list(CONFIGURATIONS) if options.weights else [*CONFIGURATIONS, "audits"]
    names = [name for name in known if options.only in name]
    runs = options.runs or options.old / "data"
    if options.worker:
        folder, given = options.worker
        work(Path(folder), Path(given) if given else None, runs, names)
        return
    with tempfile.TemporaryDirectory() as temporary:
        old, new = Path(options.keep or Path(temporary) / "old").resolve(), Path(temporary) / "new"
        new.mkdir()
        for checkout, folder, given in ((options.old, old, ""), (options.new, new, str(old))):
            if folder is old and old.exists():
                continue
            folder.mkdir(exist_ok=True)
            command = [
                sys.executable,
                __file__,
                str(options.old),
                str(options.new),
                "--runs",
                str(runs.resolve()),
            ]
            environment = {
                **os.environ,
                "PYTHONPATH": str(checkout.resolve()),
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            rest = [f"--only={options.only}", "--worker", str(folder), given]
            rest += ["--weights"] if options.weights else []
            subprocess.run([*command, *rest], check=True, cwd=checkout, env=environment)
        found = list(differences(old, new, names))
    print("\n".join([*found, f"{len(found)} differences"]))
    sys.exit(min(len(found), 99))


if __name__ == "__main__":
    main()
