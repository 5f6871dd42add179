"""An audit: one run through every lens that its record supports, and why the others could not
look."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from thermo_opt.lenses.inputs import LensInputs
from thermo_opt.lenses.results import LENSES, LensAudit, summaries_json
from thermo_opt.writing import write_whole


@dataclass(frozen=True)
class Audit:
    """A run's audit: every lens its record supports, and why the others could not look.

    Attributes:
        run: The run's name.
        path: Where it lies.
        lenses: `LensAudit` by name, those that could look.
        missing: Why the others could not, by name.
        curve: The recorded training curve, one row per logged step (index ``step``).
        optimizer: Its name, where the record tells.
        probe: The probe's fingerprint.
        settings: What the record says of how the run was trained: learning rate, batch size, …
        inputs: What the lenses were given, so that the run can be audited at fewer snapshots.
    """

    run: str
    path: str
    lenses: dict[str, LensAudit]
    missing: dict[str, str] = field(default_factory=dict)
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    optimizer: str | None = None
    probe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: LensInputs | None = field(default=None, repr=False, compare=False)

    @property
    def headline(self) -> LensAudit:
        """The first of `LENSES` that the record supports."""
        return next(self.lenses[name] for name in LENSES if name in self.lenses)

    @property
    def steps(self) -> pd.DataFrame:
        """Per-interval scalars of the headline lens."""
        return self.headline.steps

    @property
    def summary(self) -> dict[str, Any]:
        """Summary of the headline lens."""
        return self.headline.summary

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """One summary per lens, headline first."""
        return [self.lenses[name].summary for name in LENSES if name in self.lenses]

    def named(self, run: str) -> Audit:
        """The same audit under another name."""
        lenses = {}
        for name, lens in self.lenses.items():
            summary = type(lens.summary)(lens.summary)
            summary["run"] = run
            lenses[name] = replace(lens, summary=summary)
        return replace(self, run=run, lenses=lenses)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The object that the command line prints (`summaries_json`); also written to ``path`` if
        given."""
        text = summaries_json([self])
        if path is not None:
            write_whole(path, text + "\n")
        return text

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write the one-file interactive report (opens offline) and return its path."""
        from thermo_opt.report import write_report  # plotly is slow to import

        return write_report([self], path)

    def plot(self) -> Any:
        """One Matplotlib figure with the audit's main panels; returns the
        ``matplotlib.figure.Figure``."""
        from thermo_opt.plots import overview

        return overview(self)
