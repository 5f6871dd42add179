"""Reader for one folder per checkpoint: ``step_10/model.pt``, ``checkpoint_0/`` of Accelerate,
FSDP's shards, adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from thermo_opt.errors import InputError
from thermo_opt.runs.border import REMEDY, inside, read_json, visible
from thermo_opt.runs.readers import contents, torch_folder
from thermo_opt.runs.readers.common import Checkpoint, Found, Weights, open_run
from thermo_opt.runs.readers.curves import find_curve
from thermo_opt.runs.readers.distributed import METADATA, DistributedFolder, DistributedWeights
from thermo_opt.runs.readers.distributed import optimizer_state as distributed_state
from thermo_opt.runs.readers.optimizer_state import OptimizerState
from thermo_opt.runs.readers.safetensors_folder import NO_OPTIMIZER, SafetensorsWeights
from thermo_opt.runs.readers.series import Candidate, series
from thermo_opt.runs.readers.steps import numbers_in
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import opened
from thermo_opt.runs.torch_file import LazyTensor, TorchFile

_INDEX = ".index.json"
_NONE = "holds no weights"
_USUAL = (
    "model",
    "pytorch_model",
    "adapter_model",
    "diffusion_pytorch_model",
    "weights",
    "state",
    "checkpoint",
    "ckpt",
    "policy",
)
_INNER = (
    *("model", "weights", "checkpoint", "ckpt", "net", "network", "policy"),
    *("unet", "transformer", "unwrapped_model"),  # of diffusers' trainings, beside what is frozen
)
"""Folders within a checkpoint's that hold the model alone."""
_SHARDS = re.compile(r"mp_rank_\d+_model_states\.pt|zero_pp_rank_.*")


def recognise(path: Path) -> bool:
    """Whether a folder has numbered folders with a checkpoint in each."""
    return bool(_folders(path))


def read(path: Path, key: str | None = None) -> Run:
    """Open a folder of folders, one per checkpoint; the step is the optimizer's own count, else the
    folder's number.
    """
    folders = _folders(path)
    if not folders:
        raise InputError(
            f"{path} has no numbered folders with a checkpoint in each; give the folder of a "
            "recorded run"
        )

    def same(one: Candidate, other: Candidate) -> bool:
        return one.path == other.path

    found = series(
        path, [Candidate(folder, folder.name, partial(_count, folder)) for folder in folders], same
    )
    steps, remark = find_curve([path, path.parent])
    forms = {_form(item.path) for _, item in found.members}
    others = [
        folder
        for folder in sorted(visible(path.iterdir()))
        if folder.is_dir() and folder not in folders and _form(folder) in forms
    ]
    weights = weights_of(found.members[0][1].path, key)()
    return open_run(
        path,
        "folders",
        [Found(step, checkpoint(item.path, key)) for step, item in found.members],
        steps=steps,
        remarks=[*found.remarks, *without_weights(others), *([remark] if remark else [])],
        key=key,
        tied=weights.tied if isinstance(weights, contents.StateDict) else {},
        step_unit=found.unit,
        step_source=found.source,
    )


def without_weights(folders: Sequence[Path]) -> list[str]:
    """What is said of checkpoints that stand among others and hold no weights."""
    if not folders:
        return []
    names = ", ".join(folder.name for folder in folders[:3])
    more = ", …" if len(folders) > 3 else ""
    return [f"left out, because they hold no weights of a kind that can be read: {names}{more}"]


def _form(folder: Path) -> str:
    """A folder's name but for its numbers."""
    return re.sub(r"\d+", "#", folder.name)


def checkpoint(folder: Path, key: str | None = None) -> Checkpoint:
    """The contents of one folder."""
    return Checkpoint(folder, lambda: weights_of(folder, key)(), partial(optimizer_of, folder))


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights of a kind that can be read, by its files' names."""
    try:
        weights_of(folder)
    except InputError as error:
        return _NONE not in str(error)
    return True


def weights_of(folder: Path, key: str | None = None) -> Callable[[], Weights]:
    """Opens the weights in a folder: safetensors, files of `torch.save`, either in shards, or
    distributed ones.

    Raises `InputError` when there are none, or several.
    """
    try:
        return _weights_in(folder, key)
    except InputError as error:
        if _NONE not in str(error) or not (inner := _inner(folder)):
            raise
        return _weights_in(inner, key)


def _inner(folder: Path) -> Path | None:
    """The folder within a checkpoint's, as ``iter_10/model/``, where the model's one file lies."""
    numbered = re.fullmatch(r"((checkpoint|ckpt|global_step)[-_]?)?\d+", folder.name)
    if numbers_in([folder.name]).unit is None and not numbered:
        return None  # exp1/weights/ is a run, and not a checkpoint of one
    below = [place for place in sorted(visible(folder.iterdir())) if place.is_dir()]
    usual = [place for place in below if place.name.lower() in _INNER]
    places = usual or (below if len(below) == 1 else [])
    return places[0] if len(places) == 1 else None


def _weights_in(folder: Path, key: str | None) -> Callable[[], Weights]:
    indices = sorted(visible(folder.glob("*" + _INDEX)))
    if indices:
        return partial(_sharded, indices[0], key)
    tensors = [
        file
        for file in visible(folder.glob("*.safetensors"))
        if "optim" not in file.name and file.stem != "probe"
    ]
    if tensors:
        return partial(SafetensorsWeights, [_only(folder, sorted(tensors), lambda file: file.stem)])
    models = torch_folder.model_files(folder)
    if models and not any(_SHARDS.match(file.name) for file in models):
        return partial(torch_folder.state_dict, _only(folder, models, torch_folder.stem_of), key)
    for place in (
        folder,
        folder / "pytorch_model_fsdp_0",
        folder / "model",
        folder / "pytorch_model_0",
    ):
        if (place / METADATA).exists():
            return lambda: DistributedWeights(opened_folder(place))
    states = deepspeed(folder)
    if states is not None:
        return partial(torch_folder.state_dict, states, key or "module")
    raise InputError(f"{folder} {_NONE} of a kind that can be read")


def optimizer_of(folder: Path) -> OptimizerState | str:
    """The optimizer's state in a folder, in a file of its own or in the weights' file; a sentence
    where there is none.
    """
    if deepspeed(folder) is not None or any(folder.glob("global_step*")):
        return "its optimizer's state is DeepSpeed's, cut into flat pieces that name no parameters"
    files = torch_folder.optimizer_files(folder)
    for inner in (folder / "optim", folder / "optimizer"):
        if not files and inner.is_dir():
            files = [*torch_folder.optimizer_files(inner), *torch_folder.model_files(inner)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        return f"it holds the states of {len(files)} optimizers ({names})"
    if files:
        found = contents.optimizer_state(opened(files[0], TorchFile))
        return f"{files[0].name} holds no optimizer's state" if found == NO_OPTIMIZER else found
    for place in (folder, folder / "optimizer_0", folder / "optimizer", folder / "optim"):
        if (place / METADATA).exists() and not isinstance(
            state := distributed_state(opened_folder(place)), str
        ):
            return state
    place = folder if torch_folder.model_files(folder) else _inner(folder) or folder
    if not files and place != folder:
        files = torch_folder.optimizer_files(place)
        if len(files) == 1:
            return contents.optimizer_state(opened(files[0], TorchFile))
    models = [file for file in torch_folder.model_files(place) if not _SHARDS.match(file.name)]
    if len(models) == 1:
        return contents.optimizer_state(opened(models[0], TorchFile))
    return NO_OPTIMIZER


def opened_folder(place: Path) -> DistributedFolder:
    """A distributed checkpoint, remembered while its metadata stay unchanged."""
    return opened(place / METADATA, _distributed)


def _distributed(metadata: Path) -> DistributedFolder:
    return DistributedFolder(metadata.parent)


def deepspeed(folder: Path) -> Path | None:
    """DeepSpeed's file of a whole model's weights (ZeRO stages 1 and 2 keep one)."""
    for place in (folder, *sorted(folder.glob("global_step*")), folder / "pytorch_model"):
        states = sorted(visible(place.glob("mp_rank_*_model_states.pt")))
        if len(states) == 1:
            return states[0]
    return None


def _sharded(index: Path, key: str | None) -> Weights:
    """Weights in several files, by the index that says which file holds which."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index} has no weight_map; restore the file from a copy")
    of: dict[str, Path] = {}
    for name, shard in shards.items():
        file = inside(index.parent, shard)
        if file is None:
            raise InputError(
                f"{index}: {str(shard)[:80]!r} isn't the name of a file in this folder; restore "
                "the index"
            )
        of[name] = file
    files = sorted(set(of.values()))
    for file in files:
        if not file.exists():
            raise InputError(f"{file} is missing, though {index.name} lists it; {REMEDY}")
    if all(file.suffix == ".safetensors" for file in files):
        weights = SafetensorsWeights(files, of)
        absent = of.keys() - weights.layouts.keys()
        if absent:
            name = min(absent)
            raise InputError(f"{of[name]} lacks {name!r}, though {index.name} lists it; {REMEDY}")
        return weights
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        content = torch_folder.state_dict(file, key)
        tensors |= content.tensors
    return contents.StateDict(index, tensors)


def _only(folder: Path, files: list[Path], stem: Callable[[Path], str]) -> Path:
    """The one of several files that is the model's, by its name."""
    if len(files) == 1:
        return files[0]
    usual = [
        file for name in _USUAL for file in files if re.sub(r"[-_.]?\d+$", "", stem(file)) == name
    ]
    if not usual:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(
            f"{folder} holds several files of weights ({names}); keep the model's own there"
        )
    return usual[0]


def _count(folder: Path) -> tuple[int, str] | None:
    try:
        state = optimizer_of(folder)
    except InputError:
        return None
    if isinstance(state, OptimizerState):
        if not state.entries and state.groups and "betas" in state.groups[0].settings:
            return 0, torch_folder.OPTIMIZER_COUNT
        if state.steps is not None:
            return state.steps, torch_folder.OPTIMIZER_COUNT
    return None


def _folders(path: Path) -> list[Path]:
    folders = sorted(folder for folder in visible(path.iterdir()) if folder.is_dir())
    numbers = {folder: numbers_in([folder.name]).numbers[0] for folder in folders}
    return [folder for folder in folders if numbers[folder] is not None and holds_weights(folder)]
