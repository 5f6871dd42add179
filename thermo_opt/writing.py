"""Files that users name, written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from thermo_opt import arguments
from thermo_opt.errors import InputError


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file by rename, so that a reader, or the next try, sees the file of before or the new
    one; returns its path.

    A link is followed. A device or a pipe, such as ``/dev/stdout``, is written into: renaming would
    put a file in its place.

    Raises:
        InputError: the file can't be written.
    """
    target = arguments.path("path", path)
    data = content.encode() if isinstance(content, str) else content
    try:
        if target.is_dir():
            raise InputError(f"{target} is a directory: name the file to write.")
        if _is_stream(target):
            with open(target, "wb") as stream:
                stream.write(data)
        else:
            _replace(Path(os.path.realpath(target)), data)
    except OSError as error:
        raise InputError(
            f"{target} can't be written ({error.strerror}): choose a folder you can write to."
        ) from None
    return target


def _is_stream(target: Path) -> bool:
    if target.is_absolute() and target.parts[1:2] in (("dev",), ("proc",)):
        return True  # ``/dev/stdout`` is a link to whatever the output goes into
    try:
        return not stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return False


def _replace(target: Path, data: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o666 & ~_umask())
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
