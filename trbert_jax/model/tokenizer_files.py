"""Reading and writing the tokenizer that belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trbert_jax.errors import UserError
from trbert_jax.io import read_json, read_text, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.hub import local_directory

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; importing transformers takes a second

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Reads the fast tokenizer of a directory or of a model on the hub.

    Truncation and padding that were stored with it are switched off: they would cut texts behind
    the caller's back.

    Returns:
      A `transformers.PreTrainedTokenizerFast`.

    Raises:
      UserError: no tokenizer there, a damaged one, or one that does not put [CLS] first.
    """
    directory = local_directory(path_or_id)
    tokenizer = find_tokenizer(directory)
    if tokenizer is None:
        raise UserError(
            f"{directory}: no tokenizer here; expected tokenizer.json or vocab.txt. "
            "Copy them from the model this one was made of"
        )
    return tokenizer


def find_tokenizer(directory: Path) -> Tokenizer | None:
    """Like `load_tokenizer` for a local directory, but None where there is no tokenizer."""
    settings = _settings(directory)
    # tokenizer.json is the tokenizer itself; the classes of transformers rebuild it from parts of
    # that file and lose, for one, a normalizer that keeps the case.
    if (directory / "tokenizer.json").is_file():
        backend = _read_backend(directory / "tokenizer.json")
    elif (directory / "vocab.txt").is_file():
        backend = _build_backend(directory / "vocab.txt", settings)
    else:
        return None
    return wrap_tokenizer(backend, _special_tokens(settings), source=str(directory))


def wrap_tokenizer(
    backend: Any, special_tokens: Mapping[str, str] | None = None, source: str = "tokenizer"
) -> Tokenizer:
    """Makes a `transformers` tokenizer of a `tokenizers.Tokenizer`, without truncation or padding.

    Args:
      backend: changed in place: truncation and padding are switched off.
      special_tokens: those that are not BERT's, `{"cls_token": "<s>"}`.
      source: named in errors.

    Raises:
      UserError: it lacks a special token BERT needs, or does not put [CLS] first and [SEP] last.
    """
    from transformers import PreTrainedTokenizerFast

    backend.no_truncation()
    backend.no_padding()
    names = {**_SPECIAL_TOKENS, **(special_tokens or {})}
    names = {key: token for key, token in names.items() if backend.token_to_id(token) is not None}
    lacking = [_SPECIAL_TOKENS[key] for key in ("cls_token", "sep_token", "pad_token") if key not in names]
    if lacking:
        raise UserError(f"{source}: the tokenizer has no token {', '.join(lacking)}; a BERT vocabulary has")
    ends = [backend.token_to_id(names[key]) for key in ("cls_token", "sep_token")]
    if backend.encode("").ids != ends:
        raise UserError(
            f"{source}: the tokenizer does not put {names['cls_token']} first and {names['sep_token']} last; "
            "give tokenizer.json BERT's post-processor"
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_tokenizer(directory: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Writes the tokenizer's files; `transformers.AutoTokenizer` reads them."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    settings["model_max_length"] = config.max_positions
    # The class's newest name is unknown to transformers 4, this one is known to every version.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)


def read_line_breaks_as_spaces(tokenizer: Tokenizer) -> None:
    """Makes a tokenizer read HTML line breaks (`<br />`, `<br>`) as a space; saved with the tokenizer."""
    from tokenizers import Regex, normalizers

    backend = tokenizer.backend_tokenizer
    replace = normalizers.Replace(Regex(r"<br ?/?>"), " ")
    parts = [replace] if backend.normalizer is None else [replace, backend.normalizer]
    backend.normalizer = normalizers.Sequence(parts)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, source: str) -> None:
    """Raises `UserError` where the tokenizer can produce ids the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{config.vocab_size}; they do not belong together"
        )


def _settings(directory: Path) -> dict[str, Any]:
    """The contents of the two small files beside the vocabulary; both are optional."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            values = read_json(directory / name)
            if not isinstance(values, dict):
                raise UserError(f"{directory / name}: expected a JSON object")
            settings.update(values)
    return settings


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """An entry is the token itself, or a description with the token under "content"."""
    entries = {key: settings.get(key) for key in _SPECIAL_TOKENS}
    tokens = {k: entry.get("content") if isinstance(entry, dict) else entry for k, entry in entries.items()}
    return {key: token for key, token in tokens.items() if isinstance(token, str)}


def _read_backend(file: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(f"{file}: not a tokenizer ({error}); fetch it again") from error


def _build_backend(file: Path, settings: Mapping[str, Any]) -> Any:
    """BERT's WordPiece from the bare vocabulary, one token a line."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = {**_SPECIAL_TOKENS, **_special_tokens(settings)}
    vocabulary = {line: i for i, line in enumerate(read_text(file).rstrip("\n").split("\n"))}
    lacking = [
        tokens[key] for key in ("unk_token", "cls_token", "sep_token") if tokens[key] not in vocabulary
    ]
    if lacking:
        raise UserError(
            f"{file}: no token {', '.join(lacking)}; expected a BERT vocabulary, one token a line"
        )
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sep, cls = ((tokens[key], vocabulary[tokens[key]]) for key in ("sep_token", "cls_token"))
    backend.post_processor = processors.BertProcessing(sep, cls)
    backend.decoder = decoders.WordPiece()
    return backend
