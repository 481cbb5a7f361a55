"""Files of weights: `model.safetensors` and `pytorch_model.bin`, in one piece or several.

Everything is read as float32, whatever precision it was stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trbert_jax.errors import UserError
from trbert_jax.io import read_json

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a checkpoint's weights.

    Args:
      path: a directory with `model.safetensors` or `pytorch_model.bin` (or the `.index.json` of a
        checkpoint in several files, or one `.safetensors` file of any name); or such a file itself.

    Returns:
      float32 arrays by their name on disk. Stored constants that are not floating point (such as
      `position_ids`) are left out.

    Raises:
      UserError: no weights there, a damaged or truncated file, a precision that is not a float.
    """
    path = Path(path)
    weights: dict[str, np.ndarray] = {}
    for file in [path] if path.is_file() else _weight_files(path):
        weights.update(_read_torch(file) if file.suffix == ".bin" else _read_safetensors(file))
    broken = sorted(name for name, array in weights.items() if not np.isfinite(array).all())
    if broken:
        raise UserError(
            f"{path}: weights that are not finite numbers: {', '.join(broken)}; "
            "the training that wrote them diverged, or the file is damaged"
        )
    return weights


def write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Writes arrays as one float32 safetensors file that PyTorch reads too."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    save_file(arrays, path, metadata={"format": "pt"})


def _weight_files(directory: Path) -> list[Path]:
    for name in (SAFETENSORS, TORCH):
        if (directory / name).is_file():
            return [directory / name]
        if (directory / (name + INDEX_SUFFIX)).is_file():
            return _pieces(directory / (name + INDEX_SUFFIX))
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    raise UserError(
        f"{directory}: no weights here; expected {SAFETENSORS} or {TORCH} "
        "(an unfinished download or an interrupted run leaves a folder like this)"
    )


def _pieces(index: Path) -> list[Path]:
    """The files an index names; all of them have to be there."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index}: expected an object with "weight_map", from names to files') from error
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise UserError(f"{index}: files that it names are not there: {', '.join(lacking)}")
    return files


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    weights = {}
    try:
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (the handle is not iterable)
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _FLOATS:
                    weights[name] = tensors.get_tensor(name).astype(np.float32)
                elif name.endswith((".weight", ".bias")):
                    raise UserError(
                        f"{file}: {name} is stored as {dtype}; expected one of {', '.join(_FLOATS)} "
                        "(quantized checkpoints cannot be read)"
                    )
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except SafetensorError as error:
        raise UserError(
            f"{file}: truncated or damaged ({error}); fetch or write the checkpoint again"
        ) from error
    return weights


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file}: reading a PyTorch file needs PyTorch; install the extra, "
            "`pip install 'trbert_jax[torch]'`, or save the checkpoint as model.safetensors"
        ) from error
    try:
        # Never anything but weights: unpickling more would run code that the file brings.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {
            name: tensor.detach().to(torch.float32).numpy()
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except Exception as error:  # torch raises whatever its unpickler or archive reader stumbled over
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"{file}: truncated, damaged, or holding more than weights ({reason[0]}); "
            "fetch it again, or save the checkpoint as model.safetensors"
        ) from error
