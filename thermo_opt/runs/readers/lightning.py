"""Reader for PyTorch Lightning: the ``*.ckpt`` files of one run, with the log of its CSV or
TensorBoard logger.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thermo_opt.errors import InputError
from thermo_opt.runs.border import visible
from thermo_opt.runs.readers import torch_folder
from thermo_opt.runs.readers.curves import find_curve
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import opened
from thermo_opt.runs.torch_file import TorchFile


def recognise(path: Path) -> bool:
    """Whether there are ``*.ckpt`` files in a folder or below it, and the first of them is
    Lightning's.
    """
    files = _files(path)
    if not files:
        return False
    try:
        return _is_lightning(files[0])
    except InputError:
        return files[0].parent != path  # damaged: `read` says so


def read(path: Path, key: str | None = None) -> Run:
    """Open the folder of a Lightning run (the checkpoints' own, or one above it); steps are each
    file's ``global_step``.

    Where weights were averaged while training (EMA, SWA callbacks), the raw ones are read: the
    optimizer moved those.
    """
    files = _files(path)
    if not files:
        raise InputError(f"{path} has no .ckpt files; give the folder of a Lightning run")
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise InputError(
            f"{path} holds checkpoints of several runs "
            f"({', '.join(str(folder) for folder in folders[:3])}); give one of them"
        )
    for file in files:
        if not _is_lightning(file):
            raise InputError(
                f"{file} has no global_step, so it isn't Lightning's; use --format torch"
            )
    found = torch_folder.series_of(path, files, key)
    steps, remark = find_curve([folders[0], folders[0].parent, path], shift=1)
    remarks = [remark] if remark else []
    ends = (found.members[0][1].path, found.members[-1][1].path)
    if key is None and any("averaging_state" in _keys(file) for file in ends):
        remarks.append(
            "its state_dict holds averaged weights (EMA): the raw ones, which the optimizer "
            "moved, were read"
        )
    return torch_folder.run_of(path, "lightning", found, key, steps, remarks)


def _is_lightning(file: Path) -> bool:
    return bool(
        {"global_step", "pytorch-lightning_version"} & _keys(file)
    ) and "state_dict" in _keys(file)


def _keys(file: Path) -> frozenset[str]:
    content = opened(file, TorchFile).content
    return (
        frozenset(key for key in content if isinstance(key, str))
        if isinstance(content, Mapping)
        else frozenset()
    )


def _files(path: Path) -> list[Path]:
    return sorted(file for file in visible(path.rglob("*.ckpt")) if not file.is_dir())
