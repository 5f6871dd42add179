"""The protocol that all studies share, and their command line.

Every method gets the same number of tuning trials (5, `analysis.tuning`), of seed 0 (digits, whose
validation data are few and whose runs take a second: of all three seeds), chosen by the final loss
on validation data that is neither trained on nor reported; then more seeds at its best, up to three
in all. So does its thrifty setting, where that is another one: the smallest tried that ends no
higher on the validation data than AdamW's best. Same starts, data order and schedule for all
methods, which take turns. Every run is recorded on a fixed probe and audited through the outputs
lens. Targets: the probe loss of AdamW's worst seed half-way through its best runs and at their end;
seconds are processor seconds of forward pass, backward pass and optimizer step alone (wall seconds
on a GPU). Alignment: the parameter lens's certified bracket on each step's own minibatch, mean over
four moments of a run (`analysis.study_alignment`).
Peak memory: of training steps, in a process of its own (`analysis.study_memory`).

Writes <study>_<scale>.csv (one row per method: means and standard deviations over seeds),
<study>_<scale>_runs.csv (one row per run) and figures into analysis/results/, recorded runs into
analysis/runs/<study>_<scale>/. Finished runs are not repeated, so a killed study can be called
again. With fewer methods, seeds or steps than the scale's, or at scale tiny, tables and figures go
beside the runs instead.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

import thermo_opt as to
from analysis import figures, study_table, tuning
from analysis.methods import METHODS, grid, knob, setting
from analysis.studies import STUDIES, Scale, Study
from analysis.study_alignment import align
from analysis.study_memory import add_peak_memory
from analysis.timing import RESULTS, machine
from analysis.trials import RUNS, read, record, trial_of
from thermo_opt.sweep import Trial, finished, read_result

COMPARED = ("NGD-T", "NGD-T EKFAC", "AdamW", "SGD", "SOAP", "Muon")
SEEDS = 3


@dataclass(frozen=True)
class Plan:
    """One call of a study: what is run, and where it goes."""

    study: Study
    scale: str = "small"
    data: Path | None = None
    methods: tuple[str, ...] = COMPARED
    seeds: int = SEEDS
    steps: int | None = None
    aligned: int | None = None
    jobs: int = 1
    device: str = "cpu"
    runs: Path | None = None
    results: Path | None = None
    trials: int = tuning.TRIALS
    memory: bool = True
    size: Scale = field(init=False)

    def __post_init__(self) -> None:
        size = self.study.scales[self.scale]
        size = replace(
            size,
            length=size.length if self.steps is None else self.steps,
            aligned=size.aligned if self.aligned is None else self.aligned,
        )
        object.__setattr__(self, "size", size)
        for method in self.methods:
            if method not in METHODS:
                raise to.InputError(
                    f"method {method!r} is unknown: use some of {', '.join(METHODS)}"
                )
        if len(set(self.methods)) < len(self.methods):
            raise to.InputError(f"methods {', '.join(self.methods)}: give each once")
        if self.seeds < 1 or size.length < 2 or self.jobs == 0 or size.aligned < 0:
            raise to.InputError(
                "give at least one seed and two steps, jobs other than 0, and no negative number "
                "to align"
            )

    @property
    def label(self) -> str:
        """What its files are called."""
        return f"{self.study.name}_{self.scale}"

    @property
    def folder(self) -> Path:
        """Of its recorded runs."""
        return (self.runs or RUNS) / self.label

    @property
    def output(self) -> Path:
        """Of its tables and figures: the project's results only for the study as it is defined."""
        standard = Plan(self.study, self.scale)
        whole = (self.methods, self.seeds, self.size.length) == (
            standard.methods,
            SEEDS,
            standard.size.length,
        )
        return self.results or (RESULTS if whole and self.scale != "tiny" else self.folder)

    @property
    def reference(self) -> str:
        """The method whose runs set the targets, and over whose values ratios are: AdamW, or the
        first where it isn't run."""
        return study_table.REFERENCE if study_table.REFERENCE in self.methods else self.methods[0]

    def trial(self, variant: str, method: str, value: float, seed: int) -> Trial:
        """One of its runs."""
        return trial_of(
            self.study.name,
            self.size.variants[variant],
            method,
            {knob(method): value},
            seed,
            self.size.length,
            every=self.size.every,
            device=self.device,
            decay=self.size.decay,
            data=None if self.data is None else str(self.data.resolve()),
            aligned=self.size.aligned,
        )


def run_study(plan: Plan) -> pd.DataFrame:
    """Tune, run, audit and compare; returns the methods' table, which it also writes with the runs'
    and the figures."""
    names = [(variant, method) for variant in plan.size.variants for method in plan.methods]
    tried: dict[tuple[str, str], dict[float, float]] = {name: {} for name in names}
    trials: dict[str, list[Trial]] = {variant: [] for variant in plan.size.variants}
    tuned = min(plan.size.tuned, plan.seeds)
    progress = _Progress(plan, len(names) * (plan.trials * tuned + plan.seeds - tuned))

    def run(wanted: Sequence[tuple[str, str, float, int]]) -> None:
        batch = [plan.trial(*what) for what in wanted]
        work = functools.partial(record, folder=plan.folder, aligned=plan.size.aligned)
        _each(work, batch, plan, progress)
        for (variant, _, _, _), trial in zip(wanted, batch, strict=True):
            trials[variant].append(trial)

    def score(wanted: Sequence[tuple[str, str, float]]) -> None:
        run([(*what, seed) for seed in range(tuned) for what in wanted])
        for variant, method, value in wanted:
            found = [
                read_result(plan.folder / plan.trial(variant, method, value, seed).name)
                for seed in range(tuned)
            ]
            tried[variant, method][value] = sum(one["validation"] for one in found) / tuned

    central = min(plan.trials, len(grid(plan.methods[0])))
    score([(*name, grid(name[1])[place]) for place in range(central) for name in names])
    for _ in range(plan.trials - central):
        score([(*name, tuning.next_setting(grid(name[1]), tried[name])) for name in names])
    scores = {
        variant: {m: tried[variant, m] for m in plan.methods} for variant in plan.size.variants
    }
    choices = {
        variant: study_table.choices_of(own, plan.reference) for variant, own in scores.items()
    }
    chosen = [(v, m, choices[v][m][choice]) for choice in study_table.CHOICES for v, m in names]
    wanted = [(v, m, value) for v, m, value in chosen if value is not None]
    progress.total += (len(wanted) - len(names)) * (plan.seeds - tuned)
    run([(*what, seed) for seed in range(tuned, plan.seeds) for what in wanted])
    final = [
        [plan.trial(*what, seed) for seed in range(plan.seeds)] for what in wanted[: len(names)]
    ]
    best = [trial for own in final for trial in own]
    if plan.size.aligned:
        work = (
            delayed(align)(trial, plan.folder / trial.name, plan.size.aligned) for trial in best
        )
        Parallel(n_jobs=plan.jobs)(work)
    if plan.memory:
        work = (
            delayed(add_peak_memory)(own, [plan.folder / trial.name for trial in own])
            for own in final
        )
        Parallel(n_jobs=plan.jobs)(work)
    tables = []
    for variant in plan.size.variants:
        tables.append(_compare(plan, variant, trials[variant], scores[variant], choices[variant]))
    return _write(plan, tables)


def _compare(
    plan: Plan,
    variant: str,
    trials: list[Trial],
    scores: dict[str, dict[float, float]],
    choices: study_table.Choices,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs' and the methods' rows of a variant, and its figures."""
    recorded = [read(trial, plan.folder) for trial in trials]
    final = [run for run in recorded if setting(run.trial) == choices[run.trial.method]["best"]]
    targets = study_table.targets_of([run for run in final if run.trial.method == plan.reference])
    name = "_".join(part for part in (plan.label, variant.replace(" ", "-")) if part)
    front = None
    try:
        front = study_table.front_of(recorded, targets)
    except to.InputError as error:
        print(f"{name}: nothing to compare ({error})", flush=True)
    runs = study_table.rows_of_runs(recorded, choices, targets)
    methods = study_table.rows_of_methods(runs, scores, choices, plan.reference).assign(
        **{f"target_{label}": target for label, target in targets.items()}, length=plan.size.length
    )
    plan.output.mkdir(parents=True, exist_ok=True)
    figures.curves(name, plan.methods, final, targets, plan.output / f"{name}_curves.png")
    if front is not None:
        figures.fronts(name, front, recorded, plan.output / f"{name}_front.png")
    return tuple(frame if not variant else _first(frame, variant) for frame in (runs, methods))  # type: ignore[return-value]


def _first(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    frame.insert(0, "variant", variant)
    return frame


def _write(plan: Plan, tables: list[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    runs, methods = (pd.concat(frames, ignore_index=True) for frames in zip(*tables, strict=True))
    methods = methods.assign(
        scale=plan.scale,
        machine=machine(),
        thermo_opt=to.__version__,
        date=datetime.now(UTC).date().isoformat(),
        jobs=plan.jobs,
    )
    runs.to_csv(plan.output / f"{plan.label}_runs.csv", index=False, float_format="%.6g")
    methods.to_csv(plan.output / f"{plan.label}.csv", index=False, float_format="%.6g")
    print(summary(methods).to_string(index=False, float_format="%.3f"), flush=True)
    print(f"tables and figures: {plan.output}\nrecorded runs: {plan.folder}", flush=True)
    return methods


def summary(methods: pd.DataFrame) -> pd.DataFrame:
    """The columns of the methods' table that fit a terminal."""
    wanted = ["variant", "method", "choice", "setting", "bracketed", "final_loss", "accuracy"]
    wanted += [f"{name}_ratio" for name in study_table.RATIOS]
    return methods[[name for name in wanted if name in methods]]


class _Progress:
    """Prints each finished run, with how many there will be."""

    def __init__(self, plan: Plan, total: int) -> None:
        self.plan, self.total, self.done = plan, total, 0

    def __call__(self, trial: Trial, kept: bool) -> None:
        self.done += 1
        found = read_result(self.plan.folder / trial.name)
        if found["steps_done"] < trial.training.steps:
            outcome = f"diverged after {found['steps_done']} steps"
        else:
            outcome = (
                f"loss {found['final_loss']:.4f}, accuracy {found['accuracy']:.4f}, "
                f"{found['dissipation']:.3f} nats, {found['seconds']:.1f} s"
            )
        again = " (recorded before)" if kept else ""
        print(f"[{self.done}/{self.total}] {trial.name}: {outcome}{again}", flush=True)


def _each(
    function: Callable[[Trial], Trial], trials: Sequence[Trial], plan: Plan, progress: _Progress
) -> None:
    """Apply to each trial, ``plan.jobs`` at a time in processes of one thread each, and report what
    is done."""
    kept = {trial.name for trial in trials if finished(trial, plan.folder)}
    work = (delayed(function)(trial) for trial in trials)
    for trial in Parallel(n_jobs=plan.jobs, return_as="generator_unordered")(work):
        progress(trial, trial.name in kept)


def check(plan: Plan) -> int:
    """Run the study anew and compare it with the results it left before; how many values differ by
    more than their spread."""
    committed = plan.output / f"{plan.label}.csv"
    if not committed.is_file():
        raise to.InputError(f"{committed} does not exist: run the study without --check first")
    with tempfile.TemporaryDirectory() as scratch:
        anew = run_study(replace(plan, runs=Path(scratch), results=Path(scratch)))
    found = study_table.differences(pd.read_csv(committed), anew)
    print(
        found.to_string(index=False) if len(found) else "every value lies within its stated spread",
        flush=True,
    )
    return len(found)


def main(arguments: list[str]) -> int:
    """Run a study, or compare it with its committed tables (``--check``)."""
    parser = argparse.ArgumentParser(
        prog="analysis study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument(
        "--scale", default="small", choices=["small", "full", "tiny"], help="tiny: seconds"
    )
    parser.add_argument("--data", type=Path, help="folder or file of the data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs trained at a time, in processes of one thread"
    )
    parser.add_argument(
        "--align", type=int, dest="aligned", help="examples for the parameter lens; 0: none"
    )
    parser.add_argument(
        "--no-memory", action="store_false", dest="memory", help="leave peak memory unmeasured"
    )
    parser.add_argument("--runs", type=Path, help="folder of recorded runs; default: analysis/runs")
    parser.add_argument("--results", type=Path, help="folder of tables and figures")
    parser.add_argument("--device", help="default: cpu; at full scale a GPU where there is one")
    parser.add_argument(
        "--check", action="store_true", help="run anew and compare with the results there are"
    )
    options = vars(parser.parse_args(arguments))
    checked = options.pop("check")
    options["study"] = STUDIES[options["study"]]
    options["methods"] = tuple(options["methods"].split(","))
    wants_gpu = options["scale"] == "full" and torch.cuda.is_available()
    options["device"] = options["device"] or ("cuda" if wants_gpu else "cpu")
    torch.set_num_threads(1)
    plan = Plan(**options)
    if checked:
        return 1 if check(plan) else 0
    run_study(plan)
    return 0
