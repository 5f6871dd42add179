"""The optimizer-state lens: Adam's moments as a diagonal metric, so that weights and state alone suffice (§9)."""

from __future__ import annotations

import numpy as np

from thermo_opt.audit.summary import Seen
from thermo_opt.audit.view import Unsupported, View


def look_at_optimizer_state(view: View) -> Seen:
    """Placeholder until the metric lands."""
    raise Unsupported("not built yet")
