"""What the README shows runs: its Python on a small training, its commands on small runs.

Its two set-up commands are run by ``.ci/run``; its sweep takes half a minute, so only its file is
read here.
"""

from __future__ import annotations

import glob
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import thermo_opt as to
from tests.docs.pages import ROOT
from thermo_opt.cli import main
from thermo_opt.sweep import read_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^(?:    .*\n|\n(?=    ))+", README, re.M)
]
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("thermo-opt ")]
PYTHON = [b for b in BLOCKS if not b.strip().startswith(("thermo-opt ", "python3 "))]


@pytest.fixture(autouse=True)
def scenery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Recorded runs in ``runs/``, a folder of checkpoints, and the names the snippets use."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.randint(0, 3, (20,))
    Path("path/to/checkpoints").mkdir(parents=True)
    save_file({"inputs": x, "targets": y}, "probe.safetensors")
    names: dict[str, Any] = {"to": to, "x": x, "y": y, "batches": [x] * 20}
    for rate in (0.01, 0.03):
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)

        def train_step(
            batch: Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), y)
            loss.backward()
            optimizer.step()
            return loss

        path = f"runs/adam-{rate}"
        recorder = to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), every=4)
        with recorder:
            for step in range(41):
                recorder.step(loss=train_step(x))
                if step % 20 == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(state, f"path/to/checkpoints/step-{step}.pt")
        names |= {"model": model, "optimizer": optimizer, "train_step": train_step}
    return names


def test_its_python_runs(scenery: dict[str, Any]) -> None:
    assert len(PYTHON) >= 2
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), scenery)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    if words[0] == "sweep":
        assert read_config(ROOT / words[1]).trials()
        return
    assert main([name for word in words for name in (sorted(glob.glob(word)) or [word])]) == 0
