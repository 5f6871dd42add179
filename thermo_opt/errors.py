"""The one exception users meet: a sentence naming the file or argument and the remedy; and
warnings that end nothing."""

import sys
import unicodedata
import warnings

_JOINERS = "\u200c\u200d"
"""Invisible characters that scripts and emoji need within a word."""


def printable(text: str, keep: str = "") -> str:
    """``text`` as a terminal or a page may show it: no control characters but those in ``keep``, no
    halves of surrogates.
    """
    return "".join(c if _is_shown(c) or c in keep else "\ufffd" for c in text)


def _is_shown(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


class InputError(ValueError):
    """Something the caller gave (a file, an argument, a run) can't be used; the message says what
    and what to do.

    The command line prints the message alone and exits with status 2; any other exception is our
    bug (status 1).
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, keep="\n\t"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for quoting in another; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def warn_only(message: str, stacklevel: int = 1) -> None:
    """Warn, also in a process that turns warnings into exceptions: there on the error stream, since
    what is recorded beside a training must not end it."""
    message = printable(message, keep="\n\t")
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except UserWarning:
        print(f"UserWarning: {message}", file=sys.stderr)
