"""`thermo-opt pareto` on 200 recorded runs of 500 snapshots (50 x 10 predictions): seconds from the
shell's point of view.

`python -m analysis bench pareto`: two minutes, of which all but seconds go into writing 100,000
small files. Runs one and two processes in turn, three times; seeds fixed.
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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from analysis.timing import report
from thermo_opt.runs.probe import make_probe, probe_tensors
from thermo_opt.runs.tensors import checksum, metadata_checksum

RUNS, SNAPSHOTS, EXAMPLES, CLASSES = 200, 500, 50, 10


def write_runs(folder: Path, runs: int = RUNS, snapshots: int = SNAPSHOTS) -> list[str]:
    """Runs that drift towards their targets at their own speed and noise, laid out as the Recorder
    does."""
    rng = np.random.default_rng(0)
    inputs, targets = torch.zeros(EXAMPLES, 1), torch.tensor(rng.integers(0, CLASSES, EXAMPLES))
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
        z = 0.1 * rng.normal(size=(EXAMPLES, CLASSES))
        for k in range(snapshots):
            logits, metadata = torch.tensor(z, dtype=torch.float32), {"step": str(k)}
            sums = {"probe/logits": checksum(logits), "": metadata_checksum(metadata)}
            data = save({"probe/logits": logits}, metadata | {"checksums": json.dumps(sums)})
            (path / "snapshots" / f"{k:08d}.safetensors").write_bytes(data)
            z = z + speed * drift / (1 + 0.02 * speed * k) + noise * rng.normal(size=z.shape)
        paths.append(str(path))
    return paths


def seconds(paths: list[str], jobs: int) -> tuple[float, float]:
    """Wall and processor seconds of the command, Python's start included."""
    command = [
        sys.executable,
        "-m",
        "thermo_opt.cli",
        "pareto",
        *paths,
        "--target-loss",
        "0.5",
        "--json",
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--jobs", str(jobs)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - start, used


def main(arguments: list[str]) -> None:
    """Write the runs, time the command, print the table, write the CSV."""
    argparse.ArgumentParser(prog="analysis bench pareto", description=__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        paths = write_runs(Path(name))
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(3):
            for jobs, taken in found.items():
                taken.append(seconds(paths, jobs))
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = [
        {
            "benchmark": f"{RUNS} runs x {SNAPSHOTS} snapshots, {jobs} process{'es' * (jobs > 1)}",
            "seconds": median(wall for wall, _ in taken),
            "processor seconds": median(used for _, used in taken),
            "load": load,
            "target": "< 10 s",
        }
        for jobs, taken in found.items()
    ]
    print(report("Speed-cost front of many runs", rows, "bench_pareto"))
