"""Small data for the studies, in both layouts."""

import io

import numpy as np
import pytest
from PIL import Image


def jpeg(number: int, size: int = 32) -> bytes:
    """A small image that depends on its number; classes (number mod 3) differ in colour."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[..., number % 3] += 100
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_parquet(path, count, column="image", first=0, classes=3, group=16):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = range(first, first + count)
    table = arrow.table(
        {
            column: [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in rows],
            "label": [i % classes for i in rows],
        }
    )
    parquet.write_table(table, path, row_group_size=group)


@pytest.fixture(name="write_parquet")
def _write_parquet():
    return write_parquet


@pytest.fixture(name="folders")
def _folders(tmp_path_factory):
    """48 + 18 images of three classes as train/<class>/*.jpg and val/<class>/*.JPEG; one is no
    square."""
    folder = tmp_path_factory.mktemp("folders")
    for split, suffix, rows in (("train", "jpg", range(48)), ("val", "JPEG", range(48, 66))):
        for i in rows:
            place = folder / split / f"n{i % 3}" / f"{i:03d}.{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(jpeg(i))
    Image.new("L", (50, 40), 200).save(folder / "train" / "n0" / "oblong.png")
    return folder


@pytest.fixture(name="parquet")
def _parquet(tmp_path_factory):
    """The same as train-0.parquet, train-1.parquet and valid.parquet."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder / "train-0.parquet", 24)
    write_parquet(folder / "train-1.parquet", 24, first=24)
    write_parquet(folder / "valid.parquet", 18, first=48)
    return folder
