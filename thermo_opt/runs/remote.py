"""Runs in object stores and other places that fsspec reaches (``s3://``, ``gs://``, …): copied to a
folder of this machine, where only files that changed are fetched again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from thermo_opt.errors import InputError, first_line
from thermo_opt.runs.border import inside, read_json

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}([^/].*)")
"""``s3://bucket/run``, or what pathlib makes of it, ``s3:/bucket/run``."""
_INDEX = "fetched.json"
_TOGETHER = 256
"""Files asked for at once."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of a kind that fsspec knows, and no folder of this machine."""
    found = _URL.fullmatch(os.fspath(path))
    if found is None or Path(path).exists():
        return False
    import fsspec

    return found[1] in fsspec.available_protocols()


def absolute(path: Path) -> Path:
    """The path as processes that stand in other folders find it; URLs as they are."""
    return path if is_remote(path) else path.absolute()


def local_copy(path: str | os.PathLike[str]) -> Path:
    """The folder of this machine that holds a copy of a remote run's folder, or the copy of a
    remote file.

    Copies lie in ``$THERMO_OPT_CACHE``, by default ``thermo-opt`` in the user's folder of caches.
    A file is fetched when it isn't there, or isn't what the store describes any more. Cost: one
    listing of the run, and its bytes the first time.

    Raises:
        InputError: nothing is there, it can't be read, or the package that reaches it is missing.
    """
    found = _URL.fullmatch(os.fspath(path))
    assert found is not None, path
    url = f"{found[1]}://{found[2].rstrip('/')}"
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        listed = store.find(root, detail=True)
    except ImportError as error:
        raise InputError(
            f"{url}: reading it needs another package ({first_line(error)}): install it"
        ) from None
    except Exception as error:  # of the store: credentials, addresses, networks
        raise InputError(
            f"{url} can't be read ({first_line(error)}): give the store's credentials as its own "
            "tools take them"
        ) from None
    if not listed:
        raise InputError(f"{url}: nothing is there; give the folder of a recorded run")
    place = _cache() / hashlib.sha256(url.encode()).hexdigest()[:24] / url.rsplit("/", 1)[-1]
    alone = list(listed) == [root]
    wanted: dict[str, tuple[str, str]] = {}
    for name, entry in listed.items():
        relative = Path(root).name if alone else name.removeprefix(root).lstrip("/")
        if inside(place, relative) is None:
            raise InputError(f"{url} holds {name[:80]!r}, which points outside it; rename it there")
        wanted[relative] = (name, _fingerprint(entry))
    folder = place.parent if alone else place
    try:
        _fetch(store, url, folder, wanted, place.parent / _INDEX)
    except OSError as error:
        raise InputError(
            f"{url} can't be copied to {folder} ({first_line(error)}): make room there, or set "
            "THERMO_OPT_CACHE to another folder"
        ) from None
    return place


def _cache() -> Path:
    given = os.environ.get("THERMO_OPT_CACHE")
    if given:
        return Path(given).absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "thermo-opt"


def _fingerprint(entry: Any) -> str:
    """What the store says of a file, as a fingerprint."""
    return hashlib.sha256(repr(sorted(entry.items())).encode()).hexdigest()[:32]


def _fetch(
    store: Any, url: str, folder: Path, wanted: dict[str, tuple[str, str]], index: Path
) -> None:
    """Copy those of the wanted files (by their relative names: name in the store, fingerprint) that
    aren't there as they are now; others that were copied before and are gone go."""
    folder.mkdir(parents=True, exist_ok=True)
    had = read_json(index) if index.exists() else {}
    gone = had.keys() - wanted.keys()
    for name in gone:
        if (old := inside(folder, name)) is not None:
            old.unlink(missing_ok=True)
    had = {name: seen for name, seen in had.items() if name not in gone}
    if gone:
        _write(index, had)
    missing = [
        name
        for name, (_, seen) in wanted.items()
        if had.get(name) != seen or not (folder / name).is_file()
    ]
    for start in range(0, len(missing), _TOGETHER):
        names = missing[start : start + _TOGETHER]
        with tempfile.TemporaryDirectory(dir=index.parent, prefix=".fetching-") as scratch:
            parts = [str(Path(scratch) / str(k)) for k in range(len(names))]
            try:
                store.get([wanted[name][0] for name in names], parts)
            except Exception as error:  # as when listing
                raise InputError(
                    f"{url} can't be read ({first_line(error)}); try again, what was copied stays"
                ) from None
            for name, part in zip(names, parts, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, folder / name)
        had |= {name: wanted[name][1] for name in names}
        _write(index, had)


def _write(index: Path, content: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=index.parent, delete=False) as file:
        json.dump(content, file)
    os.replace(file.name, index)
