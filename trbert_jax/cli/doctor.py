"""Commands about the installation: `doctor`, `completion`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from trbert_jax import __version__, io
from trbert_jax.cli.arguments import COMMANDS, Arguments, command, make_parser, option
from trbert_jax.errors import UserError
from trbert_jax.io import streams

DISTRIBUTION = "trbert-jax"
# Extra -> what it is for; devices are found by JAX itself.
FEATURES = {
    "torch": "read pytorch_model.bin",
    "datasets": "data.name hf:NAME",
    "onnxruntime": "export, and run exported models",
    "openvino": "run exported models with OpenVINO",
    "serve": "trbert serve",
    "docs": "make docs",
}
HEADS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


@command("doctor")
def _doctor(args: Arguments) -> int:
    """Check the installation.

    Prints versions, devices, folders of caches, and for each optional feature what is missing. Exits with
    code 1 if a package that every command needs is missing, or JAX finds no device.

    Example:
      trbert doctor
    """
    io.enable_compilation_cache()
    found = [*_lines()]
    streams.show(*found)
    return 1 if any("MISSING" in line for line in found) else 0


@command(
    "completion",
    option("shell", "SHELL", str, "bash or zsh", choices=("bash", "zsh")),
)
def _completion(args: Arguments) -> None:
    """Print a script that completes commands and options in a shell.

    Examples:
      trbert completion bash > ~/.local/share/bash-completion/completions/trbert
      trbert completion zsh > ~/.zfunc/_trbert
    """
    import shtab

    parser, commands = make_parser(COMMANDS)
    kinds = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}
    for subparser in commands.values():
        for action in subparser._actions:
            if action.metavar in kinds:
                action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
    streams.show(shtab.complete(parser, args.shell))


def _lines() -> Iterator[str]:
    yield f"{DISTRIBUTION:<18} {__version__}"
    yield f"{'python':<18} {platform.python_version()}, {platform.platform()}"
    for name in HEADS:
        yield f"{name:<18} {_version(name) or 'MISSING'}"
    needed = [name for name, extra in _requirements() if extra is None and name not in HEADS]
    if missing := [name for name in needed if _version(name) is None]:
        yield f"{'other packages':<18} MISSING: {', '.join(missing)}; run: pip install {DISTRIBUTION}"
    yield f"{'devices':<18} {_devices()}"
    yield f"{'programs':<18} {_folder(io.compilation_cache())}"
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    offline = ", offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    yield f"{'hub cache':<18} {_folder(str(Path(hub).expanduser()))}{offline}"
    yield ""
    for extra, purpose in FEATURES.items():
        missing = [name for name, of in _requirements() if of == extra and _version(name) is None]
        advice = (
            f"missing {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "ready"
        )
        yield f"{extra:<18} {purpose}: {advice}"


def _requirements() -> Iterator[tuple[str, str | None]]:
    """Yields the packages that this one declares, and the extra that needs each; None: always needed."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", line)
        if name:
            yield name[0], extra[1] if extra else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    from trbert_jax.parallel import find_devices

    try:
        kinds = [device.device_kind for device in find_devices()]
    except (UserError, ImportError) as error:
        return f"MISSING: {error}"
    cores = len(os.sched_getaffinity(0))
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) + f"; {cores} CPU cores"


def _folder(path: str | None) -> str:
    if path is None:
        return f"not kept; name a writable folder in {io.CACHE_VARIABLE}"
    files = [file for file in Path(path).rglob("*") if file.is_file()] if Path(path).is_dir() else []
    return f"{path}, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB"
