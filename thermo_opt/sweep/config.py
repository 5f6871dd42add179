"""A sweep as a TOML file: what is trained, by which methods, over which settings and seeds.

output = "runs/digits"              folder of the recorded runs, relative to where the command is
run

[task]
name = "digits"                     or: factory = "package.module:function" (see
`thermo_opt.sweep.tasks`)
likelihood = "categorical"          categorical, bernoulli or gaussian
options = { width = 64 }            keyword arguments of the factory

[training]
steps = 200
batch_size = 64                     0: all training data at once
seeds = [0, 1, 2]                   of the weights and of the order of the data: the same for every
method
every = 2                           steps between snapshots of the predictions on the probe
schedule = "cosine"                 of the learning rate, to 0; or "constant"
warmup_steps = 20                   the learning rate rises linearly over these first; default 0
min_lr_rate = 0.05                  where the cosine ends, of the full learning rate; default 0
threads = 1                         of each run (a sum's rounding depends on it)
device = "cpu"
precision = "float32"               of training: float32, or bfloat16 (autocast)

[pareto]
target_loss = [0.5, 0.2]            default: the lowest that half of the runs reach
x = "steps"                         steps or examples; seconds

[[method]]
name = "Adam"                       its label; default: the optimizer
optimizer = "Adam"                  of torch.optim, or "NGDT", or "package.module:function", called
with the model
settings = { weight_decay = 0.01 }  the same in all its runs
grid = { lr = [1e-3, 3e-3, 1e-2] }  every combination is a run (for each seed)

NGDT's metric may have options: settings = { metric = { kind = "kfac", max_rows = 128 } }
"""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thermo_opt.errors import InputError
from thermo_opt.fronts.front import CLOCK_OF
from thermo_opt.likelihoods import FAMILIES
from thermo_opt.sweep.tasks import TASKS

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")
_LATER = {"options": {}, "warmup_steps": 0, "min_lr_rate": 0.0, "precision": "float32"}
"""Facts of a trial that its first records don't have, and what they had instead."""


@dataclass(frozen=True)
class Training:
    """How every run is trained; see the module's example."""

    steps: int
    batch_size: int
    every: int = 1
    schedule: str = "constant"
    threads: int = 1
    device: str = "cpu"
    warmup_steps: int = 0
    min_lr_rate: float = 0.0
    precision: str = "float32"


@dataclass(frozen=True)
class Method:
    """An optimizer with fixed ``settings`` and a ``grid`` of settings to try in every
    combination."""

    name: str
    optimizer: str
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: everything its result depends on, in plain values. ``name``: its
    folder's."""

    name: str
    method: str
    task: str
    likelihood: str
    training: Training
    optimizer: str
    settings: dict[str, Any]
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What two trials must share for one's record to stand for the other; kept in the run's
        notes.

        What came later (`_LATER`) is left out at its default, so that earlier records still stand.
        """
        facts = {
            "task": self.task,
            "likelihood": self.likelihood,
            **vars(self.training),
            "optimizer": self.optimizer,
            "settings": self.settings,
            "seed": self.seed,
            "options": self.options,
        }
        return {k: v for k, v in facts.items() if k not in _LATER or v != _LATER[k]}


@dataclass(frozen=True)
class Sweep:
    """A sweep's configuration."""

    output: Path
    task: str
    likelihood: str
    training: Training
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    target_loss: tuple[float, ...] | None = None
    x: str = "steps"
    options: dict[str, Any] = field(default_factory=dict)

    def trials(self) -> list[Trial]:
        """All runs, seeds innermost; InputError when two would have one name."""
        trials = []
        for method in self.methods:
            for values in itertools.product(*method.grid.values()):
                chosen = dict(zip(method.grid, values, strict=True))
                label = "-".join(
                    [method.name, *(f"{key}={value}" for key, value in chosen.items())]
                )
                settings = {**method.settings, **chosen}
                for seed in self.seeds:
                    name = re.sub(r"[^\w.=+-]+", "_", f"{label}-seed={seed}")
                    trials.append(
                        Trial(
                            name,
                            method.name,
                            self.task,
                            self.likelihood,
                            self.training,
                            method.optimizer,
                            settings,
                            seed,
                            self.options,
                        )
                    )
        seen: set[str] = set()
        for trial in trials:
            if trial.name.casefold() in seen:
                raise InputError(
                    f"two runs would be named {trial.name}: give each method its own name, each "
                    "value once"
                )
            seen.add(trial.name.casefold())
        return trials


def read_config(path: Path) -> Sweep:
    """Read and check a sweep's TOML file.

    Args:
        path: the file.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest known.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a sweep's configuration (TOML)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} can't be read as TOML: {error}") from None
    try:
        return parse_config(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_config(content: Mapping[str, Any]) -> Sweep:
    """A sweep from the values of its file; raises InputError as `read_config`, without the file's
    name."""
    _known(content, ("output", "task", "training", "pareto", "method"), "the file")
    task, training, pareto = (_table(content, key) for key in ("task", "training", "pareto"))
    _known(task, ("name", "factory", "likelihood", "options"), "[task]")
    _known(training, ("seeds", *Training.__dataclass_fields__), "[training]")
    _known(pareto, ("target_loss", "x"), "[pareto]")
    methods = content.get("method")
    if not isinstance(methods, list) or not methods:
        raise InputError("there is no method: add at least one [[method]] with an optimizer")
    seeds = training.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(_whole(seed) and seed >= 0 for seed in seeds)
    ):
        raise InputError(
            f"[training] seeds is {seeds!r}: give a list of whole numbers, 0 or larger"
        )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"[training] seeds is {seeds!r}: give each seed once")
    return Sweep(
        output=Path(_text(content, "output", "the file")),
        task=_task(task),
        likelihood=_choice(task, "likelihood", FAMILIES, "[task]", "categorical"),
        training=Training(
            steps=_count(training, "steps", 1),
            batch_size=_count(training, "batch_size", 0),
            every=_count(training, "every", 1, default=1),
            schedule=_choice(training, "schedule", SCHEDULES, "[training]", "constant"),
            threads=_count(training, "threads", 1, default=1),
            device=_text(training, "device", "[training]", "cpu"),
            warmup_steps=_count(training, "warmup_steps", 0, default=0),
            min_lr_rate=_share(training, "min_lr_rate"),
            precision=_choice(training, "precision", PRECISIONS, "[training]", "float32"),
        ),
        seeds=tuple(seeds),
        methods=tuple(
            _method(method, position) for position, method in enumerate(methods, start=1)
        ),
        target_loss=_targets(pareto.get("target_loss")),
        x=_choice(pareto, "x", tuple(CLOCK_OF), "[pareto]", "steps"),
        options=_table(task, "options", "[task]"),
    )


def _method(content: Any, position: int) -> Method:
    where = f"[[method]] number {position}"
    if not isinstance(content, dict):
        raise InputError(f"{where} is {content!r}: write it as a table")
    _known(content, ("name", "optimizer", "settings", "grid"), where)
    optimizer = _text(content, "optimizer", where)
    settings, grid = (_table(content, key, where) for key in ("settings", "grid"))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(
                f"{where}: grid.{key} is {values!r}: give a list of values, or put it under "
                "settings"
            )
    twice = sorted(set(settings) & set(grid))
    if twice:
        raise InputError(f"{where}: {twice[0]} stands in settings and in grid: keep one")
    return Method(
        _text(content, "name", where, optimizer.rpartition(":")[2]), optimizer, settings, grid
    )


def _task(content: Mapping[str, Any]) -> str:
    if ("name" in content) == ("factory" in content):
        raise InputError(
            f"[task] needs either a name ({', '.join(TASKS)}) or a factory "
            "(package.module:function)"
        )
    if "factory" in content:
        factory = _text(content, "factory", "[task]")
        if ":" not in factory:
            raise InputError(f"[task] factory is {factory!r}: write package.module:function")
        return factory
    return _choice(content, "name", tuple(TASKS), "[task]")


def _targets(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not values or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise InputError(
            f"[pareto] target_loss is {value!r}: give a number or a list of numbers, in nats"
        )
    return tuple(float(v) for v in values)


def nearest(word: str, known: Any) -> str:
    """A hint: "did you mean …?" when something known is close to a word, else what is known."""
    known = list(known)
    by_case = [k for k in known if k.casefold() == word.casefold()]
    # among the closest, the one as long as the word: swapped letters are the commonest slip
    close = by_case or sorted(
        difflib.get_close_matches(word, known, n=3), key=lambda k: abs(len(k) - len(word))
    )
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def _known(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise InputError(f"{where} has an unknown key {key!r}: {nearest(key, known)}")


def _table(content: Mapping[str, Any], key: str, where: str = "the file") -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} is {value!r}: write it as a table")
    return value


def _text(content: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = content.get(key, default)
    if not isinstance(value, str) or not value:
        raise InputError(
            f"{where} needs {key}, a text"
            if key not in content
            else f"{where}: {key} is {value!r}: give a text"
        )
    return value


def _choice(
    content: Mapping[str, Any],
    key: str,
    known: tuple[str, ...],
    where: str,
    default: str | None = None,
) -> str:
    value = _text(content, key, where, default)
    if value not in known:
        raise InputError(f"{where}: {key} {value!r} is unknown: {nearest(value, known)}")
    return value


def _count(content: Mapping[str, Any], key: str, least: int, default: int | None = None) -> int:
    value = content.get(key, default)
    if value is None:
        raise InputError(f"[training] needs {key}, a whole number")
    if not _whole(value) or value < least:
        raise InputError(f"[training] {key} is {value!r}: give a whole number, {least} or larger")
    return int(value)


def _share(content: Mapping[str, Any], key: str) -> float:
    value = content.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"[training] {key} is {value!r}: give a number from 0 to 1")
    return float(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
