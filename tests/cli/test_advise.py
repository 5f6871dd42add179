"""``thermo-opt advise``: a saving where one can be predicted, and otherwise why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import thermo_opt as to
from thermo_opt import cli


def _record(path: Path, every: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), every=every) as recorder:
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)


def _advice(path: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert cli.main(["advise", str(path), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["run"] == path.name
    return {entry["about"]: entry["words"] for entry in told["advice"]}


def test_a_run_of_every_step_is_offered_its_even_schedule(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "whole", every=1)
    words = _advice(tmp_path / "whole", capfd)
    saving = to.even_schedule(to.audit(tmp_path / "whole", lens="outputs")).saving
    assert saving > 0.02  # descent slows down, so an even speed saves
    assert f"{100 * saving:.0f}" in words["schedule"]
    assert "recording" not in words


def test_a_strided_run_is_told_to_record_every_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path / "thinned", every=5)
    words = _advice(tmp_path / "thinned", capfd)
    assert "every step" in words["recording"]
    assert "No schedule" in words["schedule"]
