"""Benchmarks of recording and auditing: ``python -m analysis bench audit [--rows efghi]``. Every
figure but (e)'s seconds is a ratio taken in one run.

(a) Recorder overhead on a small CNN, every=10, over the bare loop plus the probe's own forward
passes: target ≤ 1.05; (b) optimizer-state lens against just reading the same safetensors into
memory with ``load_file``: target ≥ 0.5 of the bytes per second; beside it, without a target,
against reading into memory that was used before, which no fresh process has; (c) outputs lens, from
the files, against reading them with ``load_file`` and the bare ``sqrt → multiply → sum → arccos``
NumPy pass over their probabilities: target ≥ 0.5; (d) peak memory of an audit of 2,000 snapshots
over one of 50: target within 10 %; (e) processor seconds to open and audit 10,000 snapshots of
1,000 outputs (100 examples of 10 classes) in one process: target ≤ 15; (f) predictions in memory
(`audit_predictions`) over the same in recorded files; (g) memory above an idle process of
predictions from an iterator, 200 snapshots over 20; (h) sketched predictions, 16 sums of 4,000
classes, over whole ones: time of an audit, and bytes; (i) processor milliseconds, without a target:
to sketch 1,000 predictions of 50,257 classes, and to open and audit a snapshot of 50,000 sketched
ones.

``--rows``: measure these alone, and leave the others of the CSV as they are.

(a), (b) and (c) run in fresh processes, their sides taking turns. In those of (a) and (c) the C
library keeps freed memory: else whether large buffers, the training's own among them, come from
fresh pages is a lottery, many times the difference sought.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import thermo_opt as to
from analysis import bench_pareto
from analysis.timing import RESULTS, interleaved, machine, report
from thermo_opt.runs.format import write_tensors
from thermo_opt.runs.probe import make_probe, probe_tensors
from thermo_opt.runs.probing import ProbeObserver

DATA = Path(__file__).parent.parent / "data"
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Environment in which the C library keeps freed memory."""


def recorder_overhead(scratch: Path) -> dict[str, Any]:
    """(a): recorded time over unrecorded time with the same probe passes, as `_overhead` measures
    it."""
    ratios = [float(text) for text in _fresh("--overhead", scratch, env=KEEP)]
    return _row("(a) Recorder, every=10: time / (bare + probe passes)", ratios, "≤ 1.05")


def _overhead(scratch: Path, rounds: int = 12) -> list[float]:
    """Ratio of each round: both loops once, in turn the one and the other first, each recording
    into a new folder."""
    steps, every = 120, 10
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    probe = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def training(path: Path | None) -> float:
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

        gc.collect()
        start = time.perf_counter()
        if path is not None:
            with to.Recorder(
                path, model=model, optimizer=optimizer, probe=probe, every=every
            ) as recorder:
                for _ in range(steps):
                    recorder.step(loss=step())
        else:
            for k in range(steps + 1):
                if k % every == 0:
                    model.eval()
                    with torch.no_grad():
                        model(probe[0])
                    model.train()
                if k < steps:
                    float(
                        step().detach()
                    )  # the loss is read each step, as any training loop that logs does
        return time.perf_counter() - start

    ratios = []
    for k in range(-1, rounds):  # the first warms up
        pair = {
            side: training(scratch / f"overhead{k}" if side else None)
            for side in (k % 2 == 0, k % 2 == 1)
        }
        ratios.append(pair[True] / pair[False])
    return ratios[1:]


def optimizer_state_speed(scratch: Path, rounds: int = 7) -> list[dict[str, Any]]:
    """(b): bytes per second of the lens over those of reading the same files, the page cache warm:
    `_once` of each."""
    path = scratch / "state"
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 2048), nn.GELU(), nn.Linear(2048, 1024)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x = torch.randn(16, 1024)
    with to.Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=None,
        every=1,
        params=True,
        moments=True,
        batch_size=16,
    ) as recorder:
        for _ in range(10):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    seconds: dict[str, list[float]] = {"load": [], "reuse": [], "lens": []}
    for _ in range(rounds):
        for side, found in seconds.items():
            found.append(float(_fresh("--once", side, path)[0]))
    sides = {
        "load": "(b) optimizer-state lens: bytes/s over load_file of each snapshot",
        "reuse": "(b) optimizer-state lens: bytes/s over reading into memory used before",
    }
    return [
        _row(
            text,
            [a / b for a, b in zip(seconds[side], seconds["lens"], strict=True)],
            "≥ 0.5" if side == "load" else "",
        )
        for side, text in sides.items()
    ]


def _once(side: str, path: Path) -> float:
    """Seconds of one pass over a run's snapshots, everything imported and no snapshot read before
    in this process."""
    to.audit(DATA / "digits-adam", lens="outputs")  # imports what an audit needs
    files = sorted((path / "snapshots").glob("*.safetensors"))
    memory = (
        bytearray(b"\1") * max(file.stat().st_size for file in files)
        if side == "reuse"
        else bytearray()
    )
    start = time.perf_counter()
    if side == "lens":
        to.audit(path, lens="optimizer-state")
    for file in files if side != "lens" else ():
        if side == "load":
            load_file(file)
        else:
            with open(file, "rb", buffering=0) as source:
                source.readinto(memory)
    return time.perf_counter() - start


def _fresh(*arguments: object, env: Mapping[str, str] | None = None) -> list[str]:
    """What this benchmark prints in a process of its own, word by word."""
    command = [sys.executable, "-m", "analysis.bench_audit", *map(str, arguments)]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **(env or {})}
    )
    return said.stdout.split()


def _row(benchmark: str, ratios: Sequence[float], target: str) -> dict[str, Any]:
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {
        "benchmark": benchmark,
        "value": middle,
        "target": target,
        "quartiles": f"{low:.3f} to {high:.3f}",
    }


def outputs_speed(scratch: Path, classes: int, examples: int) -> dict[str, Any]:
    """(c): bare pass's time over the lens's, as `_outputs` measures it."""
    path = scratch / f"outputs-{classes}"
    path.mkdir()
    rng = np.random.default_rng(0)
    logits = np.cumsum(rng.normal(size=(40, examples, classes)) * 0.1, axis=0)
    for k, z in enumerate(logits):
        save_file({"probe/logits": z}, path / f"{k:08d}.safetensors")
    save_file({"targets": rng.integers(0, classes, size=examples)}, path / "probe.safetensors")
    ratios = [float(text) for text in _fresh("--outputs", path, env=KEEP)]
    return _row(
        f"(c) outputs lens, {examples} x {classes}: speed over the bare NumPy pass", ratios, "≥ 0.5"
    )


def _outputs(path: Path) -> list[float]:
    """Ratio of each round; the lens's side includes losses and coarse-graining curves."""
    files = sorted(path.glob("0*.safetensors"))

    def bare() -> None:
        before = None
        for file in files:
            p = np.exp(load_file(file)["probe/logits"])
            p /= p.sum(axis=-1, keepdims=True)
            if before is not None:
                np.arccos(np.minimum((np.sqrt(before) * np.sqrt(p)).sum(axis=-1), 1.0))
            before = p

    sides = {"bare": bare, "lens": lambda: to.audit(path, lens="outputs")}
    seconds = interleaved(sides, repeats=9)
    return [a / b for a, b in zip(seconds["bare"], seconds["lens"], strict=True)]


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
        peaks.append(float(_fresh("--peak", path)[0]))
    return {
        "benchmark": "(d) peak memory, 2,000 over 50 snapshots",
        "value": peaks[1] / peaks[0],
        "target": "≤ 1.10",
        "quartiles": "",
    }


def many_snapshots(scratch: Path, rounds: int = 3) -> dict[str, Any]:
    """(e): processor seconds of opening and auditing them."""
    bench_pareto.write_runs(scratch / "many", 1, 10_000, examples=100)
    path = scratch / "many" / "run000"
    seconds = [float(_fresh("--processor", path)[0]) for _ in range(rounds)]
    return _row("(e) 10,000 snapshots of 100 x 10: processor seconds", seconds, "≤ 15")


def in_memory(scratch: Path) -> dict[str, Any]:
    """(f): time of predictions in memory over that of the same in files."""
    bench_pareto.write_runs(scratch / "memory", 1, 500, examples=200)
    path = scratch / "memory" / "run000"
    run = to.load_run(path)
    logits = torch.stack([snapshot.load("probe/logits") for snapshot in run.snapshots])
    assert run.probe is not None
    targets, steps = run.probe.targets, [snapshot.step for snapshot in run.snapshots]
    sides = {
        "memory": lambda: to.audit_predictions(logits, targets, steps=steps),
        "files": lambda: to.audit(path, lens="outputs"),
    }
    seconds = interleaved(sides, repeats=7)
    ratios = [a / b for a, b in zip(seconds["memory"], seconds["files"], strict=True)]
    return _row(
        "(f) predictions in memory: time over recorded files, 500 x 200 x 10", ratios, "≤ 1"
    )


def iterator() -> dict[str, Any]:
    """(g): memory that predictions from an iterator take, of many snapshots over few; what the
    process holds before is subtracted."""
    taken = [float(_fresh("--iterator", count)[0]) for count in (20, 200)]
    return _row(
        "(g) predictions of an iterator: memory, 200 over 20 snapshots",
        [taken[1] / taken[0]],
        "≤ 1.5",
    )


def sketched(scratch: Path) -> list[dict[str, Any]]:
    """(h): an audit of sketches over one of whole predictions, and their bytes."""
    for side in ("whole", "sketch"):
        torch.manual_seed(0)
        model = nn.Linear(16, 4_000)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        probe = torch.randn(256, 16), torch.randint(4_000, (256,))
        options: dict[str, Any] = {"sketch": 16} if side == "sketch" else {}
        with to.Recorder(
            scratch / side, model=model, optimizer=optimizer, probe=probe, **options
        ) as recorder:
            for _ in range(30):
                loss = nn.functional.cross_entropy(model(probe[0]), probe[1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)
    sides = {
        side: lambda side=side: to.audit(scratch / side, lens="outputs")
        for side in ("whole", "sketch")
    }  # type: ignore[misc]
    seconds = interleaved(sides, repeats=7)
    ratios = [a / b for a, b in zip(seconds["sketch"], seconds["whole"], strict=True)]
    size = {
        side: sum(file.stat().st_size for file in (scratch / side / "snapshots").iterdir())
        for side in sides
    }
    what = "16 sums of 4,000 classes over whole predictions"
    return [
        _row(f"(h) sketches, {what}: time of an audit", ratios, "≤ 1"),
        _row(f"(h) sketches, {what}: bytes", [size["sketch"] / size["whole"]], "≤ 0.01"),
    ]


def large_sketches(
    scratch: Path, snapshots: int = 40, tokens: int = 50_000
) -> list[dict[str, Any]]:
    """(i): what sketching a prediction, and auditing a snapshot of many, costs a processor."""
    classes, width = 50_257, 16
    torch.manual_seed(0)
    logits = torch.randn(512, classes)
    observed = ProbeObserver(
        nn.Identity(), (logits, torch.zeros(512, dtype=torch.long)), likelihood="categorical",
        sketch=width,
    )  # fmt: skip
    observed.observe()  # draws the signs
    taken = []
    for _ in range(5):
        start = time.process_time()
        observed.observe()
        taken.append((time.process_time() - start) / 512 * 1e6)
    (scratch / "snapshots").mkdir()
    inputs, targets = torch.zeros(tokens, 1), torch.zeros(tokens, dtype=torch.long)
    header = {
        "schema_version": 1, "name": "many", "likelihood": "categorical",
        "probe_fingerprint": make_probe(inputs, targets).fingerprint,
        "sketch": {"width": width, "seed": 0},
    }  # fmt: skip
    (scratch / "run.json").write_text(json.dumps(header))
    write_tensors(scratch / "probe.safetensors", probe_tensors(inputs, targets))
    moved = 0.1 * torch.randn(tokens, width)
    for k in range(snapshots):
        moved += 0.01 * torch.randn(tokens, width)
        held = {
            "probe/sketch": moved,
            "probe/log_p_y": torch.full((tokens,), -9.0 + 0.1 * k, dtype=torch.float64),
            "probe/floor": torch.tensor(0.0, dtype=torch.float64),
        }
        write_tensors(scratch / "snapshots" / f"{k:08d}.safetensors", held, {"step": str(k)})
    seconds = [float(_fresh("--processor", scratch)[0]) for _ in range(3)]
    milliseconds = [1e3 * second / snapshots for second in seconds]
    return [
        _row("(i) processor ms to sketch 1,000 predictions of 50,257 classes, 16 sums", taken, ""),
        _row(
            "(i) processor ms to audit a snapshot of 50,000 sketches of 16 sums", milliseconds, ""
        ),
    ]


def main(arguments: list[str]) -> None:
    """Run the rows, print the table, write the CSV."""
    parser = argparse.ArgumentParser(
        prog="analysis bench audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default="abcdefghi", help="which rows, by their letters")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args(arguments)
    measured: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "a": lambda scratch: [recorder_overhead(scratch)],
        "b": optimizer_state_speed,
        "c": lambda scratch: [
            outputs_speed(scratch, 10, 10_000),
            outputs_speed(scratch, 1000, 500),
        ],
        "d": lambda scratch: [memory(scratch)],
        "e": lambda scratch: [many_snapshots(scratch)],
        "f": lambda scratch: [in_memory(scratch)],
        "g": lambda _: [iterator()],
        "h": sketched,
        "i": large_sketches,
    }
    file = RESULTS / "bench_audit.csv"
    kept = pd.read_csv(file) if set(options.rows) < set(measured) and file.exists() else None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for letter in sorted(measured):
            if letter in options.rows:
                (place := Path(name) / letter).mkdir()
                rows += measured[letter](place)
            elif kept is not None:
                old = kept[kept["benchmark"].str.startswith(f"({letter})")]
                rows += [{str(k): v for k, v in row.items()} for row in old.to_dict("records")]
    for row in rows:
        row.setdefault("machine", machine())
    shown = [name for name in rows[0] if name != "machine"]
    print(report("Recording and auditing", rows, "bench_audit", shown))


def _in_this_process(arguments: list[str]) -> None:
    """One side of a measurement, in a process of its own."""
    match arguments:
        case ["--overhead", scratch]:
            print(*_overhead(Path(scratch)))
        case ["--once", side, path]:
            print(_once(side, Path(path)))
        case ["--outputs", path]:
            print(*_outputs(Path(path)))
        case ["--peak", path]:
            to.audit(path, lens="outputs")
            print(_peak())
        case ["--processor", path]:
            to.audit(DATA / "digits-adam", lens="outputs")  # imports what an audit needs
            start = time.process_time()
            to.audit(path, lens="outputs")
            print(time.process_time() - start)
        case ["--iterator", count]:
            print(_iterated(int(count)))


def _peak() -> int:
    """Most kilobytes that this process held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _iterated(count: int) -> int:
    """Kilobytes above what was held before, of predictions that an iterator gives, 4 MB each."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 10, 100_000)
    to.audit_predictions(rng.normal(size=(2, 40, 10)), targets[:40])  # imports what an audit needs
    before = _peak()

    def made() -> Iterator[np.ndarray]:
        for _ in range(count):
            yield rng.normal(size=(100_000, 10)).astype(np.float32)

    to.audit_predictions(made(), targets)
    return _peak() - before


if __name__ == "__main__":
    _in_this_process(sys.argv[1:])
