"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from thermo_opt.errors import InputError

RunPath = Annotated[
    Path,
    typer.Argument(help="Folder or file that a training run left on disk.", show_default=False),
]
RunPaths = Annotated[list[Path], typer.Argument(help="Recorded runs.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Html = Annotated[
    Path | None, typer.Option(help="Also write a report page, one file that opens offline.")
]
Lens = Annotated[
    list[str] | None,
    typer.Option(
        help="outputs, parameters, optimizer-state (default: these) or counterfactual; may be "
        "repeated."
    ),
]
Clock = Annotated[
    str | None,
    typer.Option(
        help=(
            "What counts as time: step, flow, wall, examples or tokens. Default: the "
            "run's own, or step."
        )
    ),
]
Stride = Annotated[int, typer.Option(help="Use every M-th snapshot.", metavar="M")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Architecture to replay weights with: package.module:factory, or the folder of a "
        "Hugging Face model; of an adapter's run its base."
    ),
]
Probe = Annotated[
    Path | None,
    typer.Option(
        help="Inputs and targets to replay on: safetensors, npz, parquet, .pt, or a datasets "
        "folder."
    ),
]
Key = Annotated[
    str | None,
    typer.Option(help="Key of the state dict to read, where a file holds several models'."),
]
Format = Annotated[str | None, typer.Option(help="Layout of the run, where its files don't tell.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help=(
            "Loss terms of one optimizer step: examples, or in a language model tokens, counted "
            "over accumulated batches and all devices; for the optimizer-state lens."
        )
    ),
]
Label = Annotated[
    list[str] | None,
    typer.Option(
        help="Recorded setting to name runs by, as lr or batch_size; may be repeated.",
        metavar="SETTING",
    ),
]
Likelihood = Annotated[
    str | None,
    typer.Option(
        help=(
            "What the outputs are where the record doesn't say: categorical, bernoulli, "
            "gaussian, poisson or heteroscedastic."
        )
    ),
]
Sigma2 = Annotated[
    float | None,
    typer.Option(help="Variance of gaussian outputs. Default: estimated from the residuals."),
]
Kind = Annotated[
    str | None,
    typer.Option(help="Outputs of classes as logits, log-probabilities or probabilities."),
]
Steps = Annotated[
    str | None, typer.Option(help="Intervals the parameter lens looks at.", metavar="A:B:C")
]
Jobs = Annotated[int, typer.Option(help="Processes.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Cluster whose workers do the work: dask://HOST:PORT of a Dask scheduler, or "
        "ray://HOST:PORT of a Ray cluster's head; they need the runs under the same paths."
    ),
]
Output = Annotated[Path, typer.Option(help="Where to write the report page.")]


LeftOut = tuple[str, str]
"""A run that could not be read or audited, and why."""


def with_settings(run: str, settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A run's name with these recorded settings, as ``run (lr 0.1)``."""
    said = ", ".join(f"{key} {setting(run, settings, key)}" for key in keys)
    return f"{run} ({said})" if keys else run


def told_apart(names: Sequence[str], paths: Sequence[str | Path]) -> list[str]:
    """Names of runs, with the paths of those that share one."""
    return [
        f"{name} ({path})" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def setting(run: str, settings: Mapping[str, Any], key: str) -> str:
    """A run's recorded setting as text; InputError naming those it has."""
    if key not in settings:
        known = ", ".join(sorted(settings)) or "none"
        raise InputError(f"{run}: its record has no setting {key!r}: use one of {known}")
    value = settings[key]
    return f"{value:g}" if isinstance(value, float) else str(value)
