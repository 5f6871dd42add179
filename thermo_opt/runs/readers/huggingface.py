"""Reader for what the Hugging Face `Trainer` leaves: ``checkpoint-*/`` with weights, optimizer
state and its log.

``training_args.bin`` is never opened; code shipped with a model is never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from thermo_opt.errors import InputError
from thermo_opt.runs.adapters import CONFIG
from thermo_opt.runs.border import read_json, regular, whole
from thermo_opt.runs.readers import contents, folders
from thermo_opt.runs.readers.architecture import architectures, in_memory, trainer_orders
from thermo_opt.runs.readers.common import Checkpoint, Found, Order, Shape, Weights, open_run
from thermo_opt.runs.readers.curves import table_of, with_numbers
from thermo_opt.runs.readers.optimizer_state import OptimizerState
from thermo_opt.runs.run import Likelihood, Run

_CATEGORICAL = (
    "ForCausalLM",
    "LMHeadModel",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForImageClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForConditionalGeneration",
    "ForAudioClassification",
    "ForSemanticSegmentation",
    "ForQuestionAnswering",
    "ForQuestionAnsweringSimple",
)
_BERNOULLI = ("ViltForQuestionAnswering", "TapasForQuestionAnswering")
"""Architectures whose answers are independent: several may be true."""
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks of PEFT's adapters whose outputs are logits of classes."""
_PROBLEMS: Mapping[str, Likelihood] = {
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
    "regression": "gaussian",
}


def recognise(path: Path) -> bool:
    """Whether a folder has ``checkpoint-<step>/`` folders with weights, or is one of them."""
    return any(
        folders.holds_weights(folder) for folder in _checkpoints(path).values()
    ) or _is_checkpoint(path)


def read(path: Path, key: str | None = None) -> Run:
    """Open the output folder of a Hugging Face `Trainer`."""
    there = _checkpoints(path)
    found = {step: folder for step, folder in there.items() if folders.holds_weights(folder)}
    if not found:
        hint = (
            "give the folder that holds it"
            if _is_checkpoint(path)
            else "give a Trainer's output folder"
        )
        raise InputError(f"{path} has no checkpoint-<step> folders with weights; {hint}")
    for step, folder in found.items():
        said = _step_in(folder / "trainer_state.json")
        if said not in (None, step):
            raise InputError(
                f"{folder} is named as step {step}, but its trainer_state.json says {said}; give "
                "it the name of its step back"
            )
    config_path = next(
        (file for folder in found.values() if (file := folder / "config.json").exists()), None
    )
    config = read_json(config_path) if config_path else {}
    names = architectures(config)
    state_path = found[max(found)] / "trainer_state.json"
    state = read_json(state_path) if state_path.exists() else {}
    notes = {
        key: state[key]
        for key in ("train_batch_size", "max_steps", "num_train_epochs")
        if whole(state.get(key)) is not None
    }
    adapter = None
    remarks = folders.without_weights([there[s] for s in sorted(there.keys() - found.keys())])
    if _is_adapter(found[min(found)]):
        remarks.append(
            "its checkpoints hold an adapter (LoRA or another of PEFT's) alone: the base model is "
            "not in them"
        )
        adapter = next(
            (file for folder in found.values() if (file := folder / CONFIG).exists()), None
        )
    first = folders.weights_of(found[min(found)], key)()
    return open_run(
        path,
        "huggingface",
        [Found(step, _checkpoint(folder, config_path, key)) for step, folder in found.items()],
        steps=_training_curve(state, state_path),
        remarks=remarks,
        key=key,
        likelihood=likelihood_of(config, names) if adapter is None else _of_task(adapter),
        hf_config_path=config_path,
        adapter_path=adapter,
        notes={**notes, **({"architecture": names[0]} if names else {})},
        tied=first.tied if isinstance(first, contents.StateDict) else {},
        step_unit="step",
        step_source="the number in each checkpoint's name",
    )


def _step_in(state: Path) -> int | None:
    """The step that a checkpoint's state says, by the beginning of its file: the log that follows
    there grows with every checkpoint."""
    if not state.exists():
        return None
    regular(state)
    with open(state, "rb") as file:
        head = file.read(_STATE_HEAD).partition(b'"log_history"')[0]
    found = re.search(rb'"global_step":\s*(\d{1,15})\b', head)
    return int(found[1]) if found else None


_STATE_HEAD = 1 << 14
"""Bytes that hold all of a trainer's state before its log, whose keys are sorted."""


def _checkpoint(folder: Path, config_path: Path | None, key: str | None) -> Checkpoint:
    """One ``checkpoint-<step>/``; weights under the names that the architecture has in memory."""
    config = folder / "config.json" if (folder / "config.json").exists() else config_path

    def weights() -> Weights:
        return (
            folders.weights_of(folder, key)() if config is None else in_memory(folder, config, key)
        )

    def orders(shapes: Mapping[str, Shape]) -> Sequence[Order]:
        known = None if config is None else trainer_orders(config)
        if known is not None:
            return known
        if _is_adapter(folder):
            return _adapter_orders(shapes, folders.optimizer_of(folder))
        return _unique_shapes(shapes, folders.optimizer_of(folder))

    return Checkpoint(folder, weights, partial(folders.optimizer_of, folder), orders)


def _of_task(adapter: Path) -> Likelihood | None:
    """The output distribution by the task in an adapter's config: of sequence classification only
    the base knows."""
    task = read_json(adapter).get("task_type")
    return "categorical" if isinstance(task, str) and task in _TASKS else None


def likelihood_of(config: Mapping[str, Any], names: Sequence[str]) -> Likelihood | None:
    """The output distribution by what the config says of the problem, else by the architecture's
    task.
    """
    problem = config.get("problem_type")
    if isinstance(problem, str):
        return _PROBLEMS.get(problem)
    if (
        any(name.endswith("ForSequenceClassification") for name in names)
        and config.get("num_labels") == 1
    ):
        return "gaussian"
    if (
        any(name.endswith("ForSequenceClassification") for name in names)
        and len(config.get("id2label") or "xx") == 1
    ):
        return "gaussian"
    if any(name in _BERNOULLI for name in names):
        return "bernoulli"
    return "categorical" if any(name.endswith(_CATEGORICAL) for name in names) else None


def _unique_shapes(shapes: Mapping[str, Shape], state: OptimizerState | str) -> Sequence[Order]:
    """Without the architecture only moments whose shape is unique can be named: safetensors are
    sorted by name.
    """
    if isinstance(state, str) or len(set(shapes.values())) < len(shapes):
        return []
    by_shape = {shape: name for name, shape in shapes.items()}
    found = [
        [state.entries[key].shape if key in state.entries else None for key in group.keys]
        for group in state.groups
    ]
    if any(shape not in by_shape for group in found for shape in group):
        return []
    return [[[by_shape[shape] for shape in group if shape is not None] for group in found]]


_WITHIN = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query",
    "key",
    "value",
    "query_key_value",
    "q",
    "k",
    "v",
    "c_attn",
    "in_proj",
    "o_proj",
    "out_proj",
    "o",
    "dense",
    "attn",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "fc1",
    "c_fc",
    "wi",
    "wi_0",
    "wi_1",
    "w1",
    "dense_h_to_4h",
    "w3",
    "down_proj",
    "fc2",
    "wo",
    "c_proj",
    "w2",
    "dense_4h_to_h",
]
"""Order in which transformers' layers define their projections."""


_HEAD = re.compile(
    r"base_model\.model\.(classifier|score|qa_outputs)(\.(dense|out_proj))?\.(weight|bias)"
)
"""Weights of the heads that PEFT trains beside an adapter, which models define last."""


def _adapter_orders(shapes: Mapping[str, Shape], state: OptimizerState | str) -> Sequence[Order]:
    """The order in which PEFT adds an adapter's parameters: layer by layer, projections as defined,
    A before B, a head trained beside them last; biases in the second of two groups.

    Safetensors files are sorted by name, and the base model isn't there to ask; where a name isn't
    known, no order is given.
    """
    if isinstance(state, str):
        return []
    ranks = {}
    heads = sorted(name for name in shapes if _HEAD.fullmatch(name))
    for name in shapes.keys() - set(heads):
        parts = name.split(".")
        lora = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
        if lora is None or lora == 0 or parts[lora - 1] not in _WITHIN:
            return []
        layers = tuple(int(part) for part in parts[:lora] if part.isdigit())
        block = any(
            part in ("mlp", "feed_forward", "ffn", "output", "intermediate")
            for part in parts[:lora]
        )
        ranks[name] = (layers, block, _WITHIN.index(parts[lora - 1]), parts[lora])
    order = [*sorted(ranks, key=lambda name: ranks[name]), *heads]
    if len(state.groups) != 2:
        return [[order if group.keys else [] for group in state.groups]]
    biases = [name for name in order if name.endswith(".bias")]
    return [[[name for name in order if name not in biases], biases]]


def _training_curve(state: dict[str, Any], file: Path) -> pd.DataFrame:
    """``log_history`` as a table, one row per step: the Trainer's names, but for lr, tokens (since
    the row before) and wall.
    """
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(
        isinstance(row, dict) and type(row.get("step")) is int and whole(row["step"]) is not None
        for row in history
    ):
        raise InputError(f"{file}: log_history isn't a list of steps; restore the file")
    rows: dict[int, dict[str, Any]] = {}
    for row in history:
        rows.setdefault(row["step"], {}).update(
            {
                key: value
                for key, value in row.items()
                if key != "step" and not isinstance(value, dict | list)
            }
        )
    frame = table_of(rows).rename(columns={"learning_rate": "lr", "train_runtime": "wall"})
    if "num_input_tokens_seen" in frame:
        frame["tokens"] = frame.pop("num_input_tokens_seen")
    frame = with_numbers(frame, file)
    if "tokens" in frame:  # cumulative in the log
        frame["tokens"] -= frame["tokens"].ffill().shift().fillna(0.0)
    return frame


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() or any(folder.glob("adapter_model.*"))


def _checkpoints(path: Path) -> dict[int, Path]:
    return {
        int(match[1]): folder
        for folder in sorted(path.glob("checkpoint-*"))
        if folder.is_dir() and (match := re.fullmatch(r"checkpoint-(\d{1,15})", folder.name))
    }


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(
        r"checkpoint-\d+", path.resolve().name
    ) is not None and folders.holds_weights(path)
