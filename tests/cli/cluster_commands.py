"""What the tests of clusters run: the same commands here and there."""

import json
from pathlib import Path

import pandas as pd

from thermo_opt.cli import main

DATA = Path(__file__).parents[2] / "data"
RUNS = [str(DATA / name) for name in ("digits-sgd", "digits-sgd-momentum", "digits-adam")]
SWEEP = """
output = "{}"

[task]
name = "blobs"

[pareto]
target_loss = [1.0]

[training]
seeds = [0, 1, 2]
steps = 40
batch_size = 64
every = 4

[[method]]
name = "SGD"
optimizer = "SGD"
grid = {{ lr = [0.03, 0.1] }}
"""


def printed(arguments, capsys):
    """The JSON that a command prints."""
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def swept(folder, *options):
    """The table of a sweep whose output is ``folder``, but for its times."""
    config = folder.with_suffix(".toml")
    config.write_text(SWEEP.format(folder.as_posix()))
    assert main(["sweep", str(config), *options]) == 0
    table = pd.read_csv(folder / "table.csv")
    return table.drop(columns=[column for column in table if "seconds" in column])
