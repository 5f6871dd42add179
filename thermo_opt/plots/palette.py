"""Colours, dashes and markers shared by the Matplotlib figures and the HTML page.

The palette is that of Okabe and Ito (2008), distinguishable with every common form of colour
blindness; runs also differ by dash and marker, so no figure relies on colour alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
}

PARTS = {"irreducible": 1.0, "detour": 0.45, "pacing": 0.15}
"""Opacity of each part of a run's dissipation, in the run's own colour."""


LineStyle = Literal["-", "--", ":", "-."]


@dataclass(frozen=True)
class Look:
    """How one run is drawn: a key of `OKABE_ITO`, a dash and a marker in the words of both drawing
    libraries."""

    colour: str
    dash: str
    linestyle: LineStyle
    symbol: str
    marker: str

    @property
    def hex(self) -> str:
        """The colour itself."""
        return OKABE_ITO.get(self.colour, _GREY)

    @property
    def recedes(self) -> bool:
        """Whether this run is one of too many to tell apart, and drawn behind the others."""
        return self.colour == BEHIND.colour


_DASHES: tuple[tuple[str, LineStyle], ...] = (
    ("solid", "-"),
    ("dash", "--"),
    ("dot", ":"),
    ("dashdot", "-."),
)
_MARKERS = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("cross", "P"),
    ("star", "*"),
)


_GREY = "#8b9097"
BEHIND = Look("muted", "solid", "-", "circle", "o")
"""How runs look that are too many to tell apart: grey, in the page by the name of its own grey."""


def look(index: int) -> Look:
    """Look of the run at this position; the first six differ in colour, later ones in dash."""
    colours = list(OKABE_ITO)
    dash, linestyle = _DASHES[(index // len(colours)) % len(_DASHES)]
    symbol, marker = _MARKERS[index % len(_MARKERS)]
    return Look(colours[index % len(colours)], dash, linestyle, symbol, marker)
