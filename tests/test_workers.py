"""Work in other processes: its results, and what those processes never import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from joblib import delayed

from thermo_opt.workers import in_processes

SCRIPT = """
from joblib import delayed
from thermo_opt.workers import in_processes

if __name__ == "__main__":
    print(sum(in_processes([delayed(abs)(-k) for k in range(4)], 2)))
"""


def test_results_come_in_the_order_of_the_calls() -> None:
    assert list(in_processes((delayed(pow)(k, 2) for k in range(5)), 1)) == [0, 1, 4, 9, 16]


def test_the_environment_is_as_before_when_the_work_is_done_or_dropped() -> None:
    before = dict(os.environ)
    list(in_processes([delayed(abs)(-1)], 1))
    started = in_processes((delayed(abs)(-k) for k in range(3)), 1)
    next(started)
    started.close()
    assert dict(os.environ) == before


def test_workers_import_nothing_from_the_folder_one_stands_in(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "script.py"
    for package in ("joblib", "numpy", "thermo_opt"):
        (run / package).mkdir(parents=True)
        (run / package / "__init__.py").write_text("open('IMPORTED', 'w')\n")
    elsewhere.write_text(SCRIPT)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(elsewhere)],
        cwd=run,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), (run / "IMPORTED").exists()) == ("6", False), done.stderr


NAMED = """
from joblib import delayed
from thermo_opt.models import load_factory
from thermo_opt.workers import in_processes

if __name__ == "__main__":
    Mine = load_factory("mine:Mine", "--model")
    print(*in_processes([delayed(Mine(k).twice)() for k in range(3)], 2))
"""


def test_what_the_user_named_in_the_folder_reaches_the_workers(tmp_path: Path) -> None:
    """They don't look there, so it is sent whole, and with it what it imports from there."""
    (tmp_path / "beside.py").write_text("def double(k): return 2 * k\n")
    (tmp_path / "mine.py").write_text(
        "import beside\n"
        "class Mine:\n"
        "    def __init__(self, k): self.k = k\n"
        "    def twice(self): return beside.double(self.k)\n"
    )
    script = tmp_path / "elsewhere" / "main.py"
    script.parent.mkdir()
    script.write_text(NAMED)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0 2 4", done.stderr
