"""Labelled images from ImageNet-style folders or Parquet files, decoded when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from thermo_opt.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png")
COLUMNS = ("image", "img")
"""Names that Parquet files give their column of images, each ``{bytes, path}``."""
_KEPT_BYTES = 1 << 30
"""Decoded images kept for the next pass; what is beyond is decoded every time."""


class Images:
    """Images of ``size`` × ``size`` pixels with class numbers ``labels`` (n,), and the names of the
    classes where known.

    ``names[i]``: where image i is, for messages; ``read(i)``: its file's content.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int],
        read: Callable[[int], bytes],
        size: int,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.names, self.read, self.size, self.classes = names, read, size, classes
        self.labels = torch.tensor(labels, dtype=torch.long)
        self._decoded: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, size, size), 0 … 1, and labels of these images; InputError names one that
        can't be decoded."""
        pixels = np.stack([self._image(i) for i in rows.tolist()])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255), self.labels[rows]

    def _image(self, index: int) -> np.ndarray:
        if index in self._decoded:
            return self._decoded[index]
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(index))) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{self.names[index]} is no readable image ({error}): restore it, or remove it "
                "from the data"
            ) from None
        if image.size != (self.size, self.size):
            scale = self.size / min(image.size)
            image = image.resize(
                [max(self.size, round(scale * side)) for side in image.size], Image.Resampling.BOX
            )
            left, top = ((side - self.size) // 2 for side in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image)
        if len(self._decoded) * pixels.nbytes < _KEPT_BYTES:
            self._decoded[index] = pixels
        return pixels


def open_images(
    folder: Path,
    splits: Sequence[str],
    size: int,
    source: str,
    classes: Sequence[str] | None = None,
) -> Images:
    """The first of these splits that a folder holds, as ``<split>/<class>/*.jpg`` or as
    ``<split>*.parquet`` (there or in ``data/``).

    ``source``: where the data can be had, for the message when nothing is there. ``classes``: class
    folders in the order of their numbers (default: sorted names). Parquet files give ``image`` (or
    ``img``) {bytes, path} and ``label``. Nothing is decoded yet.
    """
    for split in splits:
        if (folder / split).is_dir():
            return _from_folders(folder / split, size, classes)
        for place in (folder, folder / "data"):
            if files := sorted(place.glob(f"{split}*.parquet")):
                return _from_parquet(files, size)
    raise InputError(
        f"{folder} holds no images to {'train on' if 'train' in splits else 'test on'}: it needs "
        f"{splits[0]}/<class>/*.jpg (or .png) "
        f"or {splits[0]}*.parquet (columns image {{bytes, path}} and label); {source}; then pass "
        "--data FOLDER"
    )


def _from_folders(folder: Path, size: int, classes: Sequence[str] | None) -> Images:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise InputError(
            f"{folder / unknown[0]}: no images of this class to train on: remove it, or add it to "
            "train/"
        )
    numbers = {
        name: number for number, name in enumerate(classes if classes is not None else found)
    }
    files = [
        (path, numbers[name])
        for name in found
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise InputError(
            f"{folder} holds no images: it needs a folder for each class with "
            f"{', '.join(SUFFIXES)} files"
        )
    paths = [path for path, _ in files]
    return Images(
        [str(path) for path in paths],
        [n for _, n in files],
        lambda i: paths[i].read_bytes(),
        size,
        list(numbers),
    )


def _from_parquet(files: Sequence[Path], size: int) -> Images:
    """Labels are read now, the images of a row group when the first of them is asked for, and kept
    in their encoded form."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            "Parquet files need pyarrow: pip install pyarrow, or give folders of images"
        ) from None
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    tables = []
    for number, path in enumerate(files):
        try:
            table = parquet.ParquetFile(path)
            columns = table.schema_arrow.names
            if not set(COLUMNS) & set(columns) or "label" not in columns:
                raise InputError(
                    f"{path} has the columns {', '.join(columns)}: it needs image {{bytes, path}} "
                    "and label"
                )
            own = table.read(["label"]).column("label").to_pylist()
        except (OSError, arrow.ArrowInvalid) as error:
            raise InputError(f"{path} can't be read as Parquet ({error}): get it again") from None
        if not all(isinstance(label, int) and label >= 0 for label in own):
            raise InputError(f"{path}: column label must hold class numbers from 0 on")
        labels += own
        tables.append(table)
        places += [
            (number, group, row)
            for group in range(table.num_row_groups)
            for row in range(table.metadata.row_group(group).num_rows)
        ]
    groups: dict[tuple[int, int], list[dict[str, bytes]]] = {}

    def read(index: int) -> bytes:
        number, group, row = places[index]
        if (number, group) not in groups:
            name = next(n for n in COLUMNS if n in tables[number].schema_arrow.names)
            groups[number, group] = (
                tables[number].read_row_group(group, [name]).column(name).to_pylist()
            )
        return groups[number, group][row]["bytes"]

    return Images([f"{files[n]}, row group {g}, row {r}" for n, g, r in places], labels, read, size)


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """The usual augmentation: each image (n, 3, h, w) shifted by up to ``padding`` pixels and
    mirrored with probability ½."""
    n, _, h, w = x.shape
    padded = functional.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    across = (
        torch.where(mirrored[:, None], torch.arange(w - 1, -1, -1), torch.arange(w)) + left[:, None]
    )
    down = torch.arange(h) + top[:, None]
    images = torch.arange(n)[:, None, None, None]
    return padded[
        images,
        torch.arange(3)[None, :, None, None],
        down[:, None, :, None],
        across[:, None, None, :],
    ]
