"""What every benchmark here shares: interleaved timing, ratios by medians, a stated machine, a
table and a CSV."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int = 7
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns so that a drifting machine hits all alike;
    one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, over: str) -> float:
    """Median over rounds of ``name``'s time divided by ``over``'s in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[over], strict=True))


def machine() -> str:
    """Processor kind, threads and versions, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f"{device}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, NumPy {np.__version__}"
    )


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Print the rows as a table; returns them."""
    frame = pd.DataFrame(rows)
    table = Table(title=f"{title}\n{machine()}")
    for column in frame.columns:
        table.add_column(str(column))
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    Console().print(table)
    return frame


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    shown: Sequence[str] | None = None,
) -> Path:
    """Print the rows as a table (the columns ``shown``; None: all) and write them to
    ``analysis/results/<name>.csv`` with the machine; returns the path."""
    show(title, rows if shown is None else [{key: row[key] for key in shown} for row in rows])
    frame = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    if "machine" not in frame:
        frame = frame.assign(machine=machine())
    frame.to_csv(path, index=False)
    return path
