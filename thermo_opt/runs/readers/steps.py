"""Which step a checkpoint is of: from a count in the file, else from the number in its name, with
what it counts.

A score is never a step: decimals (``loss0.6123``), numbers after the name of a measure (``acc95``),
versions (``-v1``) and numbers that all names share (``resnet50``) are passed over.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thermo_opt.errors import InputError
from thermo_opt.runs.border import whole
from thermo_opt.runs.readers.optimizer_state import claims_optimizer_state
from thermo_opt.runs.torch_file import LazyTensor, Opaque

COUNTS = (
    "global_step",
    "iter_num",
    "num_updates",
    "global_steps",
    "iteration",
    "iter",
    "step",
    "it",
    "steps",
    "batch_idx",
)
"""Entries of a checkpoint that count optimizer steps, the surest first."""

_STEP_WORDS = (
    "steps",
    "step",
    "iterations",
    "iteration",
    "iters",
    "iter",
    "it",
    "updates",
    "update",
    "ba",  # Composer's ep1-ba200-rank0
)
_EPOCH_WORDS = ("epochs", "epoch", "ep", "e")
UNITS = {**dict.fromkeys(_STEP_WORDS, "step"), **dict.fromkeys(_EPOCH_WORDS, "epoch")}
"""What the number after a word counts."""
_NO_STEPS = frozenset(
    [
        "loss",
        "losses",
        "acc",
        "accuracy",
        "top",
        "top1",
        "top5",
        "f1",
        "auc",
        "val",
        "valid",
        "score",
        "metric",
        "bleu",
        "rouge",
        "ppl",
        "perplexity",
        "psnr",
        "ssim",
        "iou",
        "miou",
        "map",
        "err",
        "error",
        "mse",
        "mae",
        "rmse",
        "wer",
        "cer",
        "reward",
        "return",
        "lr",
        "seed",
        "rank",
        "fold",
        "bs",
        "batch",
        "batchsize",
        "version",
        "v",
        "of",
        "mp",
        "tp",
        "pp",
        "shard",
        "part",
        "run",
        "layers",
        "layer",
        "dim",
        "hidden",
        "width",
        "depth",
        "trial",
        "wd",
        "temp",
        "size",
        "gpu",
        "gpus",
    ]
)
"""Words before a number that isn't a step."""
_DECIMAL = re.compile(r"\d+[.,]\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+", re.IGNORECASE)
_TOKEN = re.compile(r"([A-Za-z]*)([^A-Za-z0-9]*)(\d+)")


@dataclass(frozen=True)
class Numbered:
    """Numbers read from the names of a run's checkpoints: one per name (None: no number), and the
    unit they count.
    """

    numbers: list[int | None]
    unit: str | None


def numbers_in(stems: Sequence[str]) -> Numbered:
    """The number of each name (without suffix): after step or iter, else after epoch, else the only
    one that varies.

    Raises `InputError` when several numbers vary and none follows such a word.
    """
    found = [_candidates(stem) for stem in stems]
    for unit in ("step", "epoch"):
        numbers = [
            next((number for word, number in tokens if UNITS.get(word) == unit), None)
            for tokens in found
        ]
        if any(number is not None for number in numbers):
            return Numbered(numbers, unit)
    plain = [[(word, number) for word, number in tokens if word not in UNITS] for tokens in found]
    usual = Counter(len(tokens) for tokens in plain if tokens).most_common(1)
    if not usual:
        return Numbered([None] * len(stems), None)
    width = usual[0][0]
    fitting = [tokens for tokens in plain if len(tokens) == width]
    varying = [place for place in range(width) if len({tokens[place][1] for tokens in fitting}) > 1]
    if len(varying) > 1:
        example = next(
            stem for stem, tokens in zip(stems, plain, strict=True) if len(tokens) == width
        )
        one, two = (_candidates(example)[place][1] for place in varying[:2])
        raise InputError(
            f"{example}: which of the numbers {one} and {two} is the step? Rename the checkpoints "
            f"like step-{one}"
        )
    place = varying[0] if varying else width - 1
    return Numbered([tokens[place][1] if len(tokens) == width else None for tokens in plain], None)


def _candidates(stem: str) -> list[tuple[str, int]]:
    """The whole numbers of a name that may be its step, each with the word before it."""
    stem = re.sub(r"[-_]v\d+$", "", stem)  # Lightning's mark of a second file of one name
    text = _DECIMAL.sub(" ", stem)
    found = []
    for word, _, digits in _TOKEN.findall(text):
        word = word.lower()
        if word not in _NO_STEPS and len(digits) <= 15:
            found.append((word, int(digits)))
    return found


def count_in(content: Any) -> tuple[int, str] | None:
    """The step count that a checkpoint's content names, and the name of the entry."""
    if not isinstance(content, Mapping):
        return None
    for key in COUNTS:
        value = content.get(key)
        if (
            isinstance(value, LazyTensor)
            and value.shape in ((), (1,))
            and not value.dtype.is_complex
        ):
            value = value.load().item()
        if (count := whole(value)) is not None:
            return count, key
    for value in content.values():  # Ignite, Composer and others keep it one level below
        if (
            isinstance(value, Mapping)
            and not claims_optimizer_state(value)
            and not isinstance(value, Opaque)
        ):
            for key in COUNTS[:4]:
                if (count := whole(value.get(key))) is not None:
                    return count, key
    return None


def increasing(counts: Sequence[int | None], order: Sequence[int | None]) -> bool:
    """Whether counts are all known, all different, and grow with the numbers in the names (where
    there are any).
    """
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or len(set(known)) < len(known):
        return False
    pairs = sorted(
        (number, count) for number, count in zip(order, known, strict=True) if number is not None
    )
    return all(a[1] < b[1] for a, b in itertools.pairwise(pairs) if a[0] != b[0])
