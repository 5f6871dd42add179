"""Folders of torch state dicts and of safetensors."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs import install, load_run, predict


class Tied(nn.Module):
    """Two names for one matrix, and parameters of equal shapes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.a = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.b = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.b(self.norm(self.a(self.embed(tokens)))))


def train(path, save, model=None, parameters=None, steps=3):
    torch.manual_seed(0)
    model = model or Tied()
    optimizer = torch.optim.AdamW(parameters(model) if parameters else model.parameters(), lr=0.01)
    tokens = torch.arange(6)
    path.mkdir(exist_ok=True)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        save(model, optimizer, step)
    return model, optimizer


@pytest.mark.parametrize(
    "keys",
    [("model", "optimizer"), ("state_dict", "optimizer_state_dict"), ("model_state_dict", None)],
)
def test_torch_checkpoints(tmp_path, keys):
    def save(model, optimizer, step):
        content = {keys[0]: model.state_dict(), "epoch": step}
        if keys[1]:
            content[keys[1]] = optimizer.state_dict()
        torch.save(content, tmp_path / f"model_v2_{10 * step}.pt")

    model, optimizer = train(tmp_path, save)
    run = load_run(tmp_path)
    assert run.format == "torch"
    # the optimizer's own count where it was saved, else the only number that varies in the names
    expected = [1, 2, 3] if keys[1] else [10, 20, 30]
    assert [snapshot.step for snapshot in run.snapshots] == expected
    assert run.info.tied == {"head.weight": "embed.weight"}
    last = run.snapshots[-1]
    assert set(last.load_group("params")) == {name for name, _ in model.named_parameters()}
    assert set(last.load_group("buffers")) == {name for name, _ in model.named_buffers()}
    if keys[1]:
        for name, parameter in model.named_parameters():
            assert torch.equal(last.load(f"exp_avg/{name}"), optimizer.state[parameter]["exp_avg"])
        assert last.moments_meta() == {"step": 3, "betas": (0.9, 0.999)}
    else:
        with pytest.raises(InputError, match="no optimizer state"):
            last.load_group("exp_avg")
    fresh = Tied()
    install(fresh, last, run.info.tied)
    assert torch.equal(predict(fresh, torch.arange(6)), predict(model, torch.arange(6)))


@pytest.mark.parametrize("legacy", [False, True])
def test_bare_state_dicts(tmp_path, legacy):
    def save(model, optimizer, step):
        torch.save(
            model.state_dict(), tmp_path / f"{step}.pth", _use_new_zipfile_serialization=not legacy
        )

    model, _ = train(tmp_path, save)
    last = load_run(tmp_path).snapshots[-1]
    assert all(
        torch.equal(last.load(f"params/{name}"), parameter)
        for name, parameter in model.named_parameters()
    )


def save_both(path):
    return lambda model, optimizer, step: torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / f"step{step}.pt"
    )


def test_moments_of_frozen_models_and_of_groups(tmp_path):
    """Order and shapes name the moments where they leave one possibility, and no other."""

    def frozen(model):
        model.embed.weight.requires_grad_(False)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    model, optimizer = train(tmp_path / "frozen", save_both(tmp_path / "frozen"), parameters=frozen)
    last = load_run(tmp_path / "frozen").snapshots[-1]
    assert set(last.load_group("exp_avg")) == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(last.load("exp_avg/b.weight"), optimizer.state[model.b.weight]["exp_avg"])

    def one_of_two(model):
        return model.b.parameters()

    train(tmp_path / "ambiguous", save_both(tmp_path / "ambiguous"), parameters=one_of_two)
    last = load_run(tmp_path / "ambiguous").snapshots[-1]
    with pytest.raises(InputError, match="more than one possibility"):
        last.load_group("exp_avg")

    def groups(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1]},
        ]

    model, optimizer = train(tmp_path / "groups", save_both(tmp_path / "groups"), parameters=groups)
    last = load_run(tmp_path / "groups").snapshots[-1]
    for name, parameter in model.named_parameters():
        assert torch.equal(
            last.load(f"exp_avg_sq/{name}"), optimizer.state[parameter]["exp_avg_sq"]
        )


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"

    class Poison:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (tmp_path / "run").mkdir()
    for save in (
        lambda file: torch.save({"model": Poison()}, file),
        lambda file: torch.save({"model": Poison()}, file, _use_new_zipfile_serialization=False),
        lambda file: file.write_bytes(pickle.dumps(Poison())),
    ):
        save(tmp_path / "run/model-1.pt")
        with pytest.raises(InputError, match=r"model-1\.pt"):
            load_run(tmp_path / "run")
    assert not mark.exists()


def test_files_that_hold_no_weights_or_no_step(tmp_path):
    torch.save({"loss": 3.0}, tmp_path / "a-1.pt")
    with pytest.raises(
        InputError, match=r"a-1\.pt holds no state dict \(it is a dictionary of loss"
    ):
        load_run(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "a-1.pt")
    with pytest.raises(InputError, match="it is a list"):
        load_run(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "a-1.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "best.pt")
    run = load_run(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [1]
    assert any("best.pt" in remark for remark in run.remarks)
    (tmp_path / "a-1.pt").unlink()
    with pytest.raises(InputError, match="no step number in its name"):
        load_run(tmp_path)


def test_two_files_of_one_step_count_once_if_they_hold_the_same_weights(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "b-1.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "b-01.pt")
    assert [snapshot.step for snapshot in load_run(tmp_path).snapshots] == [1]
    torch.save({"w": torch.zeros(2)}, tmp_path / "b-01.pt")
    with pytest.raises(InputError, match="both hold step 1, with different weights"):
        load_run(tmp_path)


def test_damaged_torch_files_are_named(tmp_path):
    train(tmp_path, save_both(tmp_path))
    content = (tmp_path / "step2.pt").read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 10):
        (tmp_path / "step2.pt").write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"step2\.pt"):
            load_run(tmp_path).snapshots[1].load_group("params")


def test_safetensors_folder(tmp_path):
    weights = {
        "w": torch.randn(3, 2).bfloat16(),
        "norm.running_mean": torch.zeros(3),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True]),
    }
    for step in (100, 5):
        save_file(weights, tmp_path / f"model-{step}.safetensors")
    save_file(
        {"inputs": torch.ones(2, 2), "targets": torch.zeros(2)}, tmp_path / "probe.safetensors"
    )
    run = load_run(tmp_path)
    assert run.format == "safetensors"
    assert [snapshot.step for snapshot in run.snapshots] == [5, 100]
    assert set(run.snapshots[0].load_group("params")) == {"w"}
    assert run.snapshots[0].load("params/w").dtype == torch.bfloat16
    assert set(run.snapshots[0].load_group("buffers")) == {"norm.running_mean", "steps", "mask"}
    assert run.probe.inputs.shape == (2, 2)
    assert run.info.parameters == [
        {"name": "w", "shape": [3, 2], "dtype": "bfloat16", "trainable": None}
    ]


def test_weights_that_appear_vanish_or_change_shape(tmp_path):
    save_file({"w": torch.ones(2), "v": torch.ones(3)}, tmp_path / "1.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "2.safetensors")
    save_file({"w": torch.ones(2), "v": torch.ones(4)}, tmp_path / "3.safetensors")
    first, second, third = load_run(tmp_path).snapshots
    assert first.load_group("params")["v"].shape == (3,)
    with pytest.raises(InputError, match="params/v is gone at step 2"):
        second.load_group("params")
    with pytest.raises(
        InputError, match=r"params/v has shape \(4,\) at step 3 but \(3,\) at step 1"
    ):
        third.load_group("params")


def test_two_layouts_in_one_folder_need_a_choice(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "1.pt")
    save_file({"w": torch.zeros(2)}, tmp_path / "1.safetensors")
    with pytest.raises(InputError, match="--format"):
        load_run(tmp_path)
    assert load_run(tmp_path, format="torch").snapshots[0].load("params/w").sum() == 2
    assert load_run(tmp_path, format="safetensors").snapshots[0].load("params/w").sum() == 0


def test_opening_a_run_reads_no_weights(tmp_path):
    """2,000 large checkpoints open at once: only the first one's header is looked at."""
    path = tmp_path / "first-0.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    for step in range(1, 2001):
        (tmp_path / f"model-{step}.safetensors").write_bytes(b"not read")
    run = load_run(tmp_path)
    assert len(run.snapshots) == 2001
    with pytest.raises(InputError, match=r"model-1500\.safetensors"):
        run.snapshots[1500].names()


def test_a_tensor_of_another_group_is_not_a_weight_of_its_name(tmp_path):
    train(
        tmp_path,
        lambda model, optimizer, step: torch.save(
            {"model": model.state_dict()}, tmp_path / f"{step}.pt"
        ),
    )
    snapshot = load_run(tmp_path).snapshots[1]
    assert snapshot.load("params/a.weight").shape == (4, 4)
    assert snapshot.load("buffers/norm.running_mean").shape == (4,)
    for name in (
        "grad/a.weight",
        "probe/a.weight",
        "buffers/a.weight",
        "params/norm.running_mean",
        "exp_avg/a.weight",
        "a",
    ):
        with pytest.raises(InputError, match=f"has no {name}"):
            snapshot.load(name)
