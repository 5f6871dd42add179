"""Small recorded runs for the auditors' tests, made once a session with the real Recorder."""

from pathlib import Path

import pytest
import torch
from torch import nn

import thermo_opt as to


def record(
    path: Path,
    optimizer: str = "adam",
    steps: int = 37,
    seed: int = 0,
    blow_up_at: int = -1,
    **options,
) -> Path:
    """Train a small classifier on random data and record everything; returns the run's
    directory."""
    torch.manual_seed(seed)
    x, y = torch.randn(40, 6), torch.randint(0, 4, (40,))
    model = architecture()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    opt = {
        "adam": lambda: torch.optim.Adam(model.parameters(), 2e-2),
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.2, momentum=0.9),
    }[optimizer]()
    recorded = {
        "every": 1,
        "params": True,
        "moments": optimizer == "adam",
        "batch_size": 20,
    } | options
    with to.Recorder(path, model=model, optimizer=opt, probe=(x[:17], y[:17]), **recorded) as rec:
        for k in range(steps):
            pick = torch.randint(0, 40, (20,))
            loss = nn.functional.cross_entropy(model(x[pick]), y[pick])
            opt.zero_grad()
            loss.backward()
            opt.step()
            if k + 1 == blow_up_at:
                with torch.no_grad():
                    model[0].weight.fill_(float("nan"))
            rec.step(loss=loss, examples=20)
    return path


def architecture() -> nn.Module:
    """The architecture of `record`."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture(scope="session")
def adam_run(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "adam")


@pytest.fixture(scope="session")
def sgd_run(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "sgd", "sgd")


@pytest.fixture(scope="session", name="make_run")
def _make_run():
    return record


@pytest.fixture(scope="session", name="small_model")
def _small_model():
    return architecture
