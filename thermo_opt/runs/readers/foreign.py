"""Layouts that are recognised but not read: what was found, and the one way through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREDICTIONS = (
    "export its predictions on fixed examples, one file per checkpoint with the tensor "
    "probe/logits "
    "(safetensors)"
)


@dataclass(frozen=True)
class _Kind:
    """A kind of files: a pattern of their names, what they are, and the one way through."""

    names: str
    what: str
    remedy: str = _PREDICTIONS


_KINDS = (
    _Kind(
        r".*\.distcp|\.metadata",
        "shards of torch.distributed.checkpoint without a readable .metadata beside them",
        "copy the whole checkpoint folders, or convert each with torch.distributed.checkpoint's "
        "dcp_to_torch_save",
    ),
    _Kind(
        r"model_optim_rng\.pt|latest_checkpointed_iteration\.txt",
        "checkpoints of Megatron-LM, cut over its ranks",
        "convert each to Hugging Face's format with Megatron's own tools, or " + _PREDICTIONS,
    ),
    _Kind(
        r"mp_rank_\d+.*|(bf16_)?zero_pp_rank_.*",
        "DeepSpeed's checkpoints",
        "convert each with the zero_to_fp32.py that DeepSpeed wrote beside it",
    ),
    _Kind(
        r"adapter_(model|config)\..*",
        "a PEFT (LoRA) adapter",
        "give the folder that holds its checkpoint-<step> folders",
    ),
    _Kind(r".*\.(weights\.h5|keras|h5|hdf5)", "weights of Keras"),
    _Kind(
        r".*\.ckpt-\d+\.(index|meta|data-.*)|.*\.index|.*\.data-\d+-of-\d+|saved_model\.pb|.*\.tflite",
        "a checkpoint of TensorFlow",
    ),
    _Kind(
        r".*\.msgpack|_CHECKPOINT_METADATA|_METADATA|_sharding|manifest\.ocdbt|.*orbax.*"
        r"|checkpoint_\d+",
        "a checkpoint of Flax or Orbax",
    ),
    _Kind(
        r".*tfevents.*",
        "TensorBoard's event files, which hold curves but neither weights nor predictions",
        "give the folder of the checkpoints",
    ),
    _Kind(
        r".*\.wandb|wandb-(summary|metadata)\.json",
        "the files of a Weights & Biases run, which hold curves alone",
        "download the run's checkpoints and give their folder",
    ),
    _Kind(
        r".*\.(npz|npy)",
        "NumPy arrays",
        "if they are predictions on fixed examples, call the arrays logits (or probabilities, "
        "log_probabilities, mean) and the examples' classes labels, or give them to "
        "thermo_opt.audit_predictions; weights alone can't be replayed from them",
    ),
    _Kind(
        r".*\.(parquet|arrow|feather|csv|tsv|jsonl|ndjson)|.*(pred|logit|prob|epoch|step).*\.json",
        "tables, but no checkpoints",
        "give the folder of the checkpoints, or a parquet, CSV or JSONL table of predictions with "
        "the columns step, example, label and logit_0, logit_1, … (or prob_0, …)",
    ),
    _Kind(
        r"\.snapshot_metadata",
        "a snapshot of torchsnapshot",
        "restore each into the model and write its state_dict with torch.save, as step-100.pt",
    ),
    _Kind(
        r".*\.(joblib|sav)",
        "what joblib wrote, which only running it would read",
        "save predictions with numpy.savez, one file per epoch with the arrays probabilities and "
        "labels",
    ),
    _Kind(
        r".*\.(ubj|xgb|lgb|cbm|model)",
        "models of boosted trees, which have no weights to replay",
        "save predictions on fixed examples, one table with the columns iteration, label and "
        "prob_0, prob_1, …",
    ),
    _Kind(
        r".*\.(zip|nemo|tgz|gz|xz|bz2|zst|7z)",
        "archives or compressed files",
        "unpack each into a folder of its own with its step in the name, like step-100/policy.pth",
    ),
    _Kind(
        r".*\.(onnx|pt2|gguf|ggml|mlmodel|pdparams|rds|RData)",
        "models in a format that holds no training state",
    ),
    _Kind(
        r".*\.(pt|pth|bin|ckpt|safetensors|tar|pkl|th)(\..*)?",
        "files of checkpoints, but none with a model's weights and a step",
        "put one file or folder per checkpoint there, with its step in the name, like step-100.pt",
    ),
)
_MOST = 2000
"""Files looked at."""


def what_is_in(folder: Path) -> str:
    """A sentence: what a folder of no readable layout holds, and what to do."""
    names = list(_names(folder))
    for kind in _KINDS:
        found = next(
            (name for name in names if re.fullmatch(kind.names, name, re.IGNORECASE)), None
        )
        if found is not None:
            return f"it holds {kind.what} ({found}): {kind.remedy}"
    return (
        "it holds no recorded run of a known layout (run.json, checkpoint-*/, *.ckpt, *.pt, "
        "*.safetensors, numbered folders): "
        "give the folder of the checkpoints, or " + _PREDICTIONS
    )


def _names(folder: Path, depth: int = 4) -> Iterator[str]:
    """Names of files and folders at most ``depth`` below."""
    level = [folder]
    count = 0
    for _ in range(depth):
        below: list[Path] = []
        for place in level:
            try:
                entries = sorted(place.iterdir())
            except OSError:
                continue
            for entry in entries:
                count += 1
                if count > _MOST:
                    return
                yield entry.name
                if entry.is_dir() and not entry.is_symlink():
                    below.append(entry)
        level = below
