"""A sweep's configuration: what it means, and one sentence for what it can't mean."""

import copy
from pathlib import Path

import pytest

from thermo_opt.errors import InputError
from thermo_opt.sweep import read_config
from thermo_opt.sweep.config import parse_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GOOD = {
    "output": "out",
    "task": {"name": "blobs"},
    "training": {"steps": 5, "batch_size": 16, "seeds": [0, 1]},
    "pareto": {"target_loss": 0.5},
    "method": [
        {
            "optimizer": "Adam",
            "settings": {"eps": 1e-6},
            "grid": {"lr": [0.1, 0.2], "weight_decay": [0.0, 1.0]},
        },
        {"name": "plain", "optimizer": "SGD", "settings": {"lr": 1.0}},
    ],
}


def changed(where, value):
    """`GOOD` with one entry replaced; ``where`` as in "training.steps" or "method.0.grid"."""
    content = copy.deepcopy(GOOD)
    *path, last = where.split(".")
    at = content
    for key in path:
        at = at[int(key)] if isinstance(at, list) else at[key]
    at[int(last) if isinstance(at, list) else last] = value
    return content


def test_every_combination_of_settings_and_seeds_is_a_run():
    trials = parse_config(GOOD).trials()
    assert len(trials) == 2 * 2 * 2 + 2
    assert trials[1].settings == {"eps": 1e-6, "lr": 0.1, "weight_decay": 0.0}
    assert trials[1].seed == 1
    assert len({trial.name for trial in trials}) == len(trials)
    assert trials[-1].name == "plain-seed=1"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("sweep_*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(file):
    assert len(read_config(file).trials()) >= 4


BAD = [
    ("outptu", "x", "did you mean 'output'"),
    ("training.step", 5, "did you mean 'steps'"),
    ("training.batchsize", 5, "did you mean 'batch_size'"),
    ("task.nam", "x", "did you mean 'name'"),
    ("method.0.optimiser", "Adam", "did you mean 'optimizer'"),
    ("pareto.target", 1.0, "did you mean 'target_loss'"),
    ("task.name", "blob", "did you mean 'blobs'"),
    ("task.factory", "a.b:c", "either a name"),
    ("task", {"factory": "module"}, "package.module:function"),
    ("task.likelihood", "normal", "use one of"),
    ("training.steps", 0, "1 or larger"),
    ("training.steps", 2.5, "whole number"),
    ("training.steps", True, "whole number"),
    ("training.batch_size", -1, "0 or larger"),
    ("training.every", 0, "1 or larger"),
    ("training.schedule", "cosin", "did you mean 'cosine'"),
    ("training.seeds", [], "list of whole numbers"),
    ("training.seeds", [-1], "list of whole numbers"),
    ("training.seeds", [1, 1], "each seed once"),
    ("pareto.target_loss", "low", "number"),
    ("pareto.x", "second", "did you mean 'seconds'"),
    ("method", [], "no method"),
    ("method.0.optimizer", 3, "give a text"),
    ("method.0.grid", {"lr": 0.1}, "list of values"),
    ("method.0.grid", {"eps": [0.1]}, "keep one"),
    ("method.0", "Adam", "write it as a table"),
    ("training", 3, "write it as a table"),
    ("output", 3, "give a text"),
]


@pytest.mark.parametrize(("where", "value", "sentence"), BAD, ids=[f"{w}={v}" for w, v, _ in BAD])
def test_what_it_cannot_mean_is_refused_in_a_sentence(where, value, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_config(changed(where, value))


def test_what_is_missing_is_named():
    for key in ("output", "task", "training", "method"):
        content = {k: v for k, v in GOOD.items() if k != key}
        with pytest.raises(InputError, match=r"output|name|steps|method"):
            parse_config(content)


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(InputError, match="two runs would be named"):
        parse_config(
            changed("method.1.name", "PLAIN") | {"method": [GOOD["method"][1], GOOD["method"][1]]}
        ).trials()


@pytest.mark.parametrize("text", ["output = ", "\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(InputError, match=r"sweep.toml can't be read"):
        read_config(tmp_path / "sweep.toml")
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "none.toml")
