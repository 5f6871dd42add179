"""The one exception users meet: a sentence naming the file or argument and the remedy."""


class InputError(ValueError):
    """Something the caller gave (a file, an argument, a run) can't be used; the message says what
    and what to do.

    The command line prints the message alone and exits with status 2; any other exception is our
    bug (status 1).
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for quoting in another; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
