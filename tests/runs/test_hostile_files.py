"""Files that were damaged, or made to do harm: refused with a sentence, never run, never waited
for.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import thermo_opt as to
from thermo_opt.errors import InputError, printable
from thermo_opt.runs import load_probe, load_run
from thermo_opt.runs.border import read_json
from thermo_opt.runs.readers.optimizer_state import checked_state
from thermo_opt.runs.steps_file import read_steps
from thermo_opt.runs.torch_file import LazyTensor, Opaque, TorchFile


@pytest.mark.parametrize("legacy", [False, True])
def test_every_dtype_and_view_reads_as_torch_wrote_it(tmp_path, legacy):
    grid = torch.randn(6, 5)
    content = {
        "transposed": grid.t(),
        "repeated": grid[:1].expand(60, 5),
        "slice": grid[1:, 2:],
        "parameter": nn.Parameter(grid),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "half": grid.half(),
        "brain": grid.bfloat16(),
        "tiny": grid.to(torch.float8_e4m3fn),
        "whole": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j]),
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = TorchFile(tmp_path / "x.pt").content
    for name, tensor in content.items():
        loaded = found[name].load()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(
            loaded.double() if name == "tiny" else loaded,
            tensor.double() if name == "tiny" else tensor,
        )


def test_objects_of_a_pickle_do_nothing(tmp_path):
    mark = tmp_path / "ran"

    class Poison:
        def __reduce__(self):
            return (os.system, (f"touch {mark}",))

    class Shaped(torch.Tensor):
        pass

    torch.save({"a": Poison(), "b": torch.ones(2)}, tmp_path / "x.pt")
    content = TorchFile(tmp_path / "x.pt").content
    assert isinstance(content["a"], Opaque)
    assert isinstance(content["b"], LazyTensor)
    assert not mark.exists()


def reduce_with(name, *arguments):
    """A pickle that calls the global ``name`` with arguments (as pickled text)."""
    body = b"".join(pickle.dumps(a, protocol=2)[2:-1] for a in arguments)
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n(" + body + b"tR."


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # an object numbered two thousand million
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a bytearray of a terabyte
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00.",  # a frame without end
        b"\x80\x02}(" + b"K\x01K\x01\x86q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"0K\x01K\x01u.",
        reduce_with("torch._utils _rebuild_tensor_v2", 1, 0, (2,), (1,), False, None),
        reduce_with("builtins eval", "1+1"),
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    ],
)
def test_pickles_made_to_exhaust_are_read_or_refused_at_once(tmp_path, data):
    (tmp_path / "1.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"1\.pt"):
        load_run(tmp_path)


def test_a_flipped_bit_in_a_file_of_torch_save_is_noticed(tmp_path):
    torch.save({"w": torch.randn(4000)}, tmp_path / "1.pt")
    data = bytearray((tmp_path / "1.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "1.pt").write_bytes(data)
    with pytest.raises(InputError, match="CRC-32"):
        load_run(tmp_path).snapshots[0].load("params/w")


def test_files_written_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "1.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_run(tmp_path).snapshots[0].load("params/w").sum() == 3


@pytest.mark.parametrize(
    "change",
    [
        {"param_groups": "x"},
        {"param_groups": [{"params": [[None]]}]},
        {"param_groups": [{"params": [0], "betas": "ab"}]},
        {"param_groups": [{"params": [0], "betas": [2, 3]}]},
        {"param_groups": [{"params": [0, 0]}]},
        {"state": "x"},
        {"state": {0: "x"}},
        {"state": {0: {"step": [[]]}}},
        {"state": {0: {"step": float("inf")}}},
        {"state": {0: {"step": torch.zeros(3)}}},
        {"state": {0: {"step": -1}}},
        {"state": {0: {"step": 1, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(3)}}},
        {"state": {0: {"step": 1, "exp_avg": torch.ones(2) > 0, "exp_avg_sq": torch.ones(2) > 0}}},
    ],
)
def test_optimizer_states_of_other_types_are_refused(change):
    state = {"state": {}, "param_groups": [{"params": [0]}]} | change
    with pytest.raises(InputError, match="here"):
        checked_state(state, "here")


@pytest.mark.parametrize("target", ["fifo", "/dev/zero", "folder"])
def test_only_regular_files_are_opened(tmp_path, target):
    def put(path):
        if target == "fifo":
            os.mkfifo(path)
        elif target == "folder":
            path.mkdir()
        else:
            path.symlink_to(target)

    put(tmp_path / "1.json")
    with pytest.raises(InputError, match="not a file"):
        read_json(tmp_path / "1.json")
    if target != "folder":
        for name in ("1.pt", "2.safetensors", "probe.npz"):
            put(tmp_path / name)
        for read in (
            lambda: load_run(tmp_path, format="torch"),
            lambda: load_run(tmp_path, format="safetensors"),
            lambda: load_probe(tmp_path / "probe.npz"),
        ):
            with pytest.raises(InputError, match="not a file"):
                read()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": 1' + "0" * 5000 + "}", "[1]", "{"])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "loss": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 9223372036854775808}',
        '{"step": true}',
        "[3]",
        '{"step": 2}, {"step": 3}',
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "steps.jsonl").write_text(f'{{"step": 1}}\n{{"step": 2}}\n{line}\n{{"step": 9}}\n')
    with pytest.raises(InputError, match=r"steps\.jsonl, line 3"):
        read_steps(tmp_path / "steps.jsonl")


def test_rows_over_several_blocks_are_one_table(tmp_path):
    count = 60_000
    rows = [{"step": k, "loss": 1 / k, "note": "x" * 60, "lr": None} for k in range(1, count + 1)]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 60001, "l')
    steps = read_steps(tmp_path / "steps.jsonl")
    assert len(steps) == count
    assert steps["loss"].iloc[-1] == 1 / count
    assert steps["lr"].isna().all()


def test_arrays_that_unpack_to_more_than_a_probe_may_have(tmp_path):
    path = tmp_path / "probe.npz"
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 4), np.float32))
    header["shape"] = (2**28, 4)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(1 << 20))
    with pytest.raises(InputError, match=r"probe\.npz"):
        load_probe(path)


def test_weights_of_a_type_that_torch_lacks(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "1.safetensors")
    data = (tmp_path / "1.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["w"] |= {"dtype": "F4", "shape": [32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "1.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + length :]
    )
    with pytest.raises(InputError, match=r"1\.safetensors"):
        load_run(tmp_path).snapshots[0].load_group("params")


def test_what_reaches_the_terminal_is_text():
    assert printable("a\x1b]0;x\x07\x9b2J\nü\u202fß") == "a\ufffd]0;x\ufffd\ufffd2J\ufffdü\u202fß"
    assert "\x1b" not in str(InputError("run \x1b[2J"))


def recorded(folder, **changed):
    """A run of predictions in our own layout whose record has other entries."""
    snapshots = folder / "snapshots"
    snapshots.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, **changed}))
    (folder / "steps.jsonl").write_text("")
    for step in range(3):
        outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        save_file({"probe/logits": outputs}, snapshots / f"{step:08d}.safetensors")
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {"schema_version": True},
        {"likelihood": "gaussian", "sigma2": 10**400},
        {"batch_size": 10**400},
    ],
)
def test_records_of_numbers_that_are_none(tmp_path, changed):
    with pytest.raises(InputError, match="|".join(changed).replace("_", ".")):
        load_run(recorded(tmp_path / "run", **changed))


@pytest.mark.parametrize(
    "settings",
    [
        {"betas": "x"},
        {"betas": [0.9]},
        {"betas": [10**400, None]},
        {"momentum": [1]},
        {"momentum": 10**400, "lr": {"a": 1}},
    ],
)
def test_settings_of_any_type_end_no_audit(tmp_path, settings):
    run = recorded(tmp_path / "run", settings=settings, optimizer="Adam")
    assert to.audit(run).summary["dissipation"] > 0


def test_a_record_that_is_a_link_to_nowhere_is_not_passed_over(tmp_path):
    run = recorded(tmp_path / "run")
    (run / "run.json").unlink()
    (run / "run.json").symlink_to("run.json")
    with pytest.raises(InputError, match=r"run\.json can't be read"):
        load_run(run)


def test_archives_with_two_records_of_a_name_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model-0.pt")
    np.savez(tmp_path / "probe.npz", inputs=np.zeros((3, 2)), targets=np.zeros(3))
    for name, record in (("model-0.pt", "model-0/data.pkl"), ("probe.npz", "inputs.npy")):
        with zipfile.ZipFile(tmp_path / name) as archive:
            data = archive.read(record)
        with zipfile.ZipFile(tmp_path / name, "a") as archive, pytest.warns(match="Duplicate"):
            archive.writestr(record, data)
    shutil.copy(tmp_path / "model-0.pt", tmp_path / "model-1.pt")
    with pytest.raises(InputError, match="more than one record of a name"):
        load_run(tmp_path, format="torch").snapshots[0].names()
    with pytest.raises(InputError, match="two arrays called 'inputs'"):
        load_probe(tmp_path / "probe.npz")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_numbers_that_are_not_real_are_no_predictions_and_no_weights(tmp_path, dtype):
    run = recorded(tmp_path / "run")
    for file in (run / "snapshots").iterdir():
        save_file({"probe/logits": torch.ones(6, 3, dtype=dtype)}, file)
    with pytest.raises(InputError, match="the outputs are"):
        to.audit(run)
    if dtype.is_complex:
        model = torch.nn.Linear(4, 3)
        for step in range(2):
            state = {"weight": model.weight.detach().to(dtype), "bias": model.bias.detach()}
            torch.save(state, tmp_path / f"model-{step}.pt")
        probe = (torch.randn(6, 4), torch.arange(6) % 3)
        run = load_run(tmp_path, format="torch")
        with pytest.raises(InputError, match="holds complex numbers"):
            to.audit(run, model=model, probe=probe, lens="outputs")
