"""Damaged run folders, read one after the other: ``python -m analysis fuzz --count 10000``,
or for an hour: ``--minutes 60 --seed 100000``.

Each trial copies a small run of one layout, changes one file of it (bits, lengths, JSON values,
entries of a pickle, other files in its place, pipes and links) and reads everything in it. A trial
ends well if the run is read or refused with an `InputError`. Counted as failures: any other
exception, more than 20 seconds, more than 2 GB of memory, a file that was executed, and a number
that changed in silence although its file carries a checksum.

Seeded: a failure's layout and seed are printed, and ``--layout torch --seed 17 --count 1`` repeats
it. One process; wall time on a busy machine counts, so run it alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import thermo_opt as to
from thermo_opt.errors import InputError

SECONDS, GIGABYTES = 20, 2.0
CHECKED = {"own", "torch", "lightning", "folders"}
"""Layouts whose tensors carry checksums."""
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "../../etc/passwd", "/dev/zero", [], {}, [[]], [None], {"": None}, "\x1b]0;x\x07",
)  # fmt: skip
"""Values that none of a run's files expects."""


class TooLong(BaseException):
    """A trial ran out of time."""


def make_seeds(folder: Path) -> None:
    """One small run of each layout below ``folder``."""
    torch.manual_seed(0)
    x, y = torch.rand(8, 6), torch.randint(0, 3, (8,))
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for name in ("torch", "lightning", "safetensors"):
        (folder / name).mkdir(parents=True)
    own = folder / "own"
    with to.Recorder(
        own, model=model, optimizer=optimizer, probe=(x, y), params=True, moments=True, batch_size=8
    ) as recorder:
        for k in range(4):
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            state = optimizer.state_dict()
            torch.save(
                {"model": weights, "optimizer": state, "args": {"lr": 0.1}},
                folder / f"torch/model-{k}.pt",
            )
            save_file(weights, folder / f"safetensors/model-{k}.safetensors")
            torch.save(
                {
                    "global_step": k,
                    "epoch": 0,
                    "pytorch-lightning_version": "2.5.0",
                    "state_dict": weights,
                    "optimizer_states": [state],
                },
                folder / f"lightning/epoch=0-step={k}.ckpt",
            )
            step = folder / f"folders/step_{k}"
            step.mkdir(parents=True)
            torch.save(weights, step / "model.pt")
            torch.save(state, step / "optimizer.pt")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save({"model": weights}, checkpoint_id=folder / f"distributed/step_{k}")
            _trainer_checkpoint(folder / f"huggingface/checkpoint-{k}", weights, state, k)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=8)
    np.savez(folder / "torch/probe.npz", inputs=x.numpy(), targets=y.numpy())
    _predictions(folder, model(x).detach().numpy(), y.numpy())
    (folder / "lightning/metrics.csv").write_text(
        "epoch,step,train_loss,lr-Adam\n" + "".join(f"0,{k},{2 - 0.1 * k},0.01\n" for k in range(4))
    )


def _predictions(folder: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    """Predictions of three moments in a file each, of four kinds."""
    for kind in ("npz", "pkl", "csv", "pt"):
        (place := folder / f"predictions-{kind}").mkdir()
        for k in range(3):
            file, arrays = place / f"step_{k}.{kind}", {"logits": k * logits, "labels": labels}
            if kind == "npz":
                np.savez(file, **arrays)
            elif kind == "pkl":
                file.write_bytes(pickle.dumps(arrays, protocol=4 + k % 2))
            elif kind == "pt":
                torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
            else:
                columns = {f"logit_{j}": k * logits[:, j] for j in range(logits.shape[1])}
                pd.DataFrame({**columns, "label": labels}).to_csv(file, index=False)


def _trainer_checkpoint(folder: Path, weights: dict[str, Any], state: Any, step: int) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    torch.save(state, folder / "optimizer.pt")
    log = [{"step": k + 1, "loss": 1.0 / (k + 1), "learning_rate": 0.1} for k in range(step)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "max_steps": 4}))


def read_everything(path: Path) -> dict[str, float]:
    """Sums of all that a run holds, by name; refusals of single tensors and lenses are part of an
    answer.
    """
    run = to.load_run(path)
    found: dict[str, float] = {"rows": len(run.steps)}
    for action in (
        lambda: run.probe,
        lambda: run.clock_readings("flow", [s.step for s in run.snapshots]),
    ):
        _try(action)
    for snapshot in run.snapshots:
        for name in _try(snapshot.names) or ():
            tensor = _try(lambda name=name, snapshot=snapshot: snapshot.load(name))
            if isinstance(tensor, torch.Tensor):
                found[f"{snapshot.step}/{name}"] = float(tensor.double().sum())
        _try(lambda snapshot=snapshot: snapshot.has_group("exp_avg") and snapshot.moments_meta())
    _try(lambda: to.audit(run, lens="optimizer-state", batch_size=8))
    _try(lambda: to.audit(run, lens="outputs"))
    return found


def _try(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except InputError:
        return None


def mutate(run: Path, chance: random.Random) -> str:
    """Change one file of a run; what was done, in words."""
    files = sorted(file for file in run.rglob("*") if file.is_file())
    file = chance.choice(files)
    kinds = [_flip, _cut, _zeros, _grow, _swap, _link, _other]
    if file.suffix in (".json", ".jsonl"):
        kinds += [_json] * 6
    if file.suffix in (".pt", ".ckpt"):
        kinds += [_pickle] * 6
    if file.suffix == ".safetensors":
        kinds += [_header] * 4
    kind = chance.choice(kinds)
    kind(file, files, chance)
    return f"{kind.__name__.strip('_')} {file.relative_to(run)}"


def _flip(file: Path, files: list[Path], chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 8, 64))):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def _cut(file: Path, files: list[Path], chance: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data) + 1)])


def _zeros(file: Path, files: list[Path], chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    begin = chance.randrange(len(data) + 1)
    end = min(len(data), begin + chance.choice((1, 16, 512, 10**6)))
    data[begin:end] = bytes(end - begin)
    file.write_bytes(data)


def _grow(file: Path, files: list[Path], chance: random.Random) -> None:
    if chance.random() < 0.5:
        os.truncate(file, file.stat().st_size + chance.choice((1, 4096, 2**40)))
    else:
        file.write_bytes(file.read_bytes() + chance.randbytes(chance.choice((1, 100, 10_000))))


def _swap(file: Path, files: list[Path], chance: random.Random) -> None:
    other = chance.choice(files)
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _link(file: Path, files: list[Path], chance: random.Random) -> None:
    file.unlink()
    kind = chance.randrange(5)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to("/dev/zero")
    elif kind == 3:
        file.symlink_to(file.with_name("nowhere"))


def _other(file: Path, files: list[Path], chance: random.Random) -> None:
    file.write_bytes(
        chance.choice(
            (
                b"",
                b"\x80\x02.",
                b"PK\x03\x04",
                b"{}",
                b"[" * 10**5,
                b"\x80\x02Nr\xff\xff\xff\x7f.",
                b"\0" * 4096,
            )
        )
    )


def _json(file: Path, files: list[Path], chance: random.Random) -> None:
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    place = chance.randrange(len(lines))
    value = json.loads(lines[place])
    lines[place] = json.dumps(changed(value, chance))
    file.write_text("\n".join(lines) + "\n")


def _pickle(file: Path, files: list[Path], chance: random.Random) -> None:
    torch.save(changed(torch.load(file, weights_only=True), chance), file)


def _header(file: Path, files: list[Path], chance: random.Random) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(changed(json.loads(data[8 : 8 + length]), chance)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def changed(value: Any, chance: random.Random) -> Any:
    """``value`` with one entry, somewhere in it, made odd, dropped or exchanged."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        return chance.choice(
            (
                value[:0] if value.ndim else value,
                value.double(),
                value > 0,
                torch.full_like(value, float("nan")) if value.is_floating_point() else value,
                value.reshape(-1),
                value.to_sparse() if value.ndim else value,
            )
        )
    return chance.choice(ODD)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TooLong` inside after so many seconds of wall time."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@lru_cache(maxsize=16)
def undamaged(run: Path) -> dict[str, float]:
    """What the run holds before it is damaged."""
    return read_everything(run)


def trial(seeds: Path, layout: str, seed: int, scratch: Path) -> tuple[str, str]:
    """Damage a copy of the layout's run and read it: ``(verdict, what was done or went wrong)``."""
    chance = random.Random(f"{layout} {seed}")
    run = scratch / "run"
    shutil.copytree(seeds / layout, run)
    expected = undamaged(seeds / layout)
    done = mutate(run, chance)
    try:
        with limited(SECONDS):
            found = read_everything(run)
    except InputError:
        return "refused", done
    except TooLong:
        return "FAILED: too long", done
    except Exception:
        return "FAILED: exception", f"{done}\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(run, ignore_errors=True)
    silent = (
        layout in CHECKED
        and done.split()[0] in ("flip", "zeros")
        and done.endswith((".safetensors", ".pt", ".ckpt"))
    )
    changed = [
        k
        for k, v in found.items()
        if k in expected and "/" in k and not np.isclose(v, expected[k], equal_nan=True)
    ]
    if silent and changed:
        return "FAILED: silent", f"{done}: {changed[0]}"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 > GIGABYTES:
        return "FAILED: memory", done
    return "read", done


def main(arguments: list[str]) -> int:
    """Run trials and print their counts; exit status 1 if any failed."""
    parser = argparse.ArgumentParser(prog="analysis fuzz", description=__doc__)
    parser.add_argument("--count", type=int, help="trials over all layouts (1000)")
    parser.add_argument("--minutes", type=float, help="stop after this time, however many trials")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--layout", help="one layout alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    start = time.monotonic()
    minutes = math.inf if options.minutes is None else options.minutes
    count = options.count if options.count is not None else 1000 if math.isinf(minutes) else None
    with tempfile.TemporaryDirectory() as name:
        seeds = Path(name) / "seeds"
        make_seeds(seeds)
        layouts = [options.layout] if options.layout else sorted(p.name for p in seeds.iterdir())
        for k in itertools.count() if count is None else range(count):
            if time.monotonic() - start > 60 * minutes:
                break
            layout = layouts[k % len(layouts)]
            verdict, done = trial(seeds, layout, options.seed + k, Path(name))
            counts[layout, verdict] += 1
            if verdict.startswith("FAILED"):
                print(f"{layout}, seed {options.seed + k}: {verdict}: {done}", flush=True)
    for layout in layouts:
        shown = ", ".join(
            f"{n} {verdict}" for (of, verdict), n in sorted(counts.items()) if of == layout
        )
        print(f"{layout}: {shown}")
    failed = sum(n for (_, verdict), n in counts.items() if verdict.startswith("FAILED"))
    print(f"{counts.total()} damaged runs in {time.monotonic() - start:.0f} s: {failed} failed")
    return int(failed > 0)
