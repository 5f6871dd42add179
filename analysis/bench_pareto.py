"""`thermo-opt pareto` on 200 recorded runs of 500 snapshots (50 x 10 predictions): seconds from the
shell's point of view.

`python -m analysis bench pareto`: two minutes, of which all but seconds go into writing 100,000
small files. Runs one process, two, and two workers of a Dask scheduler in turn, three times
(``--rounds``); seeds fixed. Processor seconds are those of the command and its workers; of Dask's
scheduler they are left out. Ends with exit status 1 where the three didn't print the same numbers,
to the digit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from distributed import Client, LocalCluster
from safetensors.torch import save

from analysis.timing import report
from thermo_opt.runs.probe import make_probe, probe_tensors
from thermo_opt.runs.tensors import checksum, metadata_checksum

RUNS, SNAPSHOTS, EXAMPLES, CLASSES = 200, 500, 50, 10


def write_runs(
    folder: Path, runs: int = RUNS, snapshots: int = SNAPSHOTS, examples: int = EXAMPLES
) -> list[str]:
    """Runs that drift towards their targets at their own speed and noise, laid out as the Recorder
    does."""
    rng = np.random.default_rng(0)
    inputs, targets = torch.zeros(examples, 1), torch.tensor(rng.integers(0, CLASSES, examples))
    probe = probe_tensors(inputs, targets)
    fingerprint = make_probe(inputs, targets).fingerprint
    drift = 0.05 * np.eye(CLASSES)[targets.numpy()]
    paths = []
    for number in range(runs):
        path = folder / f"run{number:03d}"
        (path / "snapshots").mkdir(parents=True)
        header = {"schema_version": 1, "name": path.name, "optimizer": f"method {number % 4}"}
        header |= {"likelihood": "categorical", "probe_fingerprint": fingerprint}
        (path / "run.json").write_text(json.dumps(header))
        (path / "probe.safetensors").write_bytes(save(probe))
        rows = [
            json.dumps({"step": k, "loss": 1 / k, "lr": 0.1, "wall": 0.01 * k})
            for k in range(1, snapshots)
        ]
        (path / "steps.jsonl").write_text("\n".join(rows) + "\n")
        speed, noise = np.exp(0.7 * rng.normal(size=2)) * (1.0, 0.03)
        z = 0.1 * rng.normal(size=(examples, CLASSES))
        for k in range(snapshots):
            logits, metadata = torch.tensor(z, dtype=torch.float32), {"step": str(k)}
            sums = {"probe/logits": checksum(logits), "": metadata_checksum(metadata)}
            data = save({"probe/logits": logits}, metadata | {"checksums": json.dumps(sums)})
            (path / "snapshots" / f"{k:08d}.safetensors").write_bytes(data)
            z = z + speed * drift / (1 + 0.02 * speed * k) + noise * rng.normal(size=z.shape)
        paths.append(str(path))
    return paths


@dataclass(frozen=True)
class Taken:
    """What one call of the command took and printed."""

    wall: float
    used: float
    printed: str


def call(paths: list[str], *options: str, workers: Client | None = None) -> Taken:
    """The command, Python's start included; ``workers``: a client of those that do the work."""

    def used() -> float:
        done = resource.getrusage(resource.RUSAGE_CHILDREN)
        there = 0.0 if workers is None else sum(workers.run(time.process_time).values())
        return done.ru_utime + done.ru_stime + there

    command = [sys.executable, "-m", "thermo_opt.cli", "pareto", *paths, "--json"]
    before, start = used(), time.perf_counter()
    done = subprocess.run(
        [*command, "--target-loss", "0.5", *options], check=True, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    return Taken(wall, used() - before, done.stdout)


def main(arguments: list[str]) -> int:
    """Write the runs, time the command, print the table, write the CSV."""
    parser = argparse.ArgumentParser(
        prog="analysis bench pareto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args(arguments)
    found: dict[str, list[Taken]] = {"1 process": [], "2 processes": [], "2 Dask workers": []}
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        paths = write_runs(Path(name))
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        for _ in range(options.rounds):
            found["1 process"].append(call(paths, "--jobs", "1"))
            found["2 processes"].append(call(paths, "--jobs", "2"))
            found["2 Dask workers"].append(call(paths, "--cluster", address, workers=client))
    load = os.getloadavg()[0]
    alone = found["1 process"][0].printed
    rows: list[dict[str, Any]] = [
        {
            "benchmark": f"{RUNS} runs x {SNAPSHOTS} snapshots, {how}",
            "seconds": median(one.wall for one in taken),
            "processor seconds": median(one.used for one in taken),
            "load": load,
            "same numbers": all(one.printed == alone for one in taken),
            "target": "< 10 s",
        }
        for how, taken in found.items()
    ]
    print(report("Speed-cost front of many runs", rows, "bench_pareto"))
    return 0 if all(row["same numbers"] for row in rows) else 1
