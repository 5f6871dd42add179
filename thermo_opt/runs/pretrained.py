"""A Hugging Face model, weights and all, from a folder that the user names: the base of an
adapter."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs.probing import install
from thermo_opt.runs.readers.architecture import in_memory, model_from_config
from thermo_opt.runs.readers.common import Checkpoint
from thermo_opt.runs.readers.safetensors_folder import NO_OPTIMIZER
from thermo_opt.runs.run import Snapshot


def pretrained(folder: Path) -> nn.Module:
    """The model of a folder with ``config.json`` and weights, as ``save_pretrained`` writes it.

    Built by the installed `transformers` from the config alone; files are read as those of runs
    are, and no code beside them is executed.

    Raises:
        InputError: naming the folder, when the config or a weight is missing or can't be used.
    """
    config = folder / "config.json"
    if not config.exists():
        raise InputError(
            f"--model {folder}: a folder must be that of a Hugging Face model, and it has no "
            "config.json: give one that has, or package.module:factory"
        )
    model = model_from_config(config)
    checkpoint = Checkpoint(folder, lambda: in_memory(folder, config), lambda: NO_OPTIMIZER)
    install(model, Snapshot(0, folder, checkpoint))
    return model
