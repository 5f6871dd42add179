"""Names that changed: the old one works for one release and warns, naming the new one.

A name that was public stays usable, with a `DeprecationWarning`, until the release after the one
that changed it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that ``old`` is now ``new``; ``stacklevel`` counts from the caller, as in
    `warnings.warn`."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


class RenamedKeys(dict[str, Any]):
    """A dict whose keys were renamed: old keys still read, with a warning, but aren't listed.

    Subclasses say which in ``renamed``, old key → new key.
    """

    renamed: Mapping[str, str] = {}

    def __missing__(self, key: str) -> Any:
        if key not in self.renamed:
            raise KeyError(key)
        warn_renamed(f"the key {key!r}", repr(self.renamed[key]))
        return self[self.renamed[key]]

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, for old keys too."""
        return self[key] if key in self or key in self.renamed else default
