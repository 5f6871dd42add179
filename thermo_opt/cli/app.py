"""The program ``thermo-opt``: parse, call, print. Torch and the rest are imported inside the
command that needs them."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from thermo_opt.cli.advise import advise
from thermo_opt.cli.audit import audit, compare
from thermo_opt.cli.demo import demo
from thermo_opt.cli.info import info
from thermo_opt.cli.pareto import pareto
from thermo_opt.cli.sweep import sweep
from thermo_opt.cli.verify import verify
from thermo_opt.errors import InputError, printable

_BROKEN_PIPE = 128 + 13
"""Exit status of a process that SIGPIPE ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 bad input (a sentence on stderr),
    1 our bug, and 141 when whoever read the output has seen enough (``| head``), as the shell says
    of tools that a pipe ended.
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
        return _BROKEN_PIPE
    return status


def _status(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that lacks a letter shows a question mark for it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            application()(args=arguments, prog_name="thermo-opt")
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
            return _report_bug()
        return _refuse(f"{error.filename}: {error.strerror}")
    except Exception:
        return _report_bug()
    return 0


def application() -> typer.Typer:
    """The commands and their options."""
    app = typer.Typer(
        help=(
            "Thermodynamics of training runs: what a path through predictions cost, "
            "and what no path could have saved."
        ),
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for command in (audit, compare, advise, info, demo, pareto, sweep, verify):
        app.command()(command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from thermo_opt import __version__

        print(__version__)
        raise typer.Exit


def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options before the command."""


def _refuse(sentence: str) -> int:
    text = " ".join(line.strip() for line in sentence.splitlines())
    print("thermo-opt:", printable(text), file=sys.stderr)
    return 2


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a sentence on stderr, without the line of code that gave it."""
    print(f"thermo-opt: {printable(str(message))}", file=sys.stderr)


def _report_bug() -> int:
    traceback.print_exc()
    print(
        "thermo-opt: this is a bug of ours; please report it with the lines above.", file=sys.stderr
    )
    return 1
