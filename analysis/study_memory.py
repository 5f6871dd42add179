"""What an optimizer keeps, and the peak memory of a method's training steps, measured in a process
of its own.

On a CPU, on Linux: the peak resident memory of a few steps above what the process held just before
the model was built, so weights, gradients, activations, optimizer state and what a refresh of it
needs, but neither libraries nor data. A throw-away model of the same trial comes first, so that the
libraries' own pages are in; the allocator hands freed blocks straight back (`ALLOCATOR`). On a GPU:
`torch.cuda.max_memory_allocated` likewise.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.sweep import Trainer, Training, Trial, add_to_result, read_result

STEPS = 3
"""Measured, from the first, where all curvature is formed (NGD-T) and decomposed (SOAP)."""
WARM_UP = 3
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_RESET_PEAK = "5"
_MIB = 2**20


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every distinct tensor reachable from the optimizer's own state, parameters and
    gradients excluded."""
    skip = {
        t.data_ptr()
        for group in optimizer.param_groups
        for p in group["params"]
        for t in (p, p.grad)
        if t is not None
    }
    seen: dict[int, Any] = {}  # keeps what was visited alive, so that no id is used twice
    found: dict[int, int] = {}

    def walk(node: Any) -> None:
        if id(node) in seen:
            return
        seen[id(node)] = node
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            if storage.data_ptr() not in skip:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list | tuple | set):
            for value in node:
                walk(value)
        elif (
            hasattr(node, "__dict__")
            and not isinstance(node, nn.Module | type)
            and type(node).__module__.startswith("thermo_opt")
        ):
            walk(vars(node))

    walk(dict(optimizer.state))
    walk(optimizer)  # NGD-T keeps its metric beside the state
    return sum(found.values())


def add_peak_memory(trials: Sequence[Trial], folders: Sequence[Path]) -> None:
    """Add ``peak_memory`` (MiB) to the results of a method's finished runs, or null and
    ``peak_memory_reason``, unless it is there."""
    wanted = [
        (trial, folder)
        for trial, folder in zip(trials, folders, strict=True)
        if "peak_memory" not in read_result(folder)
    ]
    if not wanted:
        return
    found = _in_new_process([trial for trial, _ in wanted])
    for (_, folder), own in zip(wanted, found, strict=True):
        add_to_result(folder, own)


def _in_new_process(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    process = subprocess.run(
        [sys.executable, "-m", "analysis.study_memory"],
        input=json.dumps([asdict(trial) for trial in trials]),
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return [_unknown(f"the measuring process failed ({last})")] * len(trials)
    found: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return found


def _unknown(reason: str) -> dict[str, Any]:
    return {"peak_memory": None, "peak_memory_reason": reason}


def measure(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """``peak_memory`` of each of these trials of one task and device, in MiB."""
    device = trials[0].training.device
    if device == "cpu":
        torch.set_num_threads(1)
        try:
            reset_peak()
        except OSError as error:
            reason = (
                f"this system doesn't reset a process's peak resident memory ({error.strerror})"
            )
            return [_unknown(reason)] * len(trials)
    _train(trials[0], WARM_UP)
    return [{"peak_memory": _peak(trial)} for trial in trials]


def _peak(trial: Trial) -> float:
    _train(trial, 0)  # data that are read and decoded once stay in memory
    release()
    if trial.training.device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _train(trial, STEPS)
        return (torch.cuda.max_memory_allocated() - held) / _MIB
    reset_peak()
    held = status_bytes("VmRSS")
    _train(trial, STEPS)
    return (status_bytes("VmHWM") - held) / _MIB


def _train(trial: Trial, steps: int) -> None:
    """Take the first steps; none: only read the minibatches that they would be taken on."""
    trainer = Trainer(trial)
    for _ in itertools.islice(trainer if steps else trainer.batches(), steps or STEPS):
        pass


def release() -> None:
    """Hand back what is free."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # the GNU C library's
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")


def status_bytes(name: str) -> int:
    """Bytes of one of the kernel's counts of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    plain = json.load(sys.stdin)
    trials = [Trial(**{**trial, "training": Training(**trial["training"])}) for trial in plain]
    print(json.dumps(measure(trials)))
