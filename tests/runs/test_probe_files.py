"""Probe files of each kind, and those that can't be used."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from thermo_opt.errors import InputError
from thermo_opt.runs import load_probe

INPUTS = np.arange(12, dtype=np.float32).reshape(4, 3)
TARGETS = np.array([0, 1, 1, 0])


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".parquet":
        pd.DataFrame(
            {name: list(array) if array.ndim > 1 else array for name, array in arrays.items()}
        ).to_parquet(path)
    else:
        save_file({name: torch.tensor(array) for name, array in arrays.items()}, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet"])
def test_every_kind_reads_the_same(tmp_path, suffix):
    path = tmp_path / f"probe{suffix}"
    write(path, {"inputs": INPUTS, "targets": TARGETS})
    probe = load_probe(path)
    assert torch.equal(probe.inputs, torch.tensor(INPUTS))
    assert torch.equal(probe.targets, torch.tensor(TARGETS))
    write(tmp_path / "reference.npz", {"inputs": INPUTS, "targets": TARGETS})
    assert probe.fingerprint == load_probe(tmp_path / "reference.npz").fingerprint
    write(path, {"inputs/mask": INPUTS, "inputs/ids": TARGETS, "targets": TARGETS})
    assert set(load_probe(path).inputs) == {"mask", "ids"}
    write(path, {"inputs/1": TARGETS, "inputs/0": INPUTS, "targets": TARGETS})
    first, second = load_probe(path).inputs
    assert first.shape == (4, 3)
    assert second.shape == (4,)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet"])
def test_damaged_files_are_named(tmp_path, suffix):
    path = tmp_path / f"probe{suffix}"
    write(path, {"inputs": INPUTS, "targets": TARGETS})
    content = path.read_bytes()
    for kept in (0, 3, len(content) // 2):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="probe"):
            load_probe(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": INPUTS[:0], "targets": TARGETS[:0]}, "no rows"),
        ({"inputs": INPUTS, "targets": TARGETS[:2]}, "differ in their number of rows"),
        ({"inputs": INPUTS, "targets": np.array(3)}, "number of rows"),
        ({"a": INPUTS, "b": TARGETS}, "neither 'inputs' nor 'targets'"),
        ({"inputs": np.array(["a", "b"]), "targets": TARGETS[:2]}, "numeric"),
    ],
)
def test_probes_that_cannot_be_used(tmp_path, arrays, message):
    write(tmp_path / "probe.npz", arrays)
    with pytest.raises(InputError, match=message):
        load_probe(tmp_path / "probe.npz")


def test_pickled_arrays_and_unknown_kinds_are_refused(tmp_path):
    np.savez(
        tmp_path / "probe.npz", inputs=np.array([{"a": 1}, None], dtype=object), targets=TARGETS[:2]
    )
    with pytest.raises(InputError, match="without pickles"):
        load_probe(tmp_path / "probe.npz")
    (tmp_path / "probe.csv").write_text("inputs,targets\n1,2\n")
    with pytest.raises(InputError, match="unknown kind"):
        load_probe(tmp_path / "probe.csv")
    with pytest.raises(InputError, match="no such probe file"):
        load_probe(tmp_path / "absent.npz")


def test_ragged_parquet_rows_are_refused(tmp_path):
    pd.DataFrame({"inputs": [[1.0, 2.0], [3.0]], "targets": [0, 1]}).to_parquet(
        tmp_path / "probe.parquet"
    )
    with pytest.raises(InputError, match="inputs"):
        load_probe(tmp_path / "probe.parquet")
