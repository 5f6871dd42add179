"""Arrays of predictions in other tools' files: which array is what, told by its name, its form and
its place."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from thermo_opt.errors import InputError, first_line
from thermo_opt.runs.border import regular
from thermo_opt.runs.predictions import as_tensor
from thermo_opt.runs.probe_files import LIMIT, read_arrays
from thermo_opt.runs.readers.steps import UNITS, numbers_in
from thermo_opt.runs.readers.tables import csv_table
from thermo_opt.runs.steps_file import json_lines
from thermo_opt.runs.tensors import opened
from thermo_opt.runs.torch_file import LazyTensor, PlainArray, TorchFile

OUTPUTS: dict[str, str | None] = {
    "logits": None,
    "log_probabilities": "log-probabilities",
    "probabilities": "probabilities",
    "mean": "mean",
    "predictions": None,
}
"""What predictions are called here, and what they then are; ``predictions`` doesn't say."""
TARGETS, WEIGHTS, EXAMPLES = "targets", "weights", "examples"
STEP, EPOCH, SNAPSHOT = "step", "epoch", "snapshot"
COUNTERS = (STEP, EPOCH, SNAPSHOT)
_ALIASES = {
    "logits": "logit",
    "log_probabilities": "log_probability log_probs log_prob logprobs logprob log_softmax "
    "logsoftmax log_p logp",
    "probabilities": "probability probs prob proba softmax y_prob y_probs y_proba pred_prob "
    "pred_probs pred_proba predict_proba y_pred_prob y_pred_probs y_pred_proba p",
    "mean": "means",
    "predictions": "prediction preds pred outputs output y_pred y_preds y_hat yhat scores score "
    "y_score y_scores z class classes raw_score raw_scores margin output_margin "
    "decision_function",
    TARGETS: "target labels label y_true y true truth ground_truth gt",
    WEIGHTS: "weight sample_weight sample_weights attention_mask",
    EXAMPLES: "example example_id example_ids ids id index indices",
    STEP: "steps global_step iteration iterations iter iters iter_num num_iteration num_updates "
    "n_estimators trees rounds round",
    EPOCH: "epochs",
    SNAPSHOT: "snapshots checkpoint",
}
_ROLES = {alias: role for role, names in _ALIASES.items() for alias in (role, *names.split())}
_STRONG = frozenset(["logits", "log_probabilities", "probabilities"])
"""Roles whose names are used for nothing but predictions of classes."""
_SPLITS = frozenset(
    [
        *("train", "training", "val", "valid", "validation", "test", "eval", "probe", "all"),
        *("model", "final", "snapshot", "snapshots"),
    ]
)
"""Words in a name that don't say what an array is."""
SUFFIXES = (
    *(".npz", ".npy", ".parquet", ".csv", ".jsonl", ".safetensors"),
    *(".pt", ".pth", ".pkl", ".pickle"),
)
_TABLES = (".parquet", ".csv", ".jsonl")
_TORCH = (".pt", ".pth", ".pkl", ".pickle")


def role(name: str) -> str | None:
    """What an array of this name is: a role, "" where only a number or a split names it, else
    None."""
    if "/" in name:
        return None
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower())
    found = _ROLES.get("_".join(words))
    if found is not None and not (found in COUNTERS and re.search(r"\d", name)):
        return found
    rest = "_".join(w for w in words if w not in _SPLITS and w not in UNITS)
    return _ROLES.get(rest) if rest else ""


def evidence(file: Path) -> str | None:
    """Whether a file holds predictions: "named" so, of a form that is one ("form"), or things that
    go beside them ("beside"); None where nothing tells.

    Reads names and shapes alone.
    """
    try:
        regular(file)
        if file.suffix == ".npy":
            return _of_stem(file)
        if file.suffix in _TORCH:
            return _of_content(opened(file, TorchFile).content, file)
        return _of_names(_names(file), file.suffix in _TABLES)
    except Exception:  # damaged, or of another kind: for the other readers to say
        return None


def _of_stem(file: Path) -> str | None:
    found = role(file.stem)
    if found in OUTPUTS:
        return "named"
    if found == "":
        return "form" if re.search(r"\d", file.stem) else None
    return None if found is None else "beside"


def _of_names(names: Sequence[str], table: bool = False) -> str | None:
    roles = [role(name) for name in names if not _is_index(name)]
    known = None not in roles and "" not in roles
    strong = [found for found in roles if found in _STRONG]
    exact = (n for n in names if role(n) in _STRONG and len(n) > 1)
    if any(name.lower() in _ROLES for name in exact) or len(strong) > 1:
        return "named"
    if table and _by_class(names):
        return "named"
    if known and any(found in OUTPUTS for found in roles):
        return "named"
    if names and all(found or _counted(name) for name, found in zip(names, roles, strict=False)):
        return "form" if any(_counted(name) for name in names) else "beside"
    return "beside" if known and roles else None


def _counted(name: str) -> bool:
    """Whether a name is a number alone, as ``epoch_3``, or NumPy's own for what wasn't named."""
    return bool(re.fullmatch(r"arr_\d+", name)) or (
        role(name) == "" and re.search(r"\d", name) is not None
    )


def _of_content(content: Any, file: Path) -> str | None:
    if isinstance(content, LazyTensor | PlainArray):
        return _of_stem(file)
    if isinstance(content, Mapping):
        arrays = {
            str(key): value
            for key, value in content.items()
            if isinstance(value, LazyTensor | PlainArray | list | tuple)
        }
        if not arrays and content:
            inner = [value for value in content.values() if isinstance(value, Mapping)]
            return _of_content(inner[0], file) if inner else None
        found = _of_names(list(arrays))
        shapes = [shape for value in arrays.values() if (shape := _shape(value)) is not None]
        if found == "form" and not any(len(shape) > 1 for shape in shapes):
            return None
        return found
    if isinstance(content, list | tuple) and content:
        if all(isinstance(part, Mapping) for part in content):
            return _of_content(content[0], file)
        if all(isinstance(part, LazyTensor | PlainArray) for part in content):
            alike = len({_shape(part) for part in content}) == 1
            series = alike and len(_shape(content[0]) or ()) > 1
            return _of_stem(file) or ("form" if series else None)
    return None


def _shape(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list | tuple):
        inner = _shape(value[0]) if value else None
        return None if inner is None else (len(value), *inner)
    return tuple(value.shape) if isinstance(value, LazyTensor | PlainArray) else None


def _names(file: Path) -> list[str]:
    """Names of the arrays in a file, without reading them."""
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), "np") as content:
            return list(content.keys())
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    regular(file)
    if file.suffix == ".csv":
        return list(pd.read_csv(file, nrows=0).columns)
    return list(next(json_lines(file)))


def arrays_of(file: Path) -> tuple[dict[str, Any], str | None]:
    """A file's arrays by their roles (`OUTPUTS`, `TARGETS`, …; others by their own names), and what
    its predictions are called where the name doesn't say what they are.

    Several arrays or entries that are numbered make one of (snapshots, ...), their numbers under
    `STEP` or `EPOCH`; columns of one class each make one of (rows, classes).

    Raises:
        InputError: naming the file, when it is damaged or holds no numbers.
    """
    content = _content(file)
    if not isinstance(content, Mapping):
        content = _sequence(content, file)
    content = _one_level(content, file)
    table = file.suffix in _TABLES
    raw = {str(name): array for name, array in content.items() if not _is_index(str(name))}
    arrays: dict[str, Any] = {}
    called: dict[str, str] = {}
    hard: str | None = None
    for name, (array, said) in _joined(_columns(raw, table), file).items():
        found = role(name) or name
        if found in OUTPUTS and _is_whole(array):  # class numbers, whatever they are called
            is_class = name.lower() in ("class", "classes")
            hard, found = (hard, TARGETS) if is_class else (name, name)
        if found in arrays:
            found = name
        arrays[found], called[found] = array, said
    if not any(name in arrays for name in OUTPUTS):
        _name_by_form(arrays, called, file)
        if hard is not None and "predictions" not in arrays:
            raise InputError(
                f"{file}: {hard!r} holds whole numbers: an audit needs the logits or the "
                "probabilities that these classes were chosen by"
            )
    return arrays, called.get("predictions")


def _name_by_form(arrays: dict[str, Any], called: dict[str, str], file: Path) -> None:
    """Give the one array that can be predictions that role, and whole numbers beside it, which
    nobody named, the targets'."""
    other = [name for name in arrays if name not in (TARGETS, WEIGHTS, EXAMPLES, *COUNTERS)]
    floats = [name for name in other if np.ndim(arrays[name]) > 1 and not _is_whole(arrays[name])]
    beside = any(name in arrays for name in (TARGETS, *COUNTERS))
    if len(floats) != 1 or not (beside or _counted(floats[0]) or role(file.stem) in OUTPUTS):
        return
    arrays["predictions"] = arrays.pop(floats[0])
    called["predictions"] = called.pop(floats[0])
    shape = tuple(arrays["predictions"].shape)
    whole = [
        name
        for name in other
        if name != floats[0]
        and _counted(name)
        and _is_whole(arrays[name])
        and np.shape(arrays[name]) in (shape[:-1], shape[1:-1])
    ]
    if TARGETS not in arrays and len(whole) == 1:
        arrays[TARGETS] = arrays.pop(whole[0])


def _content(file: Path) -> Any:
    if file.suffix == ".npy":
        return {file.stem: _npy(file)}
    if file.suffix in _TORCH:
        content = opened(file, TorchFile).content
        if (size := sum(_sizes(content))) > LIMIT:
            raise InputError(
                f"{file}: its arrays take {size:,} bytes, and {LIMIT:,} are read at once: write "
                "one file per snapshot"
            )
        loaded = _loaded(content)
        if _is_array(loaded) or isinstance(loaded, list):
            return {file.stem: loaded} if _is_array(loaded) else loaded
        if isinstance(loaded, dict):
            return loaded
        raise InputError(f"{file} holds no arrays; save a dictionary with logits and labels")
    if file.suffix in (".csv", ".jsonl") and (size := regular(file).st_size) > LIMIT:
        raise InputError(
            f"{file} has {size:,} bytes, and {LIMIT:,} are read at once: write parquet, one file "
            "per snapshot"
        )
    if file.suffix == ".csv":
        frame = csv_table(file, "write it again")
        return {str(name): frame[name].to_numpy() for name in frame}
    if file.suffix == ".jsonl":
        rows = list(json_lines(file))
        names = list(rows[0]) if rows else []
        try:
            return {name: np.array([row[name] for row in rows]) for name in names}
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{file}: its lines don't have the same entries of one shape ({first_line(error)})"
            ) from None
    return read_arrays(file)


def _npy(file: Path) -> Any:
    regular(file)
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        remedy = (
            "it holds Python objects, as rows of different shapes make them: save one array of "
            "numbers, numpy.save(path, numpy.stack(rows))"
            if "object" in str(error).lower()
            else f"{first_line(error)}; save one array of numbers with numpy.save"
        )
        raise InputError(f"{file} can't be read as npy without pickles: {remedy}") from None


def _sizes(tree: Any, depth: int = 4) -> Iterator[int]:
    if isinstance(tree, LazyTensor):
        yield math.prod(tree.shape) * tree.dtype.itemsize
    elif depth and isinstance(tree, Mapping | list | tuple):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _sizes(part, depth - 1)


def _loaded(tree: Any, depth: int = 4) -> Any:
    """Nested containers with their tensors and arrays in memory; what is neither, nor numbers, is
    left out."""
    if isinstance(tree, LazyTensor):
        return tree.load()
    if isinstance(tree, PlainArray):
        return tree.array
    if isinstance(tree, bool | int | float):
        return np.asarray(tree)
    if not depth:
        return None
    if isinstance(tree, Mapping):
        parts = {str(key): _loaded(value, depth - 1) for key, value in tree.items()}
        return {key: value for key, value in parts.items() if value is not None}
    if isinstance(tree, list | tuple):
        if tree and all(isinstance(part, int | float) for part in tree):
            return np.asarray(tree)
        return [part for value in tree if (part := _loaded(value, depth - 1)) is not None]
    return None


def _sequence(parts: Sequence[Any], file: Path) -> dict[str, Any]:
    """The arrays of a list: (predictions, targets), or one entry per snapshot."""
    if parts and all(isinstance(part, Mapping) for part in parts):
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: _stacked([part[name] for part in parts], name, file) for name in names}
    if not parts or not all(_is_array(part) for part in parts):
        raise InputError(f"{file} holds no arrays; save a dictionary with logits and labels")
    shapes = [tuple(part.shape) for part in parts]
    if len(parts) == 2 and shapes[1] in (shapes[0][:-1], shapes[0][1:-1]):
        return {"arr_0": parts[0], TARGETS: parts[1]}
    return {file.stem: _stacked(parts, file.stem, file)}


def _one_level(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Entries that are dictionaries or lists themselves, put in their place: ``{"val": {"logits":
    …}}``, ``{"epoch_3": {"logits": …}, …}``, ``{"logits": [one per snapshot]}``."""
    inner = {name: part for name, part in content.items() if isinstance(part, Mapping)}
    flat = {name: part for name, part in content.items() if name not in inner}
    if len(inner) > 1 and all(_counted(name) for name in inner):
        numbers = numbers_in(list(inner))
        flat |= _sequence(list(inner.values()), file)
        flat.setdefault(numbers.unit or SNAPSHOT, np.array(numbers.numbers, dtype=np.int64))
    else:
        for part in inner.values():
            flat = {**part, **flat}
    return {
        name: _stacked(part, name, file) if isinstance(part, list) else part
        for name, part in flat.items()
        if not (isinstance(part, list) and not all(_is_array(entry) for entry in part))
    }


def _columns(arrays: Mapping[str, Any], table: bool) -> dict[str, Any]:
    """The arrays, with columns of a number per class, as ``logit_0, logit_1`` or ``prob_cat,
    prob_dog``, put together."""
    one = [name for name, array in arrays.items() if np.ndim(array) == 1]
    groups: dict[str, list[str]] = {}
    for name in one:
        found = role(name)
        is_count = re.sub(r"[\d_. -]+$", "", name).lower() in UNITS
        if is_count or not re.search(r"\d$", name):
            continue
        if found in OUTPUTS or (table and found == ""):
            groups.setdefault(found or "predictions", []).append(name)
    if table and not groups:
        groups = _by_class(one)
    joined = dict(arrays)
    for found, names in groups.items():
        if len(names) < 2 or len({np.shape(arrays[name]) for name in names}) > 1:
            continue
        numbers = {name: int(end[1]) for name in names if (end := re.search(r"(\d+)$", name))}
        if len(numbers) == len(names):
            names = sorted(names, key=numbers.__getitem__)
        values = [np.asarray(joined.pop(name)) for name in names]
        if all(value.dtype.kind in "fiu" for value in values):
            joined[found] = np.stack(values, axis=-1).astype(np.float64)
    return joined


def _by_class(names: Iterable[str]) -> dict[str, list[str]]:
    """Columns called after their class, by role: ``prob_cat``, ``prob_dog``; or numbered."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = re.split(r"[_. -]", name.lower())
        found = _ROLES.get(words[0])
        numbered = re.search(r"\d$", name) is not None and role(name) in OUTPUTS
        if numbered or (found in OUTPUTS and len(words) > 1 and role(name) is None):
            groups.setdefault(str(role(name) if numbered else found), []).append(name)
    return {found: members for found, members in groups.items() if len(members) > 1}


def _joined(arrays: Mapping[str, Any], file: Path) -> dict[str, tuple[Any, str]]:
    """The arrays and what the file calls them, those that are numbered, one per snapshot, stacked
    under one name."""
    families: dict[str, list[str]] = {}
    for name in arrays:
        if re.search(r"\d", name) and (_counted(name) or role(name)):
            family = "arr" if name.startswith("arr_") else role(name) or ""
            families.setdefault(family, []).append(name)
    result = {name: (array, name) for name, array in arrays.items()}
    for found, names in families.items():
        shapes = [tuple(np.shape(arrays[name])) for name in names]
        whole = {_is_whole(arrays[name]) for name in names}
        if len(names) < 2 or len(set(shapes)) > 1 or len(whole) > 1 or not shapes[0]:
            continue
        if len(shapes[0]) < 2 and found in OUTPUTS:
            continue  # columns, joined before
        numbers = numbers_in(names)
        order = sorted(range(len(names)), key=lambda i: numbers.numbers[i] or 0)
        stacked = _stacked([result.pop(names[i])[0] for i in order], names[0], file)
        said = f"{names[order[0]]}, {names[order[1]]}, …"
        result[found if found not in ("", "arr") else "predictions"] = (stacked, said)
        if found != "arr" and found not in (TARGETS, WEIGHTS, EXAMPLES):
            counted = np.array([numbers.numbers[i] or 0 for i in order])
            counter = numbers.unit or SNAPSHOT
            result.setdefault(counter, (counted, counter))
    return result


def _stacked(parts: Sequence[Any], name: str, file: Path) -> Any:
    shapes = {tuple(np.shape(part)) for part in parts}
    if len(shapes) > 1:
        one, two = sorted(shapes, key=str)[:2]
        raise InputError(
            f"{file}: the entries of {name!r} have shapes {one} and {two}: give the same examples "
            "each time"
        )
    if not parts:
        raise InputError(f"{file}: {name!r} is empty; write it again")
    if any(isinstance(part, Tensor) for part in parts):
        return torch.stack([as_tensor(part, name) for part in parts])
    return np.stack([np.asarray(part) for part in parts])


def _is_index(name: str) -> bool:
    """Whether a column is a table's row numbers, which pandas writes under names of its own."""
    return name.startswith(("__index_level_", "Unnamed: "))


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_whole(array: Any) -> bool:
    """Whether an array's type is that of whole numbers."""
    if isinstance(array, Tensor):
        return not array.dtype.is_floating_point and not array.dtype.is_complex
    return np.asarray(array).dtype.kind in "iub"
