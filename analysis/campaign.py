"""Fault campaigns: processes killed, and disks that fill, at random moments, with counts.

    python -m analysis campaign kill [--count 500] [--seed 0]
    python -m analysis campaign full [--count 50] [--seed 0]

"kill" sends SIGKILL to a process that records a run, sweeps, or writes a report, in turn. "full"
limits the size of every file the process writes (``RLIMIT_FSIZE``), so that a write fails somewhere
within a file. After each, the same is asked:

- recorder: is the run readable, or refused in a sentence because nothing of it is there yet; is
  every row and snapshot up to the last whole; does it resume and end with the losses of a run never
  interrupted? A full disk must not end a training that has begun.
- sweep: called again, does it end with the table of a sweep never interrupted, byte for byte?
- report: is the page that was there before, or the new one, whole?

Prints one row per subject with how often it was tried, interrupted midway, and wrong; exit status 1
where anything was wrong. Writes campaign_kill.csv or campaign_full.csv. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from analysis.timing import report
from thermo_opt.sweep import Method, Sweep, Training, run_sweep

STEPS, EVERY = 60, 5
DATA = Path(__file__).resolve().parents[1] / "data"
SWEEP = Sweep(
    Path("out"),
    "blobs",
    "categorical",
    Training(steps=12, batch_size=64, every=3),
    (0, 1),
    (Method("SGD", "SGD", grid={"lr": [0.03, 0.1]}),),
    target_loss=(1.2,),
)


def train(done: int = 0) -> Iterator[tuple[nn.Module, Any, float]]:
    """A small training, the same every time; gives model, optimizer and loss at the start and after
    each step, from step ``done`` on."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.arange(64) % 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(STEPS + 1):
        loss = functional.cross_entropy(model(x), y)
        if step >= done:
            yield model, optimizer, float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def probe() -> tuple[torch.Tensor, torch.Tensor]:
    """The probe of that training."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 8, generator=generator), torch.arange(32) % 4


def record(folder: Path, done: int = 0) -> None:
    """Record the training, or the rest of it after ``done`` steps."""
    steps = train(done)
    model, optimizer, _ = next(steps)
    recorder = to.Recorder(
        folder,
        model=model,
        optimizer=optimizer,
        probe=probe(),
        every=EVERY,
        params=True,
        resume=bool(done),
    )
    with recorder as recording:
        for _, _, loss in steps:
            recording.step(loss=loss)


@dataclass(frozen=True)
class Subject:
    """What is interrupted: ``work`` in a folder, and ``wrong``, what is wrong there afterwards
    (None: nothing)."""

    work: Callable[[Path], None]
    wrong: Callable[[Path, Path], str | None]


def recorder_wrong(folder: Path, reference: Path) -> str | None:
    """What is wrong with an interrupted recording."""
    run = folder / "run"
    try:
        found = to.load_run(run)
        steps = [int(step) for step in found.steps.index]
        for snapshot in found.snapshots:
            for name in snapshot.names():
                snapshot.load(name)
    except to.InputError as error:
        begun = (run / "run.json").is_file()
        return f"unreadable: {error}" if begun else None
    if steps != list(range(1, len(steps) + 1)):
        return "rows are lost"
    if not steps:
        return None
    record(run, done=len(steps))
    whole, again = to.load_run(reference / "run"), to.load_run(run)
    same = whole.steps["loss"].tolist() == again.steps["loss"].tolist()
    last = [s.load("probe/logits") for s in (whole.snapshots[-1], again.snapshots[-1])]
    return None if same and torch.equal(*last) else "resumed with other numbers"


def sweep(folder: Path) -> None:
    """Run the sweep into the folder."""
    run_sweep(_into(folder))


def _into(folder: Path) -> Sweep:
    values = {name: getattr(SWEEP, name) for name in SWEEP.__dataclass_fields__}
    return Sweep(**{**values, "output": folder / "out"})


def sweep_wrong(folder: Path, reference: Path) -> str | None:
    """What is wrong with an interrupted sweep, called again."""
    sweep(folder)
    tables = [(root / "out" / "table.csv").read_bytes() for root in (folder, reference)]
    return None if tables[0] == tables[1] else "another table"


def page(folder: Path) -> None:
    """Write a report over the one that is there."""
    to.audit(DATA / "digits-sgd", lens="outputs", stride=10).to_html(folder / "page.html")


def page_wrong(folder: Path, reference: Path) -> str | None:
    """What is wrong with an interrupted report."""
    text = (folder / "page.html").read_text(encoding="utf-8")
    whole = text == OLD_PAGE or text.rstrip().endswith("</html>")
    left = [file.name for file in folder.iterdir() if file.name != "page.html"]
    return None if whole else f"a torn page of {len(text)} characters, beside it {left}"


OLD_PAGE = "the page of before"
SUBJECTS = {
    "recorder": Subject(lambda folder: record(folder / "run"), recorder_wrong),
    "sweep": Subject(sweep, sweep_wrong),
    "report": Subject(page, page_wrong),
}


def child(work: Callable[[Path], None], folder: Path, limit: int | None) -> None:
    """Do the work in this process, files limited to so many bytes; exit status 3 where it was
    refused in a sentence."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        warnings.simplefilter("ignore")
        try:
            work(folder)
        except (to.InputError, OSError):  # the command line says both in a sentence
            os._exit(3)
        os._exit(0)


def interrupted(
    subject: Subject, folder: Path, kill_after: float | None, limit: int | None
) -> int | None:
    """Exit status of the work in a process of its own, killed after so many seconds."""
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(subject.work, folder, limit)
    )
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def campaign(kind: str, count: int, seed: int, names: list[str]) -> list[dict[str, Any]]:
    """One row per subject."""
    drawn = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            subject = SUBJECTS[name]
            reference, seconds = Path(root) / "reference", []
            for _ in range(3):  # the quickest: so that most kills fall into the work
                shutil.rmtree(reference, ignore_errors=True)
                reference.mkdir()
                start = time.monotonic()
                interrupted(subject, reference, None, None)
                seconds.append(time.monotonic() - start)
            largest = max(file.stat().st_size for file in reference.rglob("*") if file.is_file())
            midway, wrongs = 0, []
            for _ in range(count // len(names)):
                folder = Path(root) / "trial"
                folder.mkdir()
                if name == "report":
                    (folder / "page.html").write_text(OLD_PAGE)
                after = drawn.uniform(0, min(seconds)) if kind == "kill" else None
                limit = drawn.randrange(largest) if kind == "full" else None
                status = interrupted(subject, folder, after, limit)
                midway += status != 0 or size(folder) < size(reference)
                begun = any((folder / "run").glob("snapshots/*.safetensors"))
                if kind == "full" and name == "recorder" and status != 0 and begun:
                    wrongs.append("the training ended with the disk")
                elif wrong := fault(subject, folder, reference):
                    wrongs.append(wrong)
                shutil.rmtree(folder)
            rows.append(
                {
                    "subject": name,
                    "tried": count // len(names),
                    "interrupted midway": midway,
                    "wrong": len(wrongs),
                    "first": wrongs[0] if wrongs else "",
                    "seed": seed,
                }
            )
            print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def fault(subject: Subject, folder: Path, reference: Path) -> str | None:
    """What is wrong afterwards; an exception is, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return subject.wrong(folder, reference)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def main(arguments: list[str]) -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(
        prog="analysis campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=["kill", "full"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = options.subjects.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise to.InputError(f"subject {unknown[0]!r} is unknown: use some of {', '.join(SUBJECTS)}")
    count = options.count or (500 if options.kind == "kill" else 50)
    rows = campaign(options.kind, count, options.seed, names)
    report(f"campaign: {options.kind}", rows, f"campaign_{options.kind}")
    return int(any(row["wrong"] for row in rows))
