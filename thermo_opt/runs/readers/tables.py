"""Tables that other tools wrote as CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from thermo_opt.errors import InputError, first_line


def csv_table(file: Path, remedy: str) -> pd.DataFrame:
    """The table in a file; `InputError` with this remedy where there is none."""
    try:
        return pd.read_csv(file, skipinitialspace=True)
    except (ValueError, OverflowError, pd.errors.ParserError) as error:
        raise InputError(f"{file} isn't a table ({first_line(error)}); {remedy}") from None
