"""Reader for what the Hugging Face `Trainer` leaves: ``checkpoint-*/`` with weights,
``optimizer.pt`` and ``trainer_state.json``.

``training_args.bin`` is a pickle and never opened; code shipped with a model is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.runs.format import with_numbers
from thermo_opt.runs.readers.checkpoint import Checkpoint, open_run
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import SafetensorsFile, TorchFile, load_torch, opened

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CATEGORICAL = (
    "ForCausalLM",
    "LMHeadModel",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForImageClassification",
)


def recognise(path: Path) -> bool:
    """Whether a folder has ``checkpoint-<step>/`` folders with weights in them, or is one of
    them."""
    return any(_has_weights(folder) for folder in _checkpoints(path).values()) or _is_checkpoint(
        path
    )


def read(path: Path) -> Run:
    """Open the output folder of a Hugging Face `Trainer`."""
    folders = {step: folder for step, folder in _checkpoints(path).items() if _has_weights(folder)}
    if not folders:
        hint = (
            "give the folder that holds it"
            if _is_checkpoint(path)
            else "give a Trainer's output folder"
        )
        raise InputError(f"{path} has no checkpoint-<step> folders with {_WEIGHTS[0]}; {hint}")
    last = folders[max(folders)]
    config_path = next(
        (file for folder in folders.values() if (file := folder / "config.json").exists()), None
    )
    config = _read_json(config_path) if config_path else {}
    architectures = _architectures(config)
    categorical = any(name.endswith(_CATEGORICAL) for name in architectures) and config.get(
        "problem_type"
    ) in (
        None,
        "single_label_classification",
    )
    state_path = last / "trainer_state.json"
    state = _read_json(state_path) if state_path.exists() else {}
    notes = {
        key: state[key]
        for key in ("train_batch_size", "max_steps", "num_train_epochs")
        if state.get(key) is not None
    }
    return open_run(
        path,
        "huggingface",
        [(step, HuggingFaceCheckpoint(folder)) for step, folder in folders.items()],
        _training_curve(state, state_path),
        clock="step",
        likelihood="categorical" if categorical else None,
        hf_config_path=config_path,
        notes={**notes, **({"architecture": architectures[0]} if architectures else {})},
    )


@dataclass
class HuggingFaceCheckpoint(Checkpoint):
    """One ``checkpoint-<step>/``: weights in one file or in shards, optimizer state in
    ``optimizer.pt``."""

    @cached_property
    def _files(self) -> dict[str, Path]:
        for name in _WEIGHTS:
            index = self.path / f"{name}.index.json"
            if index.exists():
                shards = _read_json(index).get("weight_map")
                if not isinstance(shards, dict):
                    raise InputError(f"{index} has no weight_map; restore the file from a copy")
                missing = sorted(
                    {shard for shard in shards.values() if not (self.path / shard).exists()}
                )
                if missing:
                    raise InputError(
                        f"{self.path / missing[0]} is missing, though {index.name} lists it; "
                        "restore the file"
                    )
                return {key: self.path / shard for key, shard in shards.items()}
            if (self.path / name).exists():
                return dict.fromkeys(self._open(self.path / name).shapes, self.path / name)
        raise InputError(
            f"{self.path} has no {_WEIGHTS[0]}; restore the file, or remove this checkpoint"
        )

    def weights(self) -> Mapping[str, Path]:
        """Weight → the file that holds it."""
        return self._files

    def weight(self, name: str) -> Tensor:
        """One weight, mapped."""
        return self._open(self._files[name]).load(name)

    def optimizer_state(self) -> Mapping[str, Any] | None:
        """The contents of ``optimizer.pt``, if it is there."""
        file = self.path / "optimizer.pt"
        if not file.exists():
            return None
        state = opened(file, load_torch)
        if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
            raise InputError(
                f"{file} isn't a torch optimizer's state; remove it to audit the weights alone"
            )
        return state

    def parameter_orders(self, groups: int) -> Sequence[Sequence[Sequence[str]]]:
        """The Trainer's own grouping (decayed, then not) of the architecture that ``config.json``
        names.

        Safetensors files are sorted by name, so without the architecture only moments whose shape
        is unique can be named.
        """
        config = self.path / "config.json"
        orders = _trainer_orders(config, config.stat().st_mtime_ns) if config.exists() else None
        if orders is not None:
            return [order for order in orders if len(order) == groups]
        shapes = [
            shape for name, shape in self._weight_shapes.items() if name.startswith("params/")
        ]
        if len(set(shapes)) < len(shapes):
            return []
        by_shape = {
            shape: name.removeprefix("params/")
            for name, shape in self._weight_shapes.items()
            if name.startswith("params/")
        }
        state = self.optimizer_state()
        assert state is not None
        entries = [
            [state["state"].get(index, {}).get("exp_avg") for index in group["params"]]
            for group in state["param_groups"]
        ]
        if any(
            entry is None or tuple(entry.shape) not in by_shape
            for group in entries
            for entry in group
        ):
            return []
        return [[[by_shape[tuple(entry.shape)] for entry in group] for group in entries]]

    @staticmethod
    def _open(file: Path) -> SafetensorsFile | TorchFile:
        return opened(file, SafetensorsFile if file.suffix == ".safetensors" else TorchFile)


def model_from_config(config_path: Path, device: str = "cpu") -> nn.Module:
    """The architecture that a ``config.json`` names, with fresh weights, built by the installed
    `transformers` alone.

    Raises `InputError` when transformers is missing or doesn't have it; code shipped with a
    checkpoint is never run.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{config_path}: building the model needs transformers; pip install "
            "'thermo-opt[transformers]'"
        ) from None
    config = _read_json(config_path)
    kind, names = str(config.get("model_type")), _architectures(config)
    architecture = getattr(transformers, names[0], None) if names else None
    if kind not in transformers.CONFIG_MAPPING or not (
        isinstance(architecture, type) and issubclass(architecture, nn.Module)
    ):
        raise InputError(
            f"{config_path} names an architecture ({names[0] if names else kind}) that the "
            "installed transformers "
            "lacks; "
            "give --model package.module:factory"
        )
    try:
        with torch.random.fork_rng(), torch.device(device):
            return architecture(transformers.CONFIG_MAPPING[kind].from_dict(config))
    except Exception as error:  # each architecture checks its settings in its own way
        reason = " ".join(str(error).split())
        raise InputError(
            f"{config_path}: {names[0]} can't be built from it ({reason or type(error).__name__}); "
            "restore the file, or "
            "give --model package.module:factory"
        ) from None


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


@lru_cache(maxsize=2)
def _trainer_orders(config_path: Path, modified: int) -> list[list[list[str]]] | None:
    """Orders in which the Trainer may have given the architecture's parameters to its optimizer;
    None: it can't be built.
    """
    try:
        from transformers import Trainer

        model = model_from_config(config_path, "meta")
    except (InputError, ImportError):
        return None
    names = [name for name, _ in model.named_parameters()]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}

    def split(first: set[str]) -> list[list[str]]:
        return [
            [name for name in names if name in first],
            [name for name in names if name not in first],
        ]

    return [split(decayed), split(matrices), [names]]


def _training_curve(state: dict[str, Any], file: Path) -> pd.DataFrame:
    """``log_history`` as a table, one row a step: the Trainer's names, but for lr, tokens (since
    the row before) and wall.
    """
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(
        isinstance(row, dict) and isinstance(row.get("step"), int) for row in history
    ):
        raise InputError(f"{file}: log_history isn't a list of steps; restore the file")
    rows: dict[int, dict[str, Any]] = {}
    for row in history:
        rows.setdefault(row["step"], {}).update(
            {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        )
    frame = pd.DataFrame(
        [rows[step] for step in sorted(rows)], columns=None if rows else ["step"]
    ).set_index("step")
    frame = frame.rename(columns={"learning_rate": "lr", "train_runtime": "wall"})
    if "num_input_tokens_seen" in frame:
        frame["tokens"] = frame.pop("num_input_tokens_seen")
    frame = with_numbers(frame, file)
    if "tokens" in frame:  # cumulative in the log
        frame["tokens"] -= frame["tokens"].ffill().shift().fillna(0.0)
    return frame


def _checkpoints(path: Path) -> dict[int, Path]:
    return {
        int(match[1]): folder
        for folder in sorted(path.glob("checkpoint-*"))
        if folder.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.resolve().name) is not None and _has_weights(path)


def _has_weights(folder: Path) -> bool:
    return any(
        (folder / name).exists() or (folder / f"{name}.index.json").exists() for name in _WEIGHTS
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} can't be read ({error}); restore it from a copy") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} isn't a JSON object; restore it from a copy")
    return content
