"""Our layout on disk: clocks, damage, and every way in which a run's files can be wrong."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs import Recorder, install, load_run, predict
from thermo_opt.runs.format import write_tensors
from thermo_opt.runs.tensors import SafetensorsFile, checksum


def model(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small recorded run; tests change copies of it."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    network = model()
    optimizer = torch.optim.Adam(network.parameters())
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with Recorder(
        path, model=network, optimizer=optimizer, probe=(x, y), params=True, moments=True
    ) as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, examples=6)
    return path


@pytest.fixture
def copy(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "copy")


def everything(path):
    run = load_run(path)
    return [
        (s.step, s.moments_meta() if s.step else None, {n: s.load(n) for n in s.names()})
        for s in run.snapshots
    ]


def same(a, b):
    return (
        a[:2] == b[:2]
        and a[2].keys() == b[2].keys()
        and all(torch.equal(a[2][n], b[2][n]) for n in a[2])
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_harmless(recorded, copy, position, bit):
    """Any single flipped bit of a snapshot either raises InputError naming the file, or changes
    nothing that is read.
    """
    name = "snapshots/00000002.safetensors"
    content = bytearray((recorded / name).read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    (copy / name).write_bytes(content)
    refusal, found = None, None
    try:
        found = everything(copy)
    except InputError as error:
        refusal = str(error)
    if refusal is not None:
        assert name in refusal
    else:
        assert all(same(a, b) for a, b in zip(found, everything(recorded), strict=True))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.floats(0, 1, exclude_max=True))
def test_a_truncated_snapshot_is_named(recorded, copy, length):
    name = "snapshots/00000003.safetensors"
    content = (recorded / name).read_bytes()
    (copy / name).write_bytes(content[: int(length * len(content))])
    run = load_run(copy)  # the other snapshots stay readable
    assert run.snapshots[2].load_group("params")
    with pytest.raises(InputError, match=r"00000003\.safetensors"):
        run.snapshots[3].load_group("params")


@given(
    size=st.integers(0, 40_000),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64]),
    where=st.integers(0, 2**31),
    bit=st.integers(0, 7),
)
@settings(max_examples=60)
def test_checksum_sees_every_single_bit(size, dtype, where, bit):
    tensor = torch.arange(size).remainder(251).to(dtype)
    before = checksum(tensor)
    assert before != checksum(tensor.reshape(1, -1))  # the shape counts
    if size:
        raw = tensor.view(torch.uint8)
        raw[where % len(raw)] ^= 1 << bit
        assert checksum(tensor) != before


def test_checksums_are_of_what_a_tensor_holds_however_it_lies():
    whole = torch.arange(20_000.0).view(100, 200)
    for view in (whole[:, 1], whole[:, 1:2], whole.T, torch.ones(1).expand(9), whole[::2] > 5):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 5, 8192, 200_003])
def test_a_tensor_in_pieces_is_the_tensor_and_its_damage_is_noticed(tmp_path, dtype, size):
    """Also of a file large enough to be mapped, and behind a tensor whose end isn't aligned."""
    path = tmp_path / "00000001.safetensors"
    tensor = torch.arange(size).remainder(127).to(dtype)
    write_tensors(
        path, {"a": torch.ones(3, dtype=torch.uint8), "b": tensor, "c": torch.ones(70_000)}
    )
    pieces = list(SafetensorsFile(path).pieces("b", 16_384))
    assert torch.equal(torch.cat(pieces), tensor)
    assert all(len(piece) == 16_384 for piece in pieces[:-1])
    if size:
        content = bytearray(path.read_bytes())
        content[content.rindex(tensor.view(torch.uint8).numpy().tobytes())] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match="'b' doesn't match its checksum"):
            list(SafetensorsFile(path).pieces("b", 16_384))


def test_missing_empty_and_foreign_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is empty"):
        load_run(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no recorded run"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        load_run(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="path is 3; give the path"):
        load_run(3)
    with pytest.raises(InputError, match="unknown format"):
        load_run(tmp_path, format="keras")
    for format in ("thermo-opt", "huggingface", "lightning", "torch", "safetensors"):
        with pytest.raises(InputError, match=str(tmp_path)):
            load_run(tmp_path, format=format)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"schema_version": None}, "schema version None"),
        ({"likelihood": "cauchy"}, "likelihood"),
        ({"clock": "moon"}, "clock"),
        ({"clock": 3}, "clock"),
        ({"sigma2": 0}, "sigma2"),
        ({"batch_size": -3}, "batch_size"),
        ({"settings": "none"}, "settings"),
        ({"name": 5}, "name"),
        ({"batch_size": True}, "batch_size"),
        ({"parameters": [1]}, "parameters"),
        ({"parameters": [{"name": "a"}]}, "parameters"),
        ({"parameters": [{"name": "a", "shape": ["x"]}]}, "parameters"),
    ],
)
def test_run_json_that_does_not_fit(copy, change, message):
    content = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, match=rf"run\.json.*{message}"):
        load_run(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff", pytest.param("[" * 10**5, id="deep")])
def test_run_json_that_is_not_ours(copy, text):
    (copy / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"run\.json"):
        load_run(copy)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"step": 1}', '{"step": 1}'], "line 2: step 1 occurs twice"),
        (['{"step": 2}', '{"step": 1}'], "line 2: step 1 comes after step 2"),
        (['{"step": 1', '{"step": 2}'], "line 1"),
        (['{"loss": 1}', '{"step": 2}'], "line 1"),
        (['{"step": 1.5}', '{"step": 2}'], "1.5"),
        (['{"step": -1}', '{"step": 2}'], "-1"),
        (['{"step": true}', '{"step": 2}'], "True"),
        (['{"step": 1, "lr": "high"}', '{"step": 2}'], "'lr'"),
    ],
)
def test_steps_that_do_not_fit(copy, lines, message):
    (copy / "steps.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=message):
        load_run(copy)


def test_a_half_written_last_line_is_left_out(copy):
    with open(copy / "steps.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0.')
    assert list(load_run(copy).steps.index) == [1, 2, 3, 4]


def test_run_written_by_hand(tmp_path):
    """The least another program must write: a schema version, and predictions with targets."""
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "run.json").write_text('{"schema_version": 1}')
    for step in (0, 10):
        tensors = {"probe/logits": torch.randn(4, 3), "probe/targets": torch.tensor([0, 1, 2, 0])}
        save_file(tensors, tmp_path / f"snapshots/{step:08d}.safetensors")
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 10]
    assert run.probe.inputs is None
    assert list(run.probe.targets) == [0, 1, 2, 0]
    assert len(run.steps) == 0


def test_snapshots_named_wrongly_or_twice(copy):
    shutil.copy(copy / "snapshots/00000002.safetensors", copy / "snapshots/2.safetensors")
    with pytest.raises(InputError, match="both hold step 2"):
        load_run(copy)
    (copy / "snapshots/2.safetensors").rename(copy / "snapshots/best.safetensors")
    with pytest.raises(InputError, match=r"best\.safetensors"):
        load_run(copy)


def test_hidden_files_are_none_of_ours(copy):
    before = [snapshot.path for snapshot in load_run(copy).snapshots]
    for name in ("._00000001.safetensors", ".DS_Store", "00000009.safetensors.partial"):
        (copy / "snapshots" / name).write_bytes(b"\0")
        (copy / name).write_bytes(b"\0")
    assert [snapshot.path for snapshot in load_run(copy).snapshots] == before


def test_a_folder_of_snapshots_that_may_not_be_read_is_named(copy, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(
        type(copy), "iterdir", refused
    )  # the superuser may read whatever its permissions say
    with pytest.raises(InputError, match=r"snapshots can't be read \(Permission denied"):
        load_run(copy, format="thermo-opt")


def test_a_layout_that_changes_is_named(copy):
    path = copy / "snapshots/00000003.safetensors"
    tensors = load_run(copy).snapshots[3].load_group("params")

    def rewrite(changed):
        write_tensors(path, {f"params/{name}": tensor.clone() for name, tensor in changed.items()})
        return load_run(copy).snapshots[3]

    with pytest.raises(
        InputError, match=r"params/2\.weight has shape \(3, 5\) at step 3 but \(3, 4\) at step 0"
    ):
        rewrite({**tensors, "2.weight": torch.zeros(3, 5)}).load_group("params")
    with pytest.raises(InputError, match=r"params/extra appears at step 3"):
        rewrite({**tensors, "extra": torch.zeros(2)}).load_group("params")
    with pytest.raises(InputError, match=r"params/0\.bias is gone at step 3"):
        rewrite({name: tensor for name, tensor in tensors.items() if name != "0.bias"}).load_group(
            "params"
        )


def test_what_was_not_recorded_is_named_with_the_remedy(recorded):
    snapshot = load_run(recorded).snapshots[0]
    with pytest.raises(InputError, match="grads=True"):
        snapshot.load_group("grad")
    with pytest.raises(InputError, match="moments=True"):
        snapshot.moments_meta()
    with pytest.raises(InputError, match="params/9"):
        snapshot.load("params/9")


def test_another_probe_is_noticed(copy):
    write_tensors(
        copy / "probe.safetensors", {"inputs": torch.zeros(6, 4), "targets": torch.arange(6) % 3}
    )
    with pytest.raises(InputError, match=r"probe\.safetensors"):
        _ = load_run(copy).probe


def test_snapshots_travel_between_processes(recorded):
    snapshot = load_run(recorded).snapshots[2]
    snapshot.names()
    twin = pickle.loads(pickle.dumps(snapshot))
    assert twin == snapshot
    assert torch.equal(twin.load("params/0.weight"), snapshot.load("params/0.weight"))


def test_replay_gives_the_recorded_predictions(recorded):
    """Weights and BatchNorm statistics of each snapshot, put into a fresh model, predict what was
    recorded."""
    run, network = load_run(recorded), model()
    for snapshot in run.snapshots:
        install(network, snapshot)
        assert torch.equal(predict(network, run.probe.inputs), snapshot.load("probe/logits"))
    with pytest.raises(InputError, match="shape"):
        install(model(width=5), run.snapshots[0])
    with pytest.raises(InputError, match="right model"):
        install(nn.Linear(4, 3), run.snapshots[0])


def test_clock_readings(copy):
    rows = [{"step": k, "lr": 0.1 * k, "wall": float(k**2), "examples": 2 * k} for k in range(1, 6)]
    (copy / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, at = load_run(copy), [0, 2, 5]
    assert list(run.clock_readings("step", at)) == at
    np.testing.assert_allclose(run.clock_readings("flow", at), [0, 0.3, 1.5], rtol=1e-15)
    np.testing.assert_array_equal(run.clock_readings("wall", np.array(at)), [0, 4, 25])
    np.testing.assert_array_equal(run.clock_readings("examples", at), [0, 6, 30])
    with pytest.raises(InputError, match="'tokens'"):
        run.clock_readings("tokens", at)
    with pytest.raises(InputError, match="unknown clock"):
        run.clock_readings("moon", at)
    with pytest.raises(InputError, match="step 6"):
        run.clock_readings("flow", [0, 6])
    del rows[2]["lr"], rows[2]["wall"]
    (copy / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(copy)
    with pytest.raises(InputError, match="step 3"):
        run.clock_readings("flow", [0, 5])
    assert list(run.clock_readings("wall", [0, 2, 5])) == [
        0,
        4,
        25,
    ]  # seconds are needed at the snapshots alone
    with pytest.raises(InputError, match="step 3"):
        run.clock_readings("wall", [0, 3])


def test_examples_clock_from_the_batch_size(copy):
    content = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**content, "batch_size": 32}))
    (copy / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert list(load_run(copy).clock_readings("examples", [0, 2])) == [0, 64]


def test_other_files_beside_the_snapshots_are_left_alone(copy, recorded):
    for name in ("safetensors", ".hidden.safetensors", "00000009.tmp"):
        (copy / "snapshots" / name).write_text("nothing of ours")
    assert all(same(a, b) for a, b in zip(everything(copy), everything(recorded), strict=True))


def test_a_byte_order_mark_is_no_damage(copy):
    steps = copy / "steps.jsonl"
    steps.write_bytes(b"\xef\xbb\xbf" + steps.read_bytes())
    assert load_run(copy).steps.index.tolist() == [1, 2, 3, 4]
