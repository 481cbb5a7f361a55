"""Find, read and write the files of a checkpoint: safetensors, PyTorch's and Flax's, local or on the hub.

Arrays are named as on disk in PyTorch; `weights` translates these names to the parameter tree.
"""

import importlib.util
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trbert_jax.errors import UserError
from trbert_jax.io import find_path, read_json
from trbert_jax.model.engines import ENGINES, FILE

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
FLAX = "flax_model.msgpack"
UNFINISHED = "(an unfinished download or an interrupted run leaves a folder like this)"  # for messages
_INDEX_SUFFIX = ".index.json"
_SAVE_OTHERWISE = f"or save the checkpoint as {SAFETENSORS}"
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
_QUANTIZED = ("I8", "U8", "F8", "F6", "F4")  # beginnings of these

SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# File of the weights -> its pieces, in order of preference.
_FORMS = {SAFETENSORS: "model-*.safetensors", TORCH: "pytorch_model-*.bin", FLAX: "flax_model-*.msgpack"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Entries of a PyTorch file that hold the weights beside the state of a training.
_STATE_DICTS = ("state_dict", "model_state_dict", "model")


def local_directory(path_or_id: str | Path, *, download: bool = True) -> Path:
    """Resolves a local path or a Hugging Face Hub id to a local model directory.

    Downloads a model to the cache that all Hugging Face tools share; a cached one needs no network, nor does
    any without `download`. Raises `UserError` if there is no such directory or model, or the hub cannot be
    reached.
    """
    path = find_path(path_or_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; expected a model's directory")
    if not _HUB_ID.fullmatch(name := str(path_or_id)):
        raise UserError(f"{name}: no such directory; expected a model's directory or its name on the hub")
    for form in _forms():
        patterns = (form, form + _INDEX_SUFFIX, _FORMS[form])
        directory = _download(
            name, (*SMALL_FILES, *patterns), **({} if download else {"local_files_only": True})
        )
        if any(any(directory.glob(pattern)) for pattern in patterns):
            break
    return directory


def _forms() -> list[str]:
    """Returns the files that weights may be in; PyTorch's last if it is not installed."""
    readable = importlib.util.find_spec("torch") is not None
    return sorted(_FORMS, key=lambda name: name == TORCH and not readable)


def _download(name: str, patterns: tuple[str, ...], **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        problem = "no such directory, and no model of that name on the Hugging Face hub"
        raise UserError(f"{name}: {problem} (a private or gated one needs `hf auth login`)") from error
    except OSError as error:  # LocalEntryNotFoundError, HTTP and connection errors
        problem = f"no connection to the Hugging Face hub ({str(error).splitlines()[0]})"
        advice = f"give the path of a directory that `hf download {name} --local-dir DIR` made elsewhere"
        raise UserError(f"{name}: no such directory, and {problem}; without a network, {advice}") from error


def upload(directory: Path, repo_id: str, *, private: bool, token: str | None, message: str) -> str:
    """Uploads a model directory to the Hugging Face hub, and returns its address there.

    Makes the repository unless it exists. Raises `UserError` for a bad name, or if the hub cannot be reached
    or refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not _HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no name on the hub; expected OWNER/NAME")
    client_error: type[Any] = errors.HfHubHTTPError.__bases__[0]  # of its HTTP library, whichever it is
    hub = huggingface_hub.HfApi(token=token, library_name="trbert_jax")
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message)
    except errors.HfHubHTTPError as error:
        problem = str(error).strip().splitlines()[-1]
        raise UserError(f"{repo_id}: the hub refused ({problem}); log in with `hf auth login`") from error
    except (OSError, client_error) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{repo_id}: no connection to the Hugging Face hub ({reason})") from error
    return f"{hub.endpoint}/{repo_id}"


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a checkpoint's weights as float32 arrays by their name on disk, without integer constants.

    `path` is a directory with `model.safetensors`, `pytorch_model.bin` or `flax_model.msgpack` (or the
    `.index.json` of a checkpoint in several files, or one `.safetensors` file of any name), or such a file
    itself. Raises `UserError` for no weights, a damaged or truncated file, or a precision that is no float.
    """
    path = Path(path)
    weights: dict[str, np.ndarray] = {}
    for file in [path] if path.is_file() else _weight_files(path):
        weights.update(_READERS.get(file.suffix, _read_safetensors)(file))
    return weights


def write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Writes arrays as one float32 safetensors file that PyTorch reads too. Raises `OSError`."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
    path.chmod(mode)  # safetensors makes a file for its owner alone


def model_files(directory: Path) -> list[Path]:
    """Returns the files of a model that are read: settings, weights and tokenizer, as far as it has them."""
    small = [directory / name for name in (*SMALL_FILES, "added_tokens.json")]
    try:
        weights = _weight_files(directory)
    except UserError:
        weights = []  # a folder with a tokenizer only
    return [file for file in (*small, *weights) if file.is_file()]


def _weight_files(directory: Path) -> list[Path]:
    for name in _forms():
        if (file := directory / name).is_file():
            return [file]
        if (index := directory / (name + _INDEX_SUFFIX)).is_file():
            return _pieces(index)
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if (directory / "tf_model.h5").is_file():
        problem = "holds TensorFlow's weights, tf_model.h5, alone, which cannot be read"
        raise UserError(f"{directory}: {problem}; save it with PyTorch or Flax as {SAFETENSORS}")
    if (directory / FILE).is_file():
        engines = " or ".join(ENGINES)
        raise UserError(f"{directory}: an exported model, without weights for JAX; take backend {engines}")
    expected = f"{SAFETENSORS}, {TORCH} or {FLAX}"
    raise UserError(f"{directory}: no weights here; expected {expected} {UNFINISHED}")


def _pieces(index: Path) -> list[Path]:
    """Returns the files that an index names; all must exist."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{index}: expected an object with "weight_map", from names to files') from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index}: names files that are missing: {', '.join(missing)}")
    return files


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    weights = {}
    try:
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (the handle is not iterable)
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _FLOATS:
                    weights[name] = tensors.get_tensor(name).astype(np.float32)
                elif dtype.startswith(_QUANTIZED) and name.endswith((".weight", ".bias")):
                    expected = f"one of {', '.join(_FLOATS)} (quantized checkpoints cannot be read)"
                    raise UserError(f"{file}: {name} is stored as {dtype}; expected {expected}")
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or damaged ({error}); fetch or write it again") from error
    return weights


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        advice = f"install it, `pip install 'trbert_jax[torch]'`, {_SAVE_OTHERWISE}"
        raise UserError(f"{file}: reading a PyTorch file needs PyTorch; {advice}") from error
    try:
        # Weights only: unpickling anything else would run code from the file.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        nested = (tensors[key] for key in _STATE_DICTS if isinstance(tensors.get(key), Mapping))
        tensors = next(nested, tensors)
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        return {name: tensor.detach().to(torch.float32).numpy() for name, tensor in floats.items()}
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except Exception as error:  # whatever torch's unpickler or archive reader raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        problem = f"truncated, damaged, or holding more than weights ({reason[0]})"
        raise UserError(f"{file}: {problem}; fetch it again, {_SAVE_OTHERWISE}") from error


def _read_flax(file: Path) -> dict[str, np.ndarray]:
    """Reads the nested dict of a Flax model, in PyTorch's names and shapes."""
    from flax.serialization import msgpack_restore

    try:
        arrays = flatten_dict(msgpack_restore(file.read_bytes()))
        weights = {}
        for (*modules, leaf), array in arrays.items():
            if jnp.issubdtype(array.dtype, jnp.floating):
                name = ".".join((*modules, "bias" if leaf == "bias" else "weight"))
                array = np.asarray(array, np.float32)
                weights[name] = array.T if leaf == "kernel" else array
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except Exception as error:  # whatever msgpack raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{file}: truncated or damaged ({reason[0]}); fetch or write it again") from error
    return weights


_READERS = {".bin": _read_torch, ".msgpack": _read_flax}
