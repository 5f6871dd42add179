"""The lenses' recorded runs."""

from tests.lenses.conftest import adam_run, sgd_run

__all__ = ["adam_run", "sgd_run"]
