"""Compiled models: hooks can't run inside compiled code, so the few passes that need them run
eagerly."""

from __future__ import annotations

import torch
from torch import nn


class Compiled:
    """Whether (a part of) a model is compiled, and the switch between compiled and eager execution
    of the next pass."""

    def __init__(self, model: nn.Module) -> None:
        self.present = any(
            hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()
        )
        self._forced = False

    def eager(self, wanted: bool) -> None:
        """Run the next passes of compiled code eagerly, or no longer. Process-wide, and only while
        it is needed."""
        if self.present and wanted != self._forced:
            torch.compiler.set_stance("force_eager" if wanted else "default")
            self._forced = wanted

    def __bool__(self) -> bool:
        return self.present
