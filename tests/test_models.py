"""Calling models: what they return, what runs leave behind, and where factories come from."""

import os
import random
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from thermo_opt.arguments import jsonable, scalar
from thermo_opt.errors import InputError
from thermo_opt.models import (
    call,
    evaluated,
    full_precision,
    load_factory,
    map_tensors,
    outputs_of,
    random_states,
    repeated,
    untouched,
)

F = torch.randn(4, 3)
LOSS = torch.tensor(0.7)


@pytest.mark.parametrize(
    "returned",
    [
        F,
        (F, None),
        [F],
        (LOSS, F),
        {"logits": F, "aux": torch.ones(4)},
        {"loss": LOSS, "logits": F},
        {"pred": F},
        {"loss": LOSS, "out": F, "name": "x"},
        SimpleNamespace(logits=F, loss=LOSS),
    ],
)
def test_the_predictions_are_found_in_what_a_model_returns(returned):
    assert outputs_of(returned) is F


def test_the_two_ends_of_an_answer_are_two_predictions():
    ends = SimpleNamespace(logits=None, start_logits=F, end_logits=2 * F)
    assert torch.equal(outputs_of(ends), torch.stack([F, 2 * F], 1))


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ({"loss": LOSS}, "'loss'"),
        ({"mean": F, "variance": F}, "'mean', 'variance'"),
        ({}, "nothing"),
        (SimpleNamespace(loss=LOSS), "SimpleNamespace"),
        (LOSS.item(), "float"),
        (None, "NoneType"),
        ((), "tuple"),
    ],
)
def test_what_has_no_predictions_is_refused_by_name(returned, named):
    with pytest.raises(InputError, match=named):
        outputs_of(returned)


class Restless(nn.Module):
    """Draws from every generator, counts its calls, and switches itself to training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(1))
        self.layers[1].eval()

    def forward(self, x):
        self.calls += 1
        self.layers[2].training = True
        return self.layers(x) + random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002


@pytest.mark.parametrize("context", [untouched, repeated])
def test_a_pass_without_a_trace(context):
    model = Restless()
    model.layers[1].train()
    before = {name: t.clone() for name, t in model.state_dict().items() if "calls" not in name}
    flags = [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with context(model):
        model(F)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert [m.training for m in model.modules()] == flags
    assert context is repeated or model.calls == 0


def test_a_repeated_pass_draws_the_same_masks():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    restore = random_states()
    first = model(F)
    with repeated(model, restore):
        assert torch.equal(model(F), first)


def test_evaluation_restores_every_flag_also_after_an_error():
    model = Restless()
    flags = [m.training for m in model.modules()]
    with suppress(ZeroDivisionError), evaluated(model.modules()):
        assert not any(m.training for m in model.modules())
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == flags


def test_full_precision_also_inside_a_forward_that_switches_autocast_on():
    class Low(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Low(3, 3)
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert model(F).dtype == torch.float32
    assert model(F).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_inputs_keep_their_structure():
    class Pair(tuple):
        __slots__ = ()

    from collections import namedtuple

    Named = namedtuple("Named", "a b")
    tree = {"x": [F, Named(F, "text")], "n": 3}
    doubled = map_tensors(tree, lambda t: 2 * t)
    assert torch.equal(doubled["x"][1].a, 2 * F)
    assert doubled["x"][1].b == "text"
    assert doubled["n"] == 3
    assert call(lambda a, b: (a, b), {"a": 1, "b": 2}) == call(lambda a, b: (a, b), (1, 2))


def test_a_factory_in_the_current_folder_is_found_last(tmp_path):
    """Neither a standard nor an installed module can be replaced by a file lying there."""
    (tmp_path / "nets_of_mine.py").write_text(
        "import shadowed, json, numpy\ndef make():\n  import needed_later\n  return 7\n"
    )
    (tmp_path / "needed_later.py").write_text("")
    (tmp_path / "optional_package.py").write_text("raise SystemExit('not for thermo_opt')")
    (tmp_path / "shadowed.py").write_text("")
    for name in ("json", "numpy", "pandas", "joblib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code in the folder was run')")
    code = (
        "from thermo_opt.models import load_factory, working_directory_last\n"
        "import sys\n"
        "before = list(sys.path)\n"
        "load_factory('thermo_opt.demo_models:digits_mlp', '--model')()\n"
        "assert sys.path == before\n"
        "make = load_factory('nets_of_mine:make', '--model')\n"
        "assert sys.path == before\n"
        "with working_directory_last(): assert make() == 7\n"
        "assert sys.path == before\n"
        "import importlib.util, pandas, joblib\n"
        "assert importlib.util.find_spec('optional_package') is None\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = tmp_path / "elsewhere"
    script.mkdir()
    (script / "main.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(script / "main.py")], cwd=tmp_path, env=env, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("spec", ["nocolon", ":x", "x:", 3, "no.such:thing", "json:nothing"])
def test_a_factory_that_is_not_there_is_refused(spec):
    with pytest.raises(InputError, match="--model"):
        load_factory(spec, "--model")


def test_values_as_strict_json():
    given = {
        "a": np.float32(1.5),
        2: [float("nan"), np.int64(3)],
        "t": torch.tensor([1.0, torch.inf]),
    }
    assert jsonable(given) == {"a": 1.5, "2": [None, 3], "t": [1.0, None]}
    assert jsonable(np.bool_(True)) is True
    assert jsonable(10**400) is None
    assert jsonable("\ud800") == "?"
    assert [scalar(v) for v in (1 + 2j, object(), [1], torch.ones(2), 10**30, True)] == [
        None, None, None, None, 1e30, True,
    ]  # fmt: skip
