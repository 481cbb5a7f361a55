"""Builds wheel and sdist, installs them in new environments, and measures size, time, import and help.

    python benchmarks/installation.py --extras onnxruntime,serve --json benchmarks/installation.json

Each environment gets the wheel alone or with one extra, from the package index, and must run `trbert doctor`.
The wheel is built from the sdist, so that both hold all that is needed.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from typing import Any

from trbert_jax.io import check_outputs, write_json

ROOT = Path(__file__).parents[1]
REPEATS = 5


def python_of(folder: Path) -> Path:
    """Makes a virtual environment; returns its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(*command: Any, **options: Any) -> str:
    """Runs a program without the packages of this environment; returns its standard output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options |= {"check": True, "stdout": subprocess.PIPE, "text": True, "env": env}
    return str(subprocess.run([*map(str, command)], **options).stdout)


def build(folder: Path) -> list[Path]:
    """Returns the sdist and the wheel built from it."""
    python = python_of(folder / "build")
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    built = sorted((folder / "dist").iterdir(), key=lambda path: path.suffix)
    for kind in ("*.py", "*.html", "*.js", "*.css", "py.typed"):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trbert_jax").rglob(kind)}
        missing = expected - {*zipfile.ZipFile(built[-1]).namelist()}
        if missing:
            raise SystemExit(f"{built[-1]} lacks {', '.join(sorted(missing))}")
    return built


def seconds_of(*command: Any, **options: Any) -> float:
    """Returns the median time of a program, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(*command, **options)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def install(folder: Path, wheel: Path, extra: str) -> dict[str, Any]:
    """Installs the wheel in a new environment; returns its size and times."""
    python = python_of(folder / f"with_{extra}")
    before, start = size(python.parents[1]), time.perf_counter()
    wanted = f"{wheel}[{extra}]" if extra else wheel
    run(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", wanted, cwd=folder)
    seconds = time.perf_counter() - start
    doctor = run(python, "-m", "trbert_jax", "doctor", cwd=folder)
    packages = json.loads(run(python, "-m", "pip", "list", "--format=json"))
    return {
        "extra": extra,
        "seconds": seconds,
        "mebibytes": (size(python.parents[1]) - before) / 2**20,
        "packages": len(packages) - 1,  # pip
        "ready": [line.split()[0] for line in doctor.splitlines() if line.endswith(": ready")],
        "python_seconds": seconds_of(python, "-c", "pass", cwd=folder),
        "import_seconds": seconds_of(python, "-c", "import trbert_jax", cwd=folder),
        "help_seconds": seconds_of(python, "-m", "trbert_jax", "--help", cwd=folder),
    }


def size(folder: Path) -> int:
    """Returns the bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--extras", default="", metavar="A,B", help="extras to try, beside none")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    check_outputs(outputs=[args.json])
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder))
        wheel = next(path for path in built if path.suffix == ".whl")
        extras = ["", *filter(None, args.extras.split(","))]
        result = {
            "command": shlex.join(["python", "benchmarks/installation.py", *sys.argv[1:]]),
            "python": platform.python_version(),
            "files": {path.suffix.lstrip("."): path.stat().st_size for path in built},
            "environments": [install(Path(folder), wheel, extra) for extra in extras],
        }
    write_json(args.json, result)


if __name__ == "__main__":
    main()
