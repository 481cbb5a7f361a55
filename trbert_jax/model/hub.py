"""From what a user calls a model, a directory or the name of one on the Hugging Face hub, to a directory."""

from __future__ import annotations

import re
from pathlib import Path

from trbert_jax.errors import UserError
from trbert_jax.model.weight_files import INDEX_SUFFIX, SAFETENSORS, TORCH

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
_SAFETENSORS_PATTERNS = (
    "config.json",
    *_TOKENIZER_FILES,
    SAFETENSORS,
    SAFETENSORS + INDEX_SUFFIX,
    "model-*.safetensors",
)
_TORCH_PATTERNS = (TORCH, TORCH + INDEX_SUFFIX, "pytorch_model-*.bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def local_directory(path_or_id: str | Path) -> Path:
    """The directory of a model: itself, or the cached download of a model on the hub.

    Only configuration, tokenizer and weights are downloaded, once, to the cache that all Hugging
    Face tools share; a model in that cache needs no network.

    Raises:
      UserError: no such directory, no such model, or the hub cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; expected a model's directory")
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name}: no such directory; expected a model's directory or the name of one on the hub"
        )
    directory = _download(name, _SAFETENSORS_PATTERNS)
    if not any(directory.glob("model*.safetensors*")):
        directory = _download(name, _TORCH_PATTERNS)
    return directory


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{name}: no such directory, and no model of that name on the Hugging Face hub "
            "(a private or gated one needs `hf auth login`)"
        ) from error
    except OSError as error:  # LocalEntryNotFoundError, HTTP and connection errors
        raise UserError(
            f"{name}: no such directory, and the Hugging Face hub could not be reached "
            f"({str(error).splitlines()[0]}). Without a network, download the model elsewhere "
            f"(`hf download {name} --local-dir DIR`), copy the directory here and give its path instead"
        ) from error
