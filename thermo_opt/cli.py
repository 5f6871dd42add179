"""The command line: parse, call, print. Torch and the rest are imported by the command that needs them."""

from __future__ import annotations

import errno
import importlib
import io
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thermo_opt.errors import InputError

if TYPE_CHECKING:
    from thermo_opt.audit import Audit
    from thermo_opt.runs import Run

ELSEWHERE: dict[str, tuple[str, str]] = {
    "pareto": ("thermo_opt.pareto_command:command", "Draw what runs took, in time and dissipation, to reach a loss."),
    "sweep": ("thermo_opt.sweep.command:command", "Train over optimizers, settings and seeds, and draw the front."),
    "verify": ("thermo_opt.verify.command:verify", "Check the theory's claims on problems whose answers are known."),
}
"""Commands defined in other modules: name → ("package.module:function", one-line help). Imported only when called."""

_HUNG_UP = 128 + 13
"""Exit status of a process that SIGPIPE ends."""

RunPath = Annotated[Path, typer.Argument(help="Folder or file that a training run left on disk.", show_default=False)]
RunPaths = Annotated[list[Path], typer.Argument(help="Recorded runs.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Html = Annotated[Path | None, typer.Option(help="Also write a report page, one file that opens offline.")]
Lens = Annotated[
    list[str] | None, typer.Option(help="outputs, parameters or optimizer-state; may be repeated. Default: all.")
]
Clock = Annotated[
    str | None,
    typer.Option(help="What counts as time: step, flow, wall, examples or tokens. Default: the run's own, or step."),
]
Stride = Annotated[int, typer.Option(help="Use every M-th snapshot.", metavar="M")]
Model = Annotated[str | None, typer.Option(help="Architecture, as package.module:factory, to replay weights with.")]
Probe = Annotated[Path | None, typer.Option(help="Inputs and targets to replay on (safetensors, npz, parquet).")]
Format = Annotated[str | None, typer.Option(help="Layout of the run, where its files don't tell.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a minibatch; the optimizer-state lens needs it.")]
Steps = Annotated[str | None, typer.Option(help="Intervals the parameter lens looks at.", metavar="A:B:C")]
Jobs = Annotated[int, typer.Option(help="Processes.")]
Output = Annotated[Path, typer.Option(help="Where to write the report page.")]


def audit(
    run: RunPath,
    json: Json = False,
    html: Html = None,
    lens: Lens = None,
    clock: Clock = None,
    stride: Stride = 1,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    jobs: Jobs = 1,
) -> None:
    """Audit a recorded run: what its path dissipated, how much was unavoidable, where the rest went."""
    check_page(html, "--html")
    audits = _audits([run], format, _options(lens, clock, stride, model, probe, batch_size, steps, jobs))
    from thermo_opt.report import terminal

    if not json:
        terminal.print_audit(audits[0])
    _finish(audits, json, html)


def compare(
    runs: RunPaths,
    json: Json = False,
    html: Html = None,
    lens: Lens = None,
    clock: Clock = None,
    stride: Stride = 1,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    jobs: Jobs = 1,
) -> None:
    """Audit several runs and compare them, the most efficient first."""
    check_page(html, "--html")
    audits = _audits(runs, format, _options(lens, clock, stride, model, probe, batch_size, steps, jobs))
    _compare(audits, json, html)


def info(run: RunPath, json: Json = False, format: Format = None) -> None:
    """Say what a run's record holds, without auditing it."""
    import json as encoder

    from thermo_opt.report import terminal
    from thermo_opt.runs import load_run

    facts = _facts(load_run(run, format=format))
    if json:
        terminal.print_json(encoder.dumps({"runs": [facts]}, indent=2, allow_nan=False))
    else:
        terminal.print_info(facts)


def demo(output: Output = Path("report.html"), jobs: Jobs = 1) -> None:
    """Audit the recorded runs that come with thermo-opt, compare them, and write a report page."""
    check_page(output, "--output")
    from thermo_opt import demo as recorded
    from thermo_opt.report.terminal import Bars

    with Bars() as bars:
        audits = recorded.audits(bars, jobs)
    _compare(audits, False, output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 bad input (a sentence on stderr), 1 our bug, and
    141 when whoever read the output has seen enough (``| head``), as the shell says of tools that a pipe ended.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, who wants to hear nothing
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it lives as long as the process)
    try:
        status = _status(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # what is still buffered goes there when Python exits
        os.close(nowhere)
        return _HUNG_UP
    return status


def _status(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows a question mark for it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            _app(arguments)(args=arguments, prog_name="thermo-opt")
    except BrokenPipeError:
        raise
    except SystemExit as status:
        if isinstance(status.__context__, BrokenPipeError):  # typer has seen it first
            raise status.__context__ from None
        return status.code if isinstance(status.code, int) else int(status.code is not None)
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _refuse(f"{error.filename or 'the output'} can't be written: {error.strerror}")
        if error.filename is None:
            return _confess()
        return _refuse(f"{error.filename}: {error.strerror}")
    except Exception:
        return _confess()
    return 0


def _app(arguments: list[str]) -> typer.Typer:
    app = typer.Typer(
        help="Thermodynamics of training runs: what a path through predictions cost, and what no path could have saved.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for command in (audit, compare, info, demo):
        app.command()(command)
    for name, (target, summary) in ELSEWHERE.items():
        function = _import(target) if arguments[:1] == [name] else _stub
        app.command(name, help=summary)(function)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from thermo_opt import __version__

        print(__version__)
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the command."""


def _stub() -> None:
    """Stands in for a command that isn't the one called."""


def _import(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _options(
    lens: list[str] | None,
    clock: str | None,
    stride: int,
    model: str | None,
    probe: Path | None,
    batch_size: int | None,
    steps: str | None,
    jobs: int,
) -> dict[str, Any]:
    return {
        "lens": lens or None,
        "clock": clock,
        "stride": stride,
        "model": model,
        "probe": probe,
        "batch_size": batch_size,
        "steps": None if steps is None else _slice(steps),
        "jobs": jobs,
    }


def _slice(text: str) -> slice:
    try:
        parts = [int(part) if part else None for part in text.split(":")]
    except ValueError:
        parts = []
    if not 2 <= len(parts) <= 3 or parts[2:] == [0]:
        raise InputError(
            f"--steps {text}: write A:B or A:B:C, whole numbers as in a Python slice, for example 0:100:10."
        )
    return slice(*parts)


def _audits(paths: Sequence[Path], format: str | None, options: dict[str, Any]) -> list[Audit]:
    from thermo_opt.audit import audit as look
    from thermo_opt.report.terminal import Bars
    from thermo_opt.runs import load_run

    audits = []
    runs = [load_run(path, format=format) for path in paths]
    with Bars() as bars:
        for run in runs:
            bars.named(run.name)
            audits.append(look(run, progress=bars, **options))
    return audits


def _compare(audits: list[Audit], json: bool, html: Path | None) -> None:
    from thermo_opt.audit import compare as tabulate
    from thermo_opt.report import terminal

    table = tabulate(audits)
    order = {run: position for position, run in reversed(list(enumerate(table["run"])))}
    audits = sorted(audits, key=lambda audit: order[audit.run])
    if not json:
        terminal.print_comparison(audits, table)
    _finish(audits, json, html)


def _finish(audits: list[Audit], json: bool, html: Path | None) -> None:
    from thermo_opt.audit import summaries_json
    from thermo_opt.report import terminal, write_report

    if html is not None:
        written = write_report(audits, html)
        if not json:
            terminal.say(f"\nReport: {written.resolve()}")
    if json:
        terminal.print_json(summaries_json(audits))


def _facts(run: Run) -> dict[str, Any]:
    """What `info` says of a run; null where the record doesn't tell."""
    snapshots = run.snapshots
    settings = {
        str(key): value
        for key, value in run.info.settings.items()
        if isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))
    }
    parameters = run.info.parameters
    groups = {name.split("/")[0]: None for name in snapshots[0].names()} if len(snapshots) else {}
    return {
        "run": run.name,
        "path": str(run.path),
        "format": run.format,
        "optimizer": run.info.optimizer,
        "settings": settings or None,
        "likelihood": run.info.likelihood,
        "batch_size": run.info.batch_size,
        "snapshots": len(snapshots),
        "first_step": snapshots[0].step if len(snapshots) else None,
        "last_step": snapshots[-1].step if len(snapshots) else None,
        "recorded": list(groups),
        "logged": [str(column) for column in run.steps.columns],
        "parameters": sum(_count(p) for p in parameters) if parameters else None,
        "probe": run.info.probe_fingerprint,
    }


def _count(parameter: Any) -> int:
    product = 1
    for size in parameter["shape"]:
        product *= int(size)
    return product


def check_page(path: Path | None, option: str) -> None:
    """Refuse, before any work, a report page that can't be written or would replace a file of somebody's own."""
    if path is None:
        return
    if path.exists() and not _is_report(path):
        raise InputError(f"{path} exists and is no thermo-opt report: name another file with {option}.")
    if not path.parent.is_dir():
        raise InputError(f"{path} can't be written, as its folder doesn't exist: make it, or name another file.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} can't be written, as its folder is read-only: name another with {option}.")


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'name="generator" content="thermo-opt' in file.read(4096)


def _refuse(sentence: str) -> int:
    print("thermo-opt:", " ".join(line.strip() for line in sentence.splitlines()), file=sys.stderr)
    return 2


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a sentence on stderr, without the line of code that gave it."""
    print(f"thermo-opt: {message}", file=sys.stderr)


def _confess() -> int:
    traceback.print_exc()
    print("thermo-opt: this is a bug of ours; please report it with the lines above.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
