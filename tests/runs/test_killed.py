"""A recording killed with SIGKILL is readable, and every snapshot it lists is whole."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from thermo_opt.runs import load_run

KILLS = 50


def test_killed_at_fifty_random_moments(tmp_path):
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("recording_child.py"), tmp_path, str(KILLS), "0"],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    recordings = [
        path for number in range(KILLS) if (path := tmp_path / str(number) / "run.json").exists()
    ]
    assert len(recordings) >= KILLS // 2  # the others died before they had written anything
    snapshots = 0
    for recording in recordings:
        run = load_run(recording.parent)
        assert run.steps.index.is_monotonic_increasing
        if run.snapshots:
            assert run.probe is not None
            assert run.snapshots[-1].step <= (
                run.steps.index[-1] if len(run.steps) else 0
            )  # each is of a logged step
        for expected, snapshot in enumerate(run.snapshots):
            assert snapshot.step == expected  # none is missing in between
            assert all(torch.isfinite(snapshot.load(name)).all() for name in snapshot.names())
        snapshots += len(run.snapshots)
    assert snapshots > 2 * KILLS
    assert (
        len({len(load_run(recording.parent).snapshots) for recording in recordings}) > 4
    )  # the moments did differ
