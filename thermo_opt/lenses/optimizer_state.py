"""The optimizer-state lens: Adam's moments as a diagonal metric, so that weights and state alone
suffice (§9).

Not a stand-in for the Fisher: what it says is said of Adam's own metric, in no unit. The moments
recorded after a step contain the gradient it used and scaled it: they are that step's metric. The
metric being diagonal, the path can be developed coordinate by coordinate, ``u = Σ_k √F_k ∘ δ_k``;
the straight line beside a path of length ``ℒ = Σ √a_k`` is then ``D = |u| ≤ ℒ``. It needs one array
the size of the weights, whatever the run's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.fisher.optimizer_state import CHUNK, Step, StepScalars, path_scalars, total
from thermo_opt.lenses.inputs import LensInputs, Unsupported
from thermo_opt.lenses.measurements import AdamMeasurements, AdamPath
from thermo_opt.runs import Run
from thermo_opt.runs.run import Snapshot

PLAUSIBLE_BATCH_SIZES = (1, 32, 1024, 32768)
"""Loss terms per optimizer step between which the lens gives a range when nobody says."""
_TOGETHER = 8
"""Snapshots walked through at a time, so that the path comes from memory once for all of them."""


def measure(inputs: LensInputs) -> AdamMeasurements:
    """Scalars of each interval in the metric of Adam's moments at its end, once for each batch
    size that may be the run's (§9).

    Cost: one read of the snapshots and one array of the weights' size where the batch size is
    known; `PLAUSIBLE_BATCH_SIZES` of them where it isn't.

    Raises:
        Unsupported: When weights or moments are missing.
        InputError: When the first interval is not finite.
    """
    run, notes = inputs.run, []
    snapshots = [run.snapshots[i] for i in inputs.indices]
    if not snapshots[0].has_group("params"):
        raise Unsupported("it holds no weights: record them with params=True")
    for group in ("exp_avg", "exp_avg_sq"):
        if not snapshots[-1].has_group(group):
            raise Unsupported(f"it holds no Adam moments: {snapshots[-1].absent(group)}")
    moving = [
        name[len("exp_avg/") :] for name in snapshots[-1].names() if name.startswith("exp_avg/")
    ]
    start = snapshots[0].load_group("params")
    if absent := sorted(set(moving) - set(start)):
        raise InputError(
            f"{snapshots[0].path} lacks the weight {absent[0]!r}, of which the last snapshot has "
            "moments: restore the file"
        )
    still = sorted(set(start) - set(moving))
    start = {name: start[name] for name in moving}
    if still:
        notes.append(
            f"{len(still)} parameters without moments (frozen, or not in the optimizer) are not "
            f"seen: {still[0]} …"
        )
    sizes = PLAUSIBLE_BATCH_SIZES if inputs.batch_size is None else (inputs.batch_size,)
    if inputs.batch_size is None:
        notes.append(
            "batch size unknown: each range spans the values at batch sizes of "
            f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]} (give --batch-size: the loss terms "
            "of an optimizer step, which are tokens in a language model)"
        )
    else:
        notes.append(
            f"the metric takes {inputs.batch_size} loss terms per optimizer step (in a language "
            "model these are tokens, not sequences)"
        )
    advance = inputs.advance("optimizer-state lens", len(sizes) * (len(snapshots) - 1))
    paths: list[AdamPath] = []
    for size in sizes:
        found, distance = _developed_path(snapshots, start, size, advance)
        if len(found) < len(snapshots) - 1:
            bad = snapshots[len(found) + 1]
            if not found:
                raise InputError(
                    f"{bad.path}: weights or moments are NaN or infinite at step {bad.step}, the "
                    "first interval of the run: there is no path to audit"
                )
            notes.append(
                f"weights or moments are NaN or infinite from step {bad.step}: only what precedes "
                "was audited"
            )
            snapshots = snapshots[: len(found) + 1]
            found, distance = _developed_path(snapshots, start, size, None)
        a, d, delta, null = (
            np.array([getattr(s, key) for s in found])
            for key in ("a", "d", "delta", "null_decrease")
        )
        length = float(np.sqrt(a).sum())
        # D equals ℒ on a straight path but for float32 rounding
        paths.append(
            AdamPath(batch_size=size, a=a, d=d - null, delta=delta, distance=min(distance, length))
        )
    steps = np.array([s.step for s in snapshots])
    loss = inputs.training_loss(steps)
    notes.append(
        "this is Adam's own metric, not the Fisher's: its gradient is a running mean, it is "
        "diagonal, and its numbers compare with no other lens's; losses are those logged in "
        "training, as they were logged"
    )
    if (entering := _entering_moments(run)) is not None:
        notes.append(entering)
    return AdamMeasurements(
        step=steps[:-1],
        step_end=steps[1:],
        tau=inputs.tau(steps),
        loss=loss[:-1],
        loss_end=loss[1:],
        paths=paths,
        notes=notes,
    )


def _entering_moments(run: Run) -> str | None:
    """A note on recorded settings that change what Adam's second moment estimates."""
    stated = [
        f"{key} = {value}"
        for key, value in {**run.info.notes, **run.info.settings}.items()
        if any(word in str(key).lower() for word in ("clip", "max_grad_norm", "accum", "smoothing"))
        and isinstance(value, int | float | str)
        and value not in (0, 0.0, "", False)
    ]
    if not stated:
        return None
    return (
        f"the record says {', '.join(stated)}: clipping, gradient accumulation and label smoothing "
        "enter the second moment, and with it this metric"
    )


def _developed_path(
    snapshots: Sequence[Snapshot],
    start: dict[str, Tensor],
    batch_size: int,
    advance: Callable[[int], None] | None,
) -> tuple[list[StepScalars], float]:
    """Scalars of each interval up to the first that isn't finite, and the norm D of the path
    developed so far."""
    developed = {
        name: torch.zeros(
            t.shape, dtype=torch.float64 if t.dtype == torch.float64 else torch.float32
        )
        for name, t in start.items()
    }
    found: list[StepScalars] = []
    with _threads() as pool:
        for first in range(0, len(snapshots) - 1, _TOGETHER):
            group = snapshots[first : first + _TOGETHER + 1]
            for scalars in _steps(group, developed, batch_size, pool):
                if not np.isfinite(scalars.a + scalars.d):
                    return found, np.nan
                found.append(scalars)
            if advance is not None:
                advance(len(group) - 1)
        return found, sum(pool.map(_squared, developed.values())) ** 0.5


def _squared(path: Tensor) -> float:
    """Squared norm, by dot products of cached chunks summed in float64: no copy in higher
    precision."""
    return sum(torch.dot(chunk, chunk).item() for chunk in path.view(-1).split(CHUNK))


def _steps(
    group: Sequence[Snapshot],
    developed: dict[str, Tensor],
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> list[StepScalars]:
    """Scalars of the steps between the snapshots of a group; develops the path."""
    origin, *ends = group
    biases = []
    for snapshot in ends:
        if not snapshot.has_group("exp_avg"):
            raise Unsupported(
                f"{snapshot.path} holds no Adam moments, unlike the last snapshot: "
                f"{snapshot.absent('exp_avg')}"
            )
        meta = snapshot.moments_meta()
        biases.append([1 - beta ** meta["step"] for beta in meta["betas"]])

    def one(name: str) -> list[StepScalars]:
        arrays = [f"params/{name}", f"exp_avg/{name}", f"exp_avg_sq/{name}"]
        for snapshot in ends:
            for array in arrays:
                if (shape := snapshot.shape(array)) != developed[name].shape:
                    raise InputError(
                        f"{snapshot.path}: {array} has shape {shape}, the weight "
                        f"{tuple(developed[name].shape)}; "
                        "record the run again, or look through another lens"
                    )
        steps = [
            Step(zip(*(snapshot.pieces(array, CHUNK) for array in arrays), strict=True), *bias)
            for snapshot, bias in zip(ends, biases, strict=True)
        ]
        return path_scalars(
            origin.pieces(arrays[0], CHUNK), steps, batch_size=batch_size, developed=developed[name]
        )

    largest_first = sorted(
        developed, key=lambda name: -developed[name].numel()
    )  # the threads finish together
    return [total(parts) for parts in zip(*pool.map(one, largest_first), strict=True)]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, each with operations of one: a chunk is too small to share
    out."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)  # torch also notes the last number set for threads to come
