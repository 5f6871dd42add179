"""A probe from the user's own evaluation data, recognised by what the model's loss does with it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thermo_opt.errors import InputError
from thermo_opt.likelihoods import IGNORED
from thermo_opt.models import outputs_of, untouched

SAME_LOSS = 1e-2
"""Relative difference within which a loss that we compute is the one that the model reports: half
precision gets that far, another likelihood does not."""


class Evaluation(NamedTuple):
    """A probe and the output distribution whose negative log-likelihood is the model's loss."""

    inputs: Any
    targets: Tensor
    likelihood: str


def first_batch(loader: Any, examples: int, model: nn.Module) -> Any:
    """The first ``examples`` examples behind a data loader, collated to one batch.

    Reads the data set, not the loader, and restores the random states: the loader's own order and
    the training stay bit for bit what they would be. Raises `InputError` when there are none.
    """
    data, collate = loader.dataset, loader.collate_fn
    with untouched(model):
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            rows = [data[i] for i in range(min(examples, len(data)))]
        else:
            rows = list(itertools.islice(iter(data), examples))
        if not rows:
            raise InputError(
                "the evaluation data has no examples; give the callback probe=(inputs, targets)"
            )
        return collate(rows)


def labelled(model: nn.Module, batch: Mapping[str, Any]) -> Evaluation:
    """The probe in a batch of a Hugging Face model: its inputs, and the labels where the model's
    own loss puts them.

    A causal language model predicts the next position, others the same one: whichever mean
    negative log-likelihood equals the loss that the model returns is taken. Raises `InputError`
    when none does.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    labels = tensors.get("labels")
    if labels is None:
        raise InputError(
            f"the evaluation batch ({', '.join(batch) or 'empty'}) has no 'labels'; give the "
            "callback probe=(inputs, targets)"
        )
    device = next(model.parameters()).device
    with untouched(model):
        result = model(**{key: value.to(device) for key, value in tensors.items()})
    outputs = outputs_of(result).float().cpu()
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"{type(model).__name__} returns no loss for an evaluation batch, so that its targets "
            "can't be told; give the callback probe=(inputs, targets)"
        )
    for targets, likelihood in _readings(outputs, labels.cpu()):
        if abs(_loss(outputs, targets, likelihood) - float(loss)) <= SAME_LOSS * abs(float(loss)):
            seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            if not seq2seq:  # an encoder-decoder makes its decoder's inputs from the labels
                del tensors["labels"]
            return Evaluation(tensors, targets, likelihood)
    raise InputError(
        f"the loss of {type(model).__name__} ({float(loss):.4g}) is no mean negative "
        "log-likelihood of its logits and labels; give the callback probe=(inputs, targets) and "
        "likelihood="
    )


def _readings(outputs: Tensor, labels: Tensor) -> list[tuple[Tensor, str]]:
    """Targets and likelihoods that fit the shapes of outputs and labels."""
    found: list[tuple[Tensor, str]] = []
    if not labels.is_floating_point() and labels.shape == outputs.shape[:-1]:
        found.append((labels, "categorical"))
        if labels.dim() > 1:
            following = torch.full_like(labels, IGNORED)
            following[:, :-1] = labels[:, 1:]
            found.append((following, "categorical"))
    if labels.is_floating_point() and labels.numel() == outputs.numel():
        same = labels.reshape(outputs.shape)
        found.append((same, "gaussian"))
        if bool(((same >= 0) & (same <= 1)).all()):
            found.append((same, "bernoulli"))
    return found


def _loss(outputs: Tensor, targets: Tensor, likelihood: str) -> float:
    if likelihood == "categorical":
        return float(F.cross_entropy(outputs.flatten(0, -2), targets.flatten()))
    if likelihood == "gaussian":
        return float(F.mse_loss(outputs, targets))
    return float(F.binary_cross_entropy_with_logits(outputs, targets))


def refuse_sharded(model: nn.Module) -> None:
    """Refuse parameters that are spread over processes: one of them alone can't predict."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise InputError(
            "the model's parameters are sharded over processes, and the record is written by one "
            "of them; train with DistributedDataParallel to record, or record checkpoints"
        )
