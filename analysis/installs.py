"""What `pyproject.toml` promises: the lowest and the newest allowed dependencies, and the wheel.

    python -m analysis installs lowest [--tests tests/sweep tests/runs] [--python 3.12]
        [--torch 2.13.0+cpu]
    python -m analysis installs newest [--tests …] [--python …] [--torch …]
    python -m analysis installs wheel [--fresh]

"lowest" and "newest" make a virtual environment outside the checkout, install the project with its
test dependencies through uv (``--resolution lowest-direct`` or ``highest``, no constraints file),
print the versions that were chosen, and run the tests there. ``--torch``: this torch whatever the
resolution, for machines whose index has one build without CUDA's libraries only; then the lower
bound of torch remains a claim.

"wheel" builds the wheel, installs it into a folder of its own outside the checkout, and there runs
``thermo-opt demo``, ``verify`` of two claims and an audit with the environment's dependencies;
``--fresh``: with dependencies installed anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import thermo_opt as to

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
SHOWN = ("numpy", "scipy", "torch", "pandas", "matplotlib", "safetensors", "typer", "rich")


def call(command: Sequence[object], folder: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command that must succeed; InputError says which one didn't, and how it ended."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(env or {})
    status = subprocess.run(words, cwd=folder, env=environment, check=False).returncode
    if status:
        raise to.InputError(f"{' '.join(words[:4])} … ended with status {status}: see above")


def environment(folder: Path, python: str | None) -> tuple[Path, Path]:
    """A new virtual environment with uv; its Python and uv."""
    made = folder / "environment"
    call([sys.executable, "-m", "venv", made], folder)
    call([made / "bin" / "pip", "install", "-q", "uv"], folder)
    uv = made / "bin" / "uv"
    if python is None:
        return made / "bin" / "python", uv
    call([uv, "venv", "-q", "--python", python, folder / "chosen"], folder)
    return folder / "chosen" / "bin" / "python", uv


def suite(which: str, tests: Sequence[str], python: str | None, torch: str | None) -> None:
    """Install one end of the allowed range, and run tests on it."""
    links = os.environ.get("PIP_FIND_LINKS")  # pip's own; uv has another name for them
    env = {"UV_FIND_LINKS": links} if links and "UV_FIND_LINKS" not in os.environ else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        interpreter, uv = environment(folder, python)
        install = [uv, "pip", "install", "-q", "--python", interpreter]
        chosen = ["--resolution", RESOLUTION[which]]
        if torch is not None:
            (folder / "override.txt").write_text(f"torch=={torch}\n")
            chosen += ["--override", str(folder / "override.txt")]
        call([*install, *chosen, "-e", f"{ROOT}[test]"], folder, env)
        oracles = ROOT / "tests" / "oracles" / "requirements.txt"
        call([*install, "--no-deps", "-r", oracles], folder, env)
        code = "import importlib.metadata as m; print({n: m.version(n) for n in %r})"
        call([interpreter, "-c", code % (SHOWN,)], folder)
        call([interpreter, "-m", "pytest", "-n", "0", "-q", *tests], ROOT)


def wheel(fresh: bool) -> None:
    """Build the wheel and use it outside the checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
        call(build, folder)
        (built,) = folder.glob("thermo_opt-*.whl")
        print(f"{built.name}: {built.stat().st_size / 2**20:.1f} MiB")
        interpreter, env = Path(sys.executable), {"PYTHONPATH": str(folder / "site")}
        if fresh:
            interpreter, uv = environment(folder, None)
            call([uv, "pip", "install", "-q", "--python", interpreter, built], folder)
            env = {}
        else:
            target = ["-m", "pip", "install", "-q", "--no-deps", "--target", folder / "site"]
            call([interpreter, *target, built], folder)
        outside = folder / "outside"
        outside.mkdir()
        where = "import thermo_opt, sys; sys.exit(%r not in thermo_opt.__file__)"
        call([interpreter, "-c", where % str(folder)], outside, env)
        command = [interpreter, "-m", "thermo_opt.cli"]
        call([*command, "demo"], outside, env)
        call([*command, "verify", "speed-cost-bound", "trap-dragging"], outside, env)
        shutil.copytree(ROOT / "data" / "digits-adam", outside / "run")
        call([*command, "audit", "run", "--stride", "20", "--html", "page.html"], outside, env)
        pages = sorted(page.name for page in outside.glob("*.html"))
        if "page.html" not in pages or "report.html" not in pages:
            raise to.InputError(f"the wheel wrote {pages} instead of page.html and report.html")
        print("the wheel serves outside the checkout")


def main(arguments: list[str]) -> None:
    """Try one installation."""
    parser = argparse.ArgumentParser(
        prog="analysis installs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("which", choices=[*RESOLUTION, "wheel"])
    parser.add_argument("--tests", nargs="+", default=["tests"])
    parser.add_argument("--python", help="such as 3.12: another version, through uv")
    parser.add_argument("--torch", metavar="VERSION", help="this torch, whatever the resolution")
    parser.add_argument("--fresh", action="store_true", help="wheel: install dependencies anew")
    options = parser.parse_args(arguments)
    if options.which == "wheel":
        return wheel(options.fresh)
    return suite(options.which, options.tests, options.python, options.torch)
