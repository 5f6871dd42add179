"""Adapters of PEFT: the model that an adapter makes of a base which the user gives, and which
stored weight is which of its parameters.

Of a checkpoint's ``adapter_config.json`` only numbers and flags are used. Which modules are
adapted, and with which rank, is told by the stored weights themselves, so that no pattern of a run
is matched; nothing that it names is fetched or imported.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs.border import read_json

CONFIG = "adapter_config.json"
CAUSAL_TASK = "CAUSAL_LM"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?A(?:\.weight)?")
_USED = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "fan_in_fan_out",
        "bias",
        "modules_to_save",
        "init_lora_weights",
    ]
)
_IRRELEVANT = frozenset(
    [
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "lora_dropout",
        "inference_mode",
        "task_type",
        "peft_version",
        "revision",
        "auto_mapping",
        "base_model_name_or_path",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    ]
)
"""Settings that say nothing in evaluation mode, where modules and ranks are the weights'."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base's own weights as they are."""
_REMEDY = "give --model package.module:factory that returns the whole PEFT model"


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is PEFT's, which is not imported to find out."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def base_of(model: nn.Module) -> nn.Module:
    """The model inside PEFT's; any other as it is."""
    if not is_adapted(model):
        return model
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def base_name(config_path: Path) -> str | None:
    """What an adapter's config calls its base, a name to be shown and nothing else."""
    name = read_json(config_path).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def adapted(base: nn.Module, config_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """PEFT's model of a base and a LoRA adapter, with the adapter's weights still fresh.

    Args:
        base: the model that the adapter was trained on, with its weights; becomes part of the
            result. A PEFT model is given back as it is.
        config_path: the adapter's ``adapter_config.json``.
        shapes: of the adapter's stored weights.

    Returns:
        The model; only the adapter's parameters are trainable.

    Raises:
        InputError: PEFT isn't installed; another kind of adapter, or a setting of LoRA that isn't
            replayed; a base that lacks an adapted module.
    """
    try:
        import peft
    except ImportError:
        raise InputError(
            f"{config_path}: replaying an adapter needs PEFT; pip install 'thermo-opt[peft]'"
        ) from None
    if isinstance(base, peft.PeftModel):
        return base
    config = read_json(config_path)
    _refuse_unknown(config_path, config)
    ranks = {
        match["module"].removeprefix(_PREFIX): shape[0]
        for name, shape in shapes.items()
        if (match := _FACTOR.fullmatch(name)) and shape
    }
    if not ranks:
        raise InputError(f"{config_path.parent} holds no weights of LoRA's factors; {_REMEDY}")
    known = {name for name, _ in base.named_modules()}
    if absent := sorted(ranks.keys() - known):
        raise InputError(
            f"{config_path.parent}: the adapter changes {absent[0]!r}, which the given model "
            "lacks: give the base model that it was trained on"
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = _number(config_path, config, "lora_alpha", 8)
    alphas = _alphas(config_path, config, ranks, alpha)
    settings = {
        key: config[key]
        for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
        if isinstance(config.get(key), bool) and (config[key] or key != "lora_bias")
    }
    saved = config.get("modules_to_save")
    try:
        return peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                target_modules=list(ranks),
                rank_pattern={name: r for name, r in ranks.items() if r != rank},
                alpha_pattern=alphas,
                bias=config.get("bias", "none"),
                modules_to_save=[str(name) for name in saved] if isinstance(saved, list) else None,
                **settings,
            ),
            autocast_adapter_dtype=False,
        )
    except Exception as error:  # the library refuses settings in its own ways
        raise InputError(
            f"{config_path}: PEFT can't build it on the given model ({str(error)[:120]}); {_REMEDY}"
        ) from None


def _refuse_unknown(config_path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{config_path}: its adapter is {str(kind)[:40]!r}, not LORA; {_REMEDY}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, int) != isinstance(start, bool) or start not in _PLAIN_STARTS:
        raise InputError(
            f"{config_path}: init_lora_weights {str(start)[:40]!r} changes the base's own weights; "
            f"{_REMEDY}"
        )
    for key, value in config.items():
        if key not in _USED | _IRRELEVANT and value not in (None, False, {}, [], ()):
            raise InputError(f"{config_path}: its setting {key[:40]!r} isn't replayed; {_REMEDY}")


def _alphas(
    config_path: Path, config: Mapping[str, Any], modules: Iterable[str], default: float
) -> dict[str, float]:
    """α of the modules that have another than the default; names of modules, no patterns."""
    given = config.get("alpha_pattern") or {}
    if not isinstance(given, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in given):
        raise InputError(
            f"{config_path}: alpha_pattern must name modules, without patterns; {_REMEDY}"
        )
    found = {}
    for module in modules:
        key = next((k for k in given if module == k or module.endswith("." + k)), None)
        if key is not None:
            found[module] = _number(config_path, given, key, default)
    return found


def _number(config_path: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise InputError(f"{config_path}: {key[:40]} is {str(value)[:40]!r}; restore the file")
    return value


def own_names(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """(Names of the adapter's tensors as they are stored → in the model, those that are wanted).

    What PEFT would save of the model tells which is which; weights of the base that were saved
    beside them go by their own names.
    """
    from peft import get_peft_model_state_dict

    places = {
        (tensor.data_ptr(), tuple(tensor.shape)): name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.numel()
    }
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {
        name: own
        for name, tensor in saved.items()
        if (own := places.get((tensor.data_ptr(), tuple(tensor.shape)))) is not None
    }
    wanted = set(names)
    known = set(places.values())
    for name in stored:
        head, _, last = name.rpartition(".")
        for own in (name, f"{head}.base_layer.{last}"):
            if name not in names and own in known:
                names[name] = own
    return names, wanted
