"""Readers for files of `torch.save`: a folder of state dicts (``*.pt``, ``*.pth``) and Lightning's
``*.ckpt``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.format import visible
from thermo_opt.runs.readers.checkpoint import Checkpoint, open_run, step_in_name
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import load_torch, opened

_MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states")
_SUFFIXES = (".pt", ".pth")


def recognise(path: Path) -> bool:
    """Whether a folder has ``*.pt`` or ``*.pth`` files."""
    return bool(_files(path))


def read(path: Path) -> Run:
    """Open a folder of torch state dicts, bare or under ``model`` / ``state_dict`` /
    ``model_state_dict``, with the optimizer's under ``optimizer`` / ``optimizer_state_dict`` if
    saved. The step is the last number in each file's name.
    """
    files = _files(path)
    if not files:
        raise InputError(f"{path} has no .pt or .pth files; give the folder of a recorded run")
    checkpoints: list[tuple[int, Checkpoint]] = [
        (step_in_name(file), TorchCheckpoint(file)) for file in files
    ]
    tied = tied_names(checkpoints[0][1])
    return open_run(path, "torch", checkpoints, clock="step", tied=tied)


@dataclass
class TorchCheckpoint(Checkpoint):
    """One file of `torch.save`; names of one shared tensor count once, under the first of them."""

    def weights(self) -> Mapping[str, Tensor]:
        """The state dict's tensors, shared ones once."""
        unique: dict[tuple[Any, ...], str] = {}
        for name, tensor in self.state_dict().items():
            unique.setdefault(_identity(name, tensor), name)
        return {name: self.state_dict()[name] for name in unique.values()}

    def weight(self, name: str) -> Tensor:
        """One tensor of the state dict, mapped."""
        return self.state_dict()[name]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the state dict."""
        content = self._content()
        nested = next(
            (content[key] for key in _MODEL_KEYS if isinstance(content.get(key), Mapping)), content
        )
        tensors = {name: value for name, value in nested.items() if isinstance(value, Tensor)}
        if not tensors:
            raise InputError(
                f"{self.path} holds no state dict (looked for tensors under "
                f"{', '.join(_MODEL_KEYS)}); remove the file"
            )
        return tensors

    def optimizer_state(self) -> Mapping[str, Any] | None:
        """The optimizer's state dict, if it was saved too."""
        content = self._content()
        found = next(
            (content[key] for key in _OPTIMIZER_KEYS if content.get(key) is not None), None
        )
        if isinstance(found, list):
            if len(found) > 1:
                return None
            found = found[0] if found else None
        return (
            found
            if isinstance(found, Mapping) and {"state", "param_groups"} <= set(found)
            else None
        )

    def _content(self) -> Mapping[str, Any]:
        content = opened(self.path, load_torch)
        if not isinstance(content, Mapping):
            raise InputError(
                f"{self.path} holds a {type(content).__name__}, not a state dict; save "
                "model.state_dict()"
            )
        return content


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Other names of shared tensors → the name under which they count."""
    assert isinstance(checkpoint, TorchCheckpoint)
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in checkpoint.state_dict().items():
        kept = first.setdefault(_identity(name, tensor), name)
        if kept != name:
            tied[name] = kept
    return tied


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    return (
        (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel()
        else (name,)
    )


def _files(path: Path) -> list[Path]:
    return sorted(
        file for file in visible(path.iterdir()) if file.suffix in _SUFFIXES and file.is_file()
    )
