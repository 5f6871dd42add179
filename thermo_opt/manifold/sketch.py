"""Sketched predictions: √p of a large vocabulary as a few random sums, and log p(y) exactly (theory
§13).

Squared chords between sketches are unbiased, with a relative error of √(2/k)/√n over n predictions
for k sums where these move in directions of their own. All predictions share the sums, so where all
move in one direction the error is √(2/k), however many they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def signs(classes: int, width: int, seed: int) -> Array:
    """S, (classes, width): independent signs over √width, the same on every machine for one seed.

    Drawn from the raw stream of Philox, which NumPy promises not to change.
    """
    words = -(-classes * width // 64)
    bits = np.unpackbits(np.random.Philox(key=seed).random_raw(words).astype("<u8").view(np.uint8))[
        : classes * width
    ]
    return (2.0 * bits.reshape(classes, width) - 1.0) / np.sqrt(width)


def relative_error(width: int, predictions: int) -> float:
    """Standard error of a mean squared chord over its value, ``√(2/k)/√n`` for n predictions that
    move in directions of their own (§13)."""
    return float(np.sqrt(2.0 / width / predictions))
