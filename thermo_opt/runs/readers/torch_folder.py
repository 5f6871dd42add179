"""Reader for a folder of files written by `torch.save`, one per checkpoint, whatever they are
called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from thermo_opt.errors import InputError
from thermo_opt.runs.border import visible
from thermo_opt.runs.readers import contents
from thermo_opt.runs.readers.common import Checkpoint, Found, open_run
from thermo_opt.runs.readers.curves import find_curve
from thermo_opt.runs.readers.optimizer_state import OptimizerState
from thermo_opt.runs.readers.series import Candidate, Series, series
from thermo_opt.runs.readers.steps import count_in
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import opened
from thermo_opt.runs.torch_file import TorchFile

_SUFFIXES = (".pth.tar", ".pt.tar", ".pt", ".pth", ".ckpt", ".bin", ".th", ".pkl", ".tar")
_OTHER = re.compile(
    r"(^|[._-])(scheduler|(lr_?)?sched\w*|scaler|rng\w*|random_states?\w*|training_args|args|config|dataloader|sampler|tokenizer|vocab"
    r"|trainer|hparams|meta|probe)([._-]|\d|$)",
    re.IGNORECASE,
)
"""Files that training loops leave beside their checkpoints."""
_OPTIMIZER = re.compile(
    r"(^|[._-])((optim|optimizer|optimiser|opt)(_?states?)?|training_states?)([._-]|\d|$)",
    re.IGNORECASE,
)


def recognise(path: Path) -> bool:
    """Whether a folder has files of `torch.save` with weights in their names' place."""
    return bool(model_files(path))


def read(path: Path, key: str | None = None) -> Run:
    """Open a folder of files of `torch.save`: each a state dict, bare or in a dictionary, the
    optimizer's beside it.

    ``key``: the state dict's dotted key where a file holds several models'.
    """
    files = model_files(path)
    if not files:
        raise InputError(
            f"{path} has no files of torch.save (.pt, .pth, .ckpt, …); give the folder of a "
            "recorded run"
        )
    if len(files) == 1 and (count := _models_in(files[0])) > 1:
        raise InputError(
            f"{files[0]} holds {count} models of one form, one after another: write each to a file "
            "of its own with its step in the name, like step-100.pt"
        )
    found = series_of(path, files, key)
    steps, remark = find_curve([path, path.parent])
    return run_of(path, "torch", found, key, steps, [remark] if remark else [])


def run_of(
    path: Path,
    format: str,
    found: Series,
    key: str | None,
    steps: pd.DataFrame | None,
    remarks: list[str],
    **info: Any,
) -> Run:
    """The run of a series of such files."""
    weights = state_dict(found.members[0][1].path, key)
    members, swapped = (found.members, []) if key else _as_optimized(found.members)
    checkpoints = [
        Found(step, checkpoint(candidate.path, key, weights)) for step, candidate in members
    ]
    return open_run(
        path,
        format,
        checkpoints,
        steps=steps,
        remarks=[*found.remarks, *beside(weights), *swapped, *remarks],
        key=key,
        tied=weights.tied,
        step_unit=found.unit,
        step_source=found.source,
        **info,
    )


def _as_optimized(
    members: list[tuple[int, Candidate]],
) -> tuple[list[tuple[int, Candidate]], list[str]]:
    """The series without its last files where those hold an average in the weights' own place.

    Tools that average weights put the average there when training ends: no step led to it.
    """
    ends = 0
    for _, candidate in reversed(members):
        weights = state_dict(candidate.path)
        if not any(
            same_weights(weights, state_dict(candidate.path, name))
            for name in weights.beside
            if contents.is_average(name) or weights.key == contents.LIGHTNING_RAW
        ):
            break
        ends += 1
    if not 0 < ends < len(members):  # before the first step, too, both are the same
        return members, []
    names = ", ".join(candidate.path.name for _, candidate in members[-ends:][:3])
    return members[:-ends], [
        f"left out: {names}, where averaged weights (EMA or SWA) have taken the place of those "
        "that the optimizer moved"
    ]


def _models_in(file: Path) -> int:
    """How many state dicts a file holds in one list, or under numbers: a whole run's."""
    content = opened(file, TorchFile).content
    places = [content, *(content.values() if isinstance(content, Mapping) else ())]
    for place in places:
        parts = place
        if isinstance(place, Mapping):
            parts = list(place.values()) if all(isinstance(k, int) for k in place) else []
        if isinstance(parts, list) and len(parts) > 1:
            names = [tuple(part) if isinstance(part, Mapping) else None for part in parts]
            if names[0] and len(set(names)) == 1:
                return len(parts)
    return 0


def series_of(path: Path, files: list[Path], key: str | None) -> Series:
    """The series that some files of `torch.save` make."""

    def same(one: Candidate, other: Candidate) -> bool:
        return same_weights(state_dict(one.path, key), state_dict(other.path, key))

    return series(
        path, [Candidate(file, stem_of(file), partial(count_of, file)) for file in files], same
    )


def checkpoint(file: Path, key: str | None, first: contents.StateDict) -> Checkpoint:
    """The contents of one such file of a series that begins with the weights ``first``; its
    optimizer's state may lie in a file beside it, named alike.
    """
    return Checkpoint(
        file, partial(_state_dict_like, first.key, file, key), partial(optimizer_of, file)
    )


def _state_dict_like(first: str, file: Path, key: str | None) -> contents.StateDict:
    """A file's state dict; averaged weights only where the series' first were, and else refused."""
    found = state_dict(file, key)
    if key is not None or contents.is_average(found.key) == contents.is_average(first):
        return found
    if first in found.beside:
        return state_dict(file, first)
    averaged, raw = (found.key, first) if contents.is_average(found.key) else (first, found.key)
    raise InputError(
        f"{file}: averaged weights ({averaged}) and the optimizer's own ({raw}) don't make one "
        "series; move those of one kind elsewhere, or choose with --key"
    )


def state_dict(file: Path, key: str | None = None) -> contents.StateDict:
    """The model's state dict in a file."""
    return contents.state_dict(opened(file, TorchFile), key)


def optimizer_of(file: Path) -> OptimizerState | str:
    """The optimizer's state in a checkpoint's file, or in the file beside it that belongs to it."""
    found = contents.optimizer_state(opened(file, TorchFile))
    if isinstance(found, str) and (other := _companion(file)) is not None:
        return contents.optimizer_state(opened(other, TorchFile))
    return found


def count_of(file: Path) -> tuple[int, str] | None:
    """The step that a file counts, and by what: an entry of it, else its optimizer's own count."""
    content = opened(file, TorchFile).content
    found = count_in(content)
    if found is not None:
        return found
    try:
        state = optimizer_of(file)
    except InputError:
        return None
    if isinstance(state, str):
        return None
    if not state.entries and "betas" in (state.groups[0].settings if state.groups else {}):
        return 0, OPTIMIZER_COUNT  # Adam before its first step
    return None if state.steps is None else (state.steps, OPTIMIZER_COUNT)


OPTIMIZER_COUNT = "the optimizer's own count"


def beside(weights: contents.StateDict) -> list[str]:
    """What is said of other state dicts in the same file."""
    remarks = []
    if contents.is_average(weights.key):
        remarks.append(
            f"its weights are an average ({weights.key}): those that the optimizer moved aren't in "
            "its files"
        )
    elif "n_averaged" in weights.layouts:
        remarks.append("its weights are an average (they hold n_averaged, as AveragedModel does)")
    if weights.beside:
        remarks.append(
            f"its files hold other weights too ({', '.join(weights.beside[:3])}), which were left "
            "aside: choose with --key"
        )
    return remarks


def same_weights(one: contents.StateDict, other: contents.StateDict) -> bool:
    """Whether two state dicts hold the same tensors."""
    return one.layouts == other.layouts and all(
        torch.equal(
            one.load(name).reshape(-1).view(torch.uint8),
            other.load(name).reshape(-1).view(torch.uint8),
        )
        for name in one.layouts
    )


def model_files(path: Path) -> list[Path]:
    """The files of a folder that may hold a model's weights, by their names."""
    return [
        file
        for file in torch_files(path)
        if not _OPTIMIZER.search(stem_of(file)) and not _OTHER.search(stem_of(file))
    ]


def optimizer_files(path: Path) -> list[Path]:
    """The files of a folder that hold an optimizer's state, by their names."""
    return [
        file
        for file in torch_files(path)
        if _OPTIMIZER.search(stem_of(file)) and not _OTHER.search(stem_of(file))
    ]


def torch_files(path: Path) -> list[Path]:
    """The files of a folder that `torch.save` may have written, by their suffixes."""
    return sorted(
        file
        for file in visible(path.iterdir())
        if file.name.lower().endswith(_SUFFIXES)
        and not file.is_dir()
        and not file.name.startswith(("events.", "zero_pp_rank_", "bf16_zero_pp_rank_"))
    )


def stem_of(file: Path) -> str:
    """A file's name without the suffix of its kind."""
    name = file.name
    suffix = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), file.suffix)
    return name[: len(name) - len(suffix)] if suffix else name


def _companion(file: Path) -> Path | None:
    """``optimizer_3.pt`` beside ``model_3.pt``: the one optimizer file with the same numbers in its
    name.
    """
    numbers = re.findall(r"\d+", stem_of(file))
    found = [
        other
        for other in optimizer_files(file.parent)
        if re.findall(r"\d+", stem_of(other)) == numbers
    ]
    return found[0] if len(found) == 1 else None
