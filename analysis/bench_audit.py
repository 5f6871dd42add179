"""Benchmarks of recording and auditing: ``python -m analysis.bench_audit``. Every figure is a ratio taken in one run.

(a) Recorder overhead on a small CNN, every=10, over the bare loop plus the probe's own forward passes: target ≤ 1.05;
(b) optimizer-state lens against just reading the same safetensors into memory: target ≥ 0.5 of the bytes per second;
(c) outputs lens against the bare ``sqrt → multiply → sum → arccos`` NumPy pass over the same arrays: target ≥ 0.5;
(d) peak memory of an audit of 2,000 snapshots over one of 50: target within 10 %.
"""

from __future__ import annotations

import itertools
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import thermo_opt as to
from analysis.timing import interleaved, ratio, report
from thermo_opt.audit.walk import walk
from thermo_opt.manifold import embed


def recorder_overhead(scratch: Path) -> dict[str, Any]:
    """(a): median over rounds of recorded time over unrecorded time with the same probe passes."""
    steps, every = 60, 10
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    probe = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def training(record: bool) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def step() -> torch.Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        if record:
            path = scratch / "overhead"
            shutil.rmtree(path, ignore_errors=True)
            with to.Recorder(path, model=model, optimizer=optimizer, probe=probe, every=every) as recorder:
                for _ in range(steps):
                    recorder.step(loss=step())
            return
        for k in range(steps + 1):
            if k % every == 0:
                model.eval()
                with torch.no_grad():
                    model(probe[0])
                model.train()
            if k < steps:
                float(step().detach())  # the loss is read each step, as any training loop that logs does

    seconds = interleaved({"bare": lambda: training(False), "recorded": lambda: training(True)}, repeats=15)
    value = ratio(seconds, "recorded", "bare")
    return {"benchmark": "(a) Recorder, every=10: time / (bare + probe passes)", "ratio": value, "target": "≤ 1.05"}


def optimizer_state_speed(scratch: Path) -> dict[str, Any]:
    """(b): bytes per second of the lens over those of reading the same files into memory."""
    path = scratch / "state"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 2048), nn.GELU(), nn.Linear(2048, 1024))
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x = torch.randn(16, 1024)
    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=None, every=1, params=True, moments=True, batch_size=16
    ) as recorder:
        for _ in range(5):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    files = sorted((path / "snapshots").glob("*.safetensors"))

    def read() -> None:
        for file in files:
            load_file(file)

    seconds = interleaved({"read": read, "lens": lambda: to.audit(path, lens="optimizer-state")}, repeats=9)
    value = ratio(seconds, "read", "lens")
    return {"benchmark": "(b) optimizer-state lens: bytes/s over bare reading", "ratio": value, "target": "≥ 0.5"}


class _Arrays:
    """Predictions already in memory, as the bare pass has them."""

    likelihood, sigma2 = "categorical", 1.0

    def __init__(self, logits: np.ndarray, targets: np.ndarray) -> None:
        self.logits, self.targets, self.steps = logits, targets, range(len(logits))

    def point(self, index: int) -> Any:
        return embed(self.logits[index], self.targets)


def outputs_speed(classes: int, examples: int) -> dict[str, Any]:
    """(c): bare pass's time over the lens's, losses, gradients and coarse-graining curves included."""
    rng = np.random.default_rng(0)
    logits = np.cumsum(rng.normal(size=(40, examples, classes)) * 0.1, axis=0)
    targets = rng.integers(0, classes, size=examples)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)

    def bare() -> None:
        for p, q in itertools.pairwise(probabilities):
            np.arccos(np.minimum((np.sqrt(p) * np.sqrt(q)).sum(axis=-1), 1.0))

    source = _Arrays(logits, targets)
    seconds = interleaved({"bare": bare, "lens": lambda: walk(source, range(len(logits)))}, repeats=9)
    value = ratio(seconds, "bare", "lens")
    return {
        "benchmark": f"(c) outputs lens, {examples} x {classes}: speed over the bare NumPy pass",
        "ratio": value,
        "target": "≥ 0.5",
    }


def memory(scratch: Path) -> dict[str, Any]:
    """(d): peak resident memory of auditing 2,000 snapshots over 50, each in a fresh process."""
    rng = np.random.default_rng(0)
    peaks = []
    for count in (50, 2000):
        path = scratch / f"memory-{count}"
        path.mkdir()
        z = rng.normal(size=(2000, 10)).astype(np.float32)
        for k in range(count):
            z += 0.01 * rng.normal(size=z.shape).astype(np.float32)
            save_file({"probe/logits": z}, path / f"{k:08d}.safetensors")
        out = subprocess.run(
            [sys.executable, "-m", "analysis.bench_audit", "--peak", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(out.stdout.split()[-1]))
    return {"benchmark": "(d) peak memory, 2,000 over 50 snapshots", "ratio": peaks[1] / peaks[0], "target": "≤ 1.10"}


def main() -> None:
    """Run all four, print the table, write the CSV."""
    if sys.argv[1:2] == ["--peak"]:
        to.audit(sys.argv[2], lens="outputs")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = [
            recorder_overhead(scratch),
            optimizer_state_speed(scratch),
            outputs_speed(10, 10_000),
            outputs_speed(1000, 500),
            memory(scratch),
        ]
    print(report("Recording and auditing", rows, "bench_audit"))


if __name__ == "__main__":
    main()
