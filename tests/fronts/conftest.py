"""Recorded runs with given predictions, written as the Recorder lays them out but without training
anything."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from thermo_opt.runs.probe import make_probe, probe_tensors


def write_run(
    path: Path, outputs: np.ndarray, targets: np.ndarray, *, every: int = 1, **header
) -> Path:
    """A run whose snapshot k, after ``every * k`` steps, predicts ``outputs[k]`` (logits or means)
    on the probe."""
    inputs, y = torch.arange(len(targets), dtype=torch.float32), torch.tensor(targets)
    facts = {
        "schema_version": 1,
        "name": path.name,
        "optimizer": "SGD",
        "settings": {"lr": 0.1},
        "likelihood": "categorical",
        "batch_size": 8,
        "probe_fingerprint": make_probe(inputs, y).fingerprint,
    }
    (path / "snapshots").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(facts | header))
    (path / "probe.safetensors").write_bytes(save(probe_tensors(inputs, y)))
    for k, z in enumerate(outputs):
        data = save({"probe/logits": torch.tensor(z)})
        (path / "snapshots" / f"{every * k:08d}.safetensors").write_bytes(data)
    rows = [
        {"step": k, "loss": 1.0, "lr": 0.1, "wall": 0.5 * k, "examples": 8}
        for k in range(1, every * (len(outputs) - 1) + 1)
    ]
    (path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def descent(
    seed: int,
    snapshots: int = 25,
    n: int = 12,
    classes: int = 4,
    noise: float = 0.1,
    speed: float = 0.15,
):
    """Logits (snapshots, n, classes) that drift towards their targets, not straight, and the
    targets."""
    rng = np.random.default_rng(seed)
    y = np.random.default_rng(0).integers(0, classes, n)
    drift = speed * np.eye(classes)[y]
    steps = drift + noise * rng.normal(size=(snapshots, n, classes))
    steps[0] = 0.3 * rng.normal(size=(n, classes))
    return np.cumsum(steps, axis=0), y


@pytest.fixture(name="write_run", scope="session")
def _write_run():
    return write_run


@pytest.fixture(name="descent", scope="session")
def _descent():
    return descent


@pytest.fixture(name="runs", scope="session")
def _runs(tmp_path_factory):
    """Six runs by two optimizers with different starts, speeds and noise; the last two never get
    far."""
    folder = tmp_path_factory.mktemp("fronts")
    paths = []
    for seed in range(6):
        z, y = descent(seed, noise=0.05 + 0.04 * seed, speed=0.25 - 0.04 * seed)
        paths.append(write_run(folder / f"run{seed}", z, y, optimizer=("SGD", "Adam")[seed % 2]))
    return paths
