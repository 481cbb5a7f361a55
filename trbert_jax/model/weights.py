"""Find, read and write a checkpoint's weights, and translate their names on disk to the parameter tree.

The names are those of Hugging Face's models and of the published TR-BERT, which adds the selectors as
`bert.encoder.linear_1.{0,1}` (hidden layer) and `bert.encoder.linear_2.{0,1}` (output). A linear layer's
matrix is [out, in] on disk and [in, out] in the tree. Source: docs/method.md, "Checkpoints".
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trbert_jax.errors import UserError
from trbert_jax.io import read_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params

Tree = dict[str, Any]  # nested dict of arrays

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
UNFINISHED = "(an unfinished download or an interrupted run leaves a folder like this)"  # for messages
_INDEX_SUFFIX = ".index.json"
_SAVE_OTHERWISE = "or save the checkpoint as model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names

SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Downloaded from the hub: the PyTorch file only if there is no safetensors file.
_SAFETENSORS_FILES = (*SMALL_FILES, SAFETENSORS, SAFETENSORS + _INDEX_SUFFIX, "model-*.safetensors")
_TORCH_FILES = (TORCH, TORCH + _INDEX_SUFFIX, "pytorch_model-*.bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# Heads of the pre-training tasks, and constants that some versions of the frameworks stored as tensors.
_IGNORED_HEADS = ("cls.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
_IGNORED_TENSORS = ("position_ids", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter."""

    name: str  # on disk
    path: tuple[str, ...]  # keys of the nested parameter tree
    shape: tuple[int, ...]  # on disk
    # `encoder`, `selectors`, `pooler` or a layer of the head. A checkpoint has or lacks a part as a whole.
    part: str

    @property
    def transposed(self) -> bool:
        """Whether the tree holds the transpose of the array on disk."""
        return self.path[-1] == "kernel"


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Lists every parameter of a model, in the order of the computation."""
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    found = []
    for path, module, part in _modules(config):
        for leaf in ("embedding", "kernel", "scale", "bias"):
            if (*path, leaf) in shapes:  # absent: a pooler that the head does not read
                shape = shapes[*path, leaf].shape
                name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
                found.append(Parameter(name, (*path, leaf), shape[::-1] if leaf == "kernel" else shape, part))
    if len(found) != len(shapes):
        raise ValueError(f"a parameter of {config.backbone.name} or its head has no name on disk")
    return tuple(found)


def _modules(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields (path in the tree, name on disk, part) of everything that has parameters."""
    backbone = config.backbone
    prefix, stack = backbone.name, f"{backbone.name}.{backbone.stack}"
    for key, name in backbone.embeddings:
        yield ("encoder", "embeddings", key), f"{prefix}.embeddings.{name}", "encoder"
    for i in range(config.num_layers):
        for key, name in backbone.layer:
            yield ("encoder", f"layer_{i}", key), f"{stack}.layer.{i}.{name}", "encoder"
    for i in range(config.num_selectors):
        yield ("encoder", f"selector_{i}", "hidden"), f"{stack}.linear_1.{i}", "selectors"
        yield ("encoder", f"selector_{i}", "output"), f"{stack}.linear_2.{i}", "selectors"
    yield ("encoder", "pooler"), f"{prefix}.pooler.dense", "pooler"
    for layer in ("pre_classifier", *config.head.layers):
        yield ("head", layer), layer, layer


def from_original_names(weights: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Tree, list[str]]:
    """Builds a parameter tree from a checkpoint's arrays by their name on disk.

    The model's prefix (`bert.`, `distilbert.`) is optional. Ignores pre-training heads, stored constants
    and, for a head that reads all tokens, the layers that read [CLS].

    Returns:
      The tree of all parameters found with the right shape, and the differences, one line each. It is no
      difference if a whole part other than the encoder is missing.
    """
    found: dict[str, np.ndarray] = {}
    differences = []
    expected = {p.name: p for p in parameters(config)}
    of_sentence = (f"{config.backbone.name}.pooler.", "pre_classifier.") if config.reads_all_tokens else ()
    for name, array in weights.items():
        full = original_name(name, config)
        if full is None or full.startswith(of_sentence):
            continue
        if full not in expected or full in found:
            differences.append(f"{name}: not a parameter of this model")
        else:
            found[full] = array

    tree = {}
    present = {"encoder", *(expected[name].part for name in found)}
    for p in expected.values():
        stored = found.get(p.name)
        if stored is None:
            if p.part in present:
                differences.append(f"{p.name} {list(p.shape)}: missing")
        elif stored.shape != p.shape:
            differences.append(f"{p.name}: {list(stored.shape)} in the checkpoint, {list(p.shape)} expected")
        else:
            tree[p.path] = np.ascontiguousarray(stored.T) if p.transposed else stored
    return unflatten_dict(tree), differences


def to_original_names(tree: Tree, config: ModelConfig) -> dict[str, Any]:
    """Inverts `from_original_names`: returns the arrays of the tree by their name on disk."""
    arrays = flatten_dict(tree)
    known = (p for p in parameters(config) if p.path in arrays)
    return {p.name: arrays[p.path].T if p.transposed else arrays[p.path] for p in known}


def original_name(name: str, config: ModelConfig) -> str | None:
    """Returns the full name of a tensor on disk, prefix included; None for one that is ignored."""
    if name.startswith(_IGNORED_HEADS) or name.rpartition(".")[2] in _IGNORED_TENSORS:
        return None
    # The first TensorFlow checkpoints call LayerNorm's parameters gamma and beta.
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    backbone = config.backbone
    inside = name.startswith(("embeddings.", f"{backbone.stack}.", "pooler."))
    return f"{backbone.name}.{name}" if inside else name


def local_directory(path_or_id: str | Path) -> Path:
    """Resolves a local path or a Hugging Face Hub id to a local model directory.

    Downloads a model to the cache that all Hugging Face tools share; a cached one needs no network. Raises
    `UserError` if there is no such directory or model, or the hub cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; expected a model's directory")
    if not _HUB_ID.fullmatch(name := str(path_or_id)):
        raise UserError(f"{name}: no such directory; expected a model's directory or its name on the hub")
    directory = _download(name, _SAFETENSORS_FILES)
    if not any(directory.glob("model*.safetensors*")):
        directory = _download(name, _TORCH_FILES)
    return directory


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        problem = "no such directory, and no model of that name on the Hugging Face hub"
        raise UserError(f"{name}: {problem} (a private or gated one needs `hf auth login`)") from error
    except OSError as error:  # LocalEntryNotFoundError, HTTP and connection errors
        problem = f"no connection to the Hugging Face hub ({str(error).splitlines()[0]})"
        advice = f"give the path of a directory that `hf download {name} --local-dir DIR` made elsewhere"
        raise UserError(f"{name}: no such directory, and {problem}; without a network, {advice}") from error


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a checkpoint's weights as float32 arrays by their name on disk, without integer constants.

    `path` is a directory with `model.safetensors` or `pytorch_model.bin` (or the `.index.json` of a
    checkpoint in several files, or one `.safetensors` file of any name), or such a file itself. Raises
    `UserError` for no weights, a damaged or truncated file, a precision that is no float, NaN or infinity.
    """
    path = Path(path)
    weights: dict[str, np.ndarray] = {}
    for file in [path] if path.is_file() else _weight_files(path):
        weights.update(_read_torch(file) if file.suffix == ".bin" else _read_safetensors(file))
    bad = sorted(name for name, array in weights.items() if not np.isfinite(array).all())
    if bad:
        causes = "the training that wrote them diverged, or the file is damaged"
        raise UserError(f"{path}: weights that are not finite numbers: {', '.join(bad)}; {causes}")
    return weights


def write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Writes arrays as one float32 safetensors file that PyTorch reads too."""
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    save_file(arrays, path, metadata={"format": "pt"})


def _weight_files(directory: Path) -> list[Path]:
    for name in (SAFETENSORS, TORCH):
        if (file := directory / name).is_file():
            return [file]
        if (index := directory / (name + _INDEX_SUFFIX)).is_file():
            return _pieces(index)
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    raise UserError(f"{directory}: no weights here; expected {SAFETENSORS} or {TORCH} {UNFINISHED}")


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
                elif name.endswith((".weight", ".bias")):
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
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        return {name: tensor.detach().to(torch.float32).numpy() for name, tensor in floats.items()}
    except PermissionError as error:
        raise UserError(f"{file}: no permission to read it") from error
    except Exception as error:  # whatever torch's unpickler or archive reader raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        problem = f"truncated, damaged, or holding more than weights ({reason[0]})"
        raise UserError(f"{file}: {problem}; fetch it again, {_SAVE_OTHERWISE}") from error
