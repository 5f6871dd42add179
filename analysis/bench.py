"""Benchmarks, and the same kernels on two checkouts in turn.

    python -m analysis bench step|audit|pareto|fisher|scaling …
    python -m analysis bench step|audit|pareto|fisher --against CHECKOUT [--rounds 9] [--threads 1]

The first form measures one checkout against other libraries or bare loops (`bench_step` and so on).
The second runs `KERNELS` with this checkout's thermo_opt and with another's, each in a process of
its own, the two taking turns, and prints the median over rounds of the ratio (new over old) of
their wall seconds and of their processor seconds, which other work on the machine disturbs less,
with quartiles, and the processor milliseconds. The code of the kernels is this checkout's on both
sides, and names only what both have.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to
from analysis.networks import CharGPT, ConvNet

HERE = Path(__file__).resolve().parents[1]
NAMES = ("step", "audit", "pareto", "fisher")
Kernel = Callable[[], object]


def _examples(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network and a minibatch of random data."""
    torch.manual_seed(0)
    if kind == "GPT":
        tokens = torch.randint(0, 65, (16, 65))
        return CharGPT(65, layers=3, width=64), tokens[:, :-1], tokens[:, 1:]
    if kind == "CNN":
        return ConvNet(), torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    mlp = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    return mlp, torch.randn(128, 64), torch.randint(0, 10, (128,))


def _training(kind: str, optimizer: Callable[[nn.Module], Any], steps: int) -> Kernel:
    """So many steps more at each call."""
    model, x, y = _examples(kind)
    stepping = optimizer(model)

    def run() -> None:
        for _ in range(steps):
            loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
            stepping.zero_grad()
            loss.backward()
            stepping.step()

    return run


def step_kernels(_: Path) -> dict[str, Kernel]:
    """Training steps from the start on, refreshes included."""
    kernels = {
        f"NGD-T, {kind}, {steps} steps": _training(kind, lambda m: to.NGDT(m), steps)
        for kind, steps in (("MLP", 64), ("CNN", 8), ("GPT", 16))
    }
    kernels["NGD-T EKFAC, MLP, 32 steps"] = _training(
        "MLP", lambda m: to.NGDT(m, metric="ekfac"), 32
    )
    return kernels


def audit_kernels(scratch: Path) -> dict[str, Kernel]:
    """Each lens on a recorded run of data/, and recording."""
    run = HERE / "data" / "digits-adam"
    model, x, y = _examples("MLP")
    count = iter(range(10**9))

    def recording() -> None:
        optimizer = torch.optim.Adam(model.parameters())
        folder = scratch / f"run-{os.getpid()}-{next(count)}"
        with to.Recorder(folder, model=model, optimizer=optimizer, probe=(x, y), every=5) as rec:
            for _ in range(50):
                loss = functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rec.step(loss=loss)

    return {
        "outputs lens, 121 snapshots": lambda: to.audit(run, lens="outputs"),
        "optimizer-state lens": lambda: to.audit(run, lens="optimizer-state"),
        "parameters lens, 3 steps": lambda: to.audit(run, lens="parameters", steps=[5, 40, 90]),
        "50 recorded steps": recording,
    }


def pareto_kernels(scratch: Path) -> dict[str, Kernel]:
    """The command, on 24 runs of 60 snapshots."""
    from thermo_opt.cli import main as command

    paths = sorted(str(path) for path in scratch.glob("run*") if (path / "run.json").is_file())

    def front() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if command(["pareto", *paths, "--target-loss", "1.5", "--json"]):
                raise RuntimeError("thermo-opt pareto failed")

    return {f"front of {len(paths)} runs": front}


def fisher_kernels(_: Path) -> dict[str, Kernel]:
    """Products, brackets and factors."""
    kernels: dict[str, Kernel] = {}
    for kind in ("MLP", "CNN", "GPT"):
        model, x, y = _examples(kind)
        metric = to.fisher.make("exact", model, (x, y), damping=1e-3)
        v = [torch.randn(shape) for shape in metric.shapes]
        kernels[f"matvec, {kind}"] = functools.partial(metric.matvec, v)
        kernels[f"quadratic, {kind}"] = functools.partial(metric.quadratic, v)
        for factored in ("kfac", "ekfac"):
            kernels[f"{factored} factors, {kind}"] = functools.partial(
                to.fisher.make, factored, model, (x, y)
            )
        if kind == "MLP":
            g = to.fisher.gradient(model, (x, y))
            kernels["bracket of Δ, MLP"] = functools.partial(metric.dual_norm, g)
    return kernels


KERNELS: dict[str, Callable[[Path], Mapping[str, Kernel]]] = {
    "step": step_kernels,
    "audit": audit_kernels,
    "pareto": pareto_kernels,
    "fisher": fisher_kernels,
}


def serve(name: str, scratch: Path, threads: int) -> None:
    """Run the kernel that each line of standard input names, and print its seconds."""
    torch.set_num_threads(threads)
    kernels = KERNELS[name](scratch)
    print(json.dumps(list(kernels)), flush=True)
    for line in sys.stdin:
        gc.collect()
        start = time.perf_counter(), time.process_time()
        kernels[line.rstrip("\n")]()
        wall, busy = time.perf_counter() - start[0], time.process_time() - start[1]
        print(json.dumps([wall, busy]), flush=True)


@contextlib.contextmanager
def serving(checkout: Path, name: str, scratch: Path, threads: int) -> Iterator[Any]:
    """A process that serves kernels with a checkout's thermo_opt and this one's analysis."""
    with tempfile.TemporaryDirectory() as folder:
        for part, source in (("thermo_opt", checkout), ("analysis", HERE), ("data", HERE)):
            (Path(folder) / part).symlink_to(source / part, target_is_directory=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "analysis.bench", name, str(scratch), str(threads)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def ask(process: Any, kernel: str | None = None) -> Any:
    """What a serving process says to a kernel's name; None: what it says first."""
    if kernel is not None:
        print(kernel, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise to.InputError(f"the benchmark's process ended at {kernel or 'its start'}: see above")
    return json.loads(line)


def against(name: str, checkout: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per kernel: seconds of the new checkout over the old one's, round by round."""
    if not (checkout / "thermo_opt").is_dir():
        raise to.InputError(f"{checkout} holds no thermo_opt: give the root of a checkout")
    rows = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if name == "pareto":
            import_module("analysis.bench_pareto").write_runs(scratch, 24, 60)
        sides = [
            stack.enter_context(serving(root.resolve(), name, scratch, threads))
            for root in (checkout, HERE)
        ]
        first, second = (ask(side) for side in sides)
        if first != second:
            raise to.InputError(f"{checkout} has other kernels: {first} instead of {second}")
        for kernel in first:
            taken: list[list[list[float]]] = [[], []]
            for k in range(rounds + 1):  # the first warms up
                for which in (0, 1) if k % 2 else (1, 0):
                    taken[which].append(ask(sides[which], kernel))
            old, new = (np.array(own[1:]) for own in taken)  # (rounds, 2): wall, processor
            ratios = np.quantile(new / old, [0.25, 0.5, 0.75], axis=0)
            row: dict[str, Any] = {"kernel": kernel}
            for place, clock in enumerate(("wall", "processor")):
                low, middle, high = ratios[:, place].tolist()
                row[clock] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
            row["old (ms)"] = 1e3 * float(np.median(old[:, 1]))
            row["new (ms)"] = 1e3 * float(np.median(new[:, 1]))
            rows.append(row | {"rounds": rounds})
    return rows


def main(arguments: list[str]) -> int:
    """Run a benchmark, or compare with another checkout; its exit status."""
    parser = argparse.ArgumentParser(
        prog="analysis bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    chosen, rest = (arguments[:1], arguments[1:])
    if "--against" not in rest and chosen and chosen[0] in (*NAMES, "scaling"):
        return import_module(f"analysis.bench_{chosen[0]}").main(rest) or 0
    options = parser.parse_args(arguments)
    rows = against(options.name, options.against, options.rounds, options.threads)
    from analysis.timing import show

    show(f"{options.name}: this checkout over {options.against}", rows)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
