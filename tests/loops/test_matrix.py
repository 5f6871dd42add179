"""The tables of the page on training loops say what the tests of this folder show, row by row."""

import re

import pytest

from tests.docs.pages import DOCS
from tests.loops import (
    test_huggingface_trainer,
    test_layers,
    test_lightning_trainer,
    test_losses,
    test_models,
    test_passes,
    test_processes,
    test_setups,
    test_sharded,
)

PAGE = (DOCS / "training-loops.md").read_text(encoding="utf-8")

PARALLEL = {
    "DistributedDataParallel": test_processes.test_weights_stay_together,
    "DistributedDataParallel, gradients clipped": test_processes.test_weights_stay_together,
    "DistributedDataParallel, parts under no_sync": (
        test_processes.test_accumulated_parts_train_as_one_process_with_the_whole_batch
    ),
    "fully_shard (FSDP2) on a mesh of one dimension": (
        test_sharded.test_two_processes_with_half_of_the_parameters_train_as_one_with_all
    ),
    "models of their own in each process": (
        test_processes.test_models_of_their_own_train_alone_with_a_warning_unless_told_so
    ),
}
REFUSED_PARALLEL = {
    "FullyShardedDataParallel (FSDP1)": (
        test_sharded.test_the_older_fully_sharded_data_parallel_is_refused_by_name
    ),
    "tensor parallel": test_sharded.test_tensor_parallel_layers_are_refused_by_name,
    "fully_shard with a metric of the minibatch": (
        test_sharded.test_a_metric_of_a_minibatch_is_refused
    ),
}
TABLES = {
    "wrapper": (PARALLEL, REFUSED_PARALLEL),
    "the model, or the call": (test_passes.FOUND, test_passes.REFUSED),
    "setting of the Trainer": (test_huggingface_trainer.SETTINGS, {}),
    "model in the Trainer": (test_huggingface_trainer.MODELS, {}),
    "kind of Lightning module or option": (test_lightning_trainer.KINDS, {}),
    "scheduler": (test_lightning_trainer.SCHEDULERS, {}),
    "loss": (test_losses.LOSSES, test_losses.REFUSED),
    "model": (test_models.MODELS, {}),
    "set-up": (test_setups.SETUPS, test_setups.REFUSED),
}


def rows(title, second="result"):
    """First and second cells of the table whose first column has this title."""
    table = re.search(
        rf"^\| {re.escape(title)} \| {second} \|\n\|[-|]+\|\n((?:\|.*\n?)+)", PAGE, re.M
    )
    assert table is not None
    lines = table[1].strip().splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|"))[:2] for line in lines]


@pytest.mark.parametrize("title", TABLES)
def test_every_row_of_the_table_is_a_test_and_every_test_a_row(title):
    works, refused = TABLES[title]
    found = rows(title)
    assert sorted(name for name, result in found if result.startswith("works")) == sorted(works)
    assert sorted(name for name, result in found if result.startswith("refused")) == sorted(refused)


def test_every_row_of_the_layers_is_a_test_and_every_test_a_row():
    assert sorted(name for name, _ in rows("parameters of", "metric")) == sorted(test_layers.LAYERS)
