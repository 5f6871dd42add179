"""Runs larger than memory: how much anonymous memory their audit takes, and how long.

    python -m analysis large [--gigabytes 10] [--memory 1] [--folder /tmp]

Records two runs with the Recorder, one after the other, in a folder of its own below ``--folder``,
audits each with the command line in a process of its own, and removes it:

- predictions: a probe of 512 examples and 32,000 classes, 66 MB a snapshot, through the outputs
  lens;
- weights: 12 million parameters and Adam's moments, 144 MB a snapshot, through the optimizer-state
  lens.

Anonymous memory is what a process holds that is no copy of a file (``RssAnon``, looked at every
20 ms); pages of the snapshots' files the system keeps and drops as it likes. Prints one row a run;
exit status 1 where an audit failed or took more than ``--memory`` GB. Writes large.csv. Linux.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from analysis.timing import report

GB = 10**9
EXAMPLES, CLASSES, FEATURES = 512, 32_000, 16
SIDES = (3_000, 4_000)
PAUSE = 0.02
LENSES = {"predictions": "outputs", "weights": "optimizer-state"}


def record(kind: str, path: Path, size: int) -> int:
    """Train and record at every step until the snapshots hold ``size`` bytes; how many there are
    then."""
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES, FEATURES)
    y = torch.randint(CLASSES, (EXAMPLES,))
    if kind == "predictions":
        model: nn.Module = nn.Linear(FEATURES, CLASSES)
        recorded: dict[str, Any] = {"probe": (x, y)}
        snapshot = 4 * EXAMPLES * CLASSES
    else:
        model = nn.Linear(*SIDES)
        recorded = {"probe": None, "params": True, "moments": True}
        snapshot = 3 * 4 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    count = max(2, -(-size // snapshot))
    with to.Recorder(path, model=model, optimizer=optimizer, batch_size=32, **recorded) as recorder:
        for _ in range(count - 1):
            if kind == "predictions":
                rows = torch.randint(EXAMPLES, (32,))
                loss = functional.cross_entropy(model(x[rows]), y[rows])
            else:
                loss = model(torch.randn(32, SIDES[0])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return count


def watched(command: list[str], output: Path) -> tuple[int, int, float]:
    """(exit status, most anonymous bytes, seconds) of a command whose output goes to a file."""
    start, most = time.perf_counter(), 0
    with open(output, "wb") as file, subprocess.Popen(command, stdout=file) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = [line for line in status.read_text().splitlines() if "RssAnon" in line]
            most = max([most, *(1024 * int(line.split()[1]) for line in found)])
            time.sleep(PAUSE)
        return process.returncode, most, time.perf_counter() - start


def measured(kind: str, folder: Path, size: int) -> dict[str, Any]:
    """Record a run, audit it, and remove it."""
    path = folder / kind
    start = time.perf_counter()
    count = record(kind, path, size)
    spent = time.perf_counter() - start
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    command = [sys.executable, "-m", "thermo_opt.cli", "audit", str(path), "--json"]
    output = folder / "audit.json"
    status, most, seconds = watched([*command, "--lens", LENSES[kind]], output)
    audited = json.loads(output.read_text())["runs"][0]["steps"] + 1 if status == 0 else 0
    shutil.rmtree(path)
    return {
        "run": kind,
        "lens": LENSES[kind],
        "snapshots": count,
        "GB": round(held / GB, 2),
        "recorded in s": round(spent),
        "snapshots audited": audited,
        "anonymous GB": round(most / GB, 2),
        "audited in s": round(seconds),
    }


def main(arguments: list[str]) -> int:
    """Record, audit, report."""
    parser = argparse.ArgumentParser(
        prog="analysis large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=10, help="size of each run")
    parser.add_argument("--memory", type=float, default=1, help="GB that an audit may take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args(arguments)
    size = int(options.gigabytes * GB)
    free = shutil.disk_usage(options.folder).free
    if free < 1.2 * size:
        raise to.InputError(
            f"{options.folder} has {free / GB:.1f} GB free, and a run takes {size / GB:.1f} GB: "
            "give another --folder, or fewer --gigabytes"
        )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = [measured(kind, Path(name), size) for kind in LENSES]
    report("Runs larger than memory", rows, "large")
    wrong = [
        row
        for row in rows
        if row["snapshots audited"] != row["snapshots"] or row["anonymous GB"] > options.memory
    ]
    return 1 if wrong else 0
