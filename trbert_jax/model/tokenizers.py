"""Read, write and train the tokenizer of a model."""

import codecs
import copy
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.errors import UserError
from trbert_jax.io import read_json, read_text, write_json
from trbert_jax.model.backbones import BERT_TOKENS
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.weight_files import local_directory

logger = logging.getLogger(__name__)

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; importing transformers takes a second

SPECIAL_TOKENS = tuple(BERT_TOKENS.values())
MIN_VOCAB_SIZE = 100
_MAX_CHARACTERS = 1000
_CONTINUES = "##"
_TOKENIZER, _VOCABULARY, _SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
_FILES = "tokenizer.json and tokenizer_config.json, or vocab.txt"
_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_CONVERT = "save a fast one as tokenizer.json"
_LOADING = ("is_local", "local_files_only")
# Switches of BERT's tokenizer -> types that transformers takes.
_SWITCHES: dict[str, Any] = {
    "do_lower_case": bool,
    "tokenize_chinese_chars": bool,
    "strip_accents": (bool, type(None)),
}


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Reads the fast tokenizer of a directory or of a model on the hub, see `find_tokenizer`.

    Raises `UserError` if there is none.
    """
    directory = local_directory(path_or_id)
    if (tokenizer := find_tokenizer(directory)) is None:
        raise UserError(f"{directory}: no tokenizer here; copy the tokenizer's files into it, {_FILES}")
    return tokenizer


def find_tokenizer(directory: Path, special_tokens: Mapping[str, str] = BERT_TOKENS) -> Tokenizer | None:
    """Reads the tokenizer of a local directory as `transformers.AutoTokenizer` does, with the same ids.

    `special_tokens` are those that the files do not name, role -> token. Switches off stored truncation and
    padding, which would cut texts silently. Warns if tokenizer.json by itself reads texts otherwise.

    Returns None if there is neither tokenizer.json nor vocab.txt. Raises `UserError` for files that are
    damaged or contradict each other, a tokenizer without fast version, one that lacks a special token or one
    that does not put [CLS] first and [SEP] last.
    """
    from tokenizers import processors

    if not any((directory / name).is_file() for name in (_TOKENIZER, _VOCABULARY)):
        return None
    settings, model = (_read_object(directory / name) for name in (_SETTINGS, "config.json"))
    tokenizer = _read_as_transformers(directory, settings, model)
    for role, token in special_tokens.items():
        if getattr(tokenizer, role) is None and token in tokenizer.get_vocab():
            setattr(tokenizer, role, token)
    _check_special_tokens(tokenizer, directory)
    _check_ends(tokenizer, str(directory))
    if not (directory / _TOKENIZER).is_file():
        # The same ids in the form of earlier versions, whose digests of data still hold.
        ends = (
            (getattr(tokenizer, f"{x}_token"), getattr(tokenizer, f"{x}_token_id")) for x in ("sep", "cls")
        )
        tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _read_as_transformers(
    directory: Path, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Tokenizer:
    """Reads a tokenizer; `settings` are those of tokenizer_config.json, `model` those of config.json."""
    transformers = import_transformers()
    whole = (directory / _TOKENIZER).is_file()  # tokenizer.json is the tokenizer itself
    # AutoTokenizer chooses the class by these, and would read the whole config.json for them. A model type
    # that it does not know is one of BERT's; of a folder without one, tokenizer.json is taken as it is.
    known = model.get("model_type") in ("bert", "distilbert") and not (
        "trbert" in model and not (directory / _SETTINGS).is_file()
    )
    config = transformers.BertConfig if known or not whole else transformers.PreTrainedConfig
    options: dict[str, Any] = {"config": config(tokenizer_class=model.get("tokenizer_class"))}
    if not whole and (vocabulary := _without_mark(directory / _VOCABULARY)):
        options["vocab"] = vocabulary
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # of many kinds, the Rust library's are plain Exceptions
        raise UserError(f"{directory}: {_problem(directory, settings, error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{directory}: {type(tokenizer).__name__} has no fast version; {_CONVERT}")
    files = tokenizer.vocab_files_names.values()
    if not whole and not any((directory / name).is_file() for name in files):
        needed = ", ".join(name for name in files if name != _TOKENIZER)
        raise UserError(
            f"{directory}: tokenizer_class is {type(tokenizer).__name__}, which reads {needed}; copy that or "
            "tokenizer.json into the folder"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    kind = type(tokenizer).__name__
    # A class of its own takes the vocabulary from tokenizer.json, and the rest from tokenizer_config.json.
    if whole and kind != "TokenizersBackend" and (parts := _different_parts(directory / _TOKENIZER, backend)):
        logger.warning("%s: read as transformers reads it, by %s and %s; %s says otherwise: %s",
                       directory, kind, _SETTINGS, _TOKENIZER, ", ".join(parts))  # fmt: skip
    return tokenizer


def _problem(directory: Path, settings: Mapping[str, Any], error: Exception) -> str:
    """Says why a tokenizer cannot be read, with the file and the setting if these can be found."""
    for key, allowed in _SWITCHES.items():
        if key in settings and not isinstance(settings[key], allowed):
            return f"{_SETTINGS}: {key} is {json.dumps(settings[key])}; expected true or false"
    for path in (directory / name for name in (_TOKENIZER, _SETTINGS, _SPECIAL, _ADDED)):
        _read_object(path)
        if path.is_file() and path.read_bytes().startswith(codecs.BOM_UTF8):
            return f"{path.name} begins with a byte order mark; save it as UTF-8 without one"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    kind = settings.get("tokenizer_class")
    if kind and not (directory / _TOKENIZER).is_file():
        return (
            f"tokenizer_class is {kind}, which cannot be made of {_VOCABULARY} ({reason}); copy {_TOKENIZER}"
        )
    named = {**_read_object(directory / _SPECIAL), **settings}
    if empty := [key for key, value in named.items() if value is None]:
        return f"transformers cannot read this tokenizer ({reason}); remove what is null: {', '.join(empty)}"
    return f"transformers cannot read this tokenizer ({reason}); expected {_FILES}, of BERT"


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is no such file."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def _without_mark(path: Path) -> dict[str, int] | None:
    """Reads a vocabulary that begins with a byte order mark, which would be part of its first token."""
    text = read_text(path)
    if not path.read_bytes().startswith(codecs.BOM_UTF8):
        return None
    return {line.rstrip(): i for i, line in enumerate(text.removeprefix("\ufeff").rstrip("\n").split("\n"))}


def _different_parts(path: Path, backend: Any) -> list[str]:
    """Names the parts of a tokenizer.json that decide on ids and that the tokenizer read differs in."""
    import tokenizers

    try:
        alone = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # transformers takes only the vocabulary of some
        return []
    ours, theirs = (json.loads(x.to_str()) for x in (alone, backend))
    return [key for key in ("normalizer", "pre_tokenizer", "model") if ours[key] != theirs[key]]


def wrap_tokenizer(
    backend: Any, special_tokens: Mapping[str, str] = BERT_TOKENS, source: str = "tokenizer"
) -> Tokenizer:
    """Makes a `transformers` tokenizer of a `tokenizers.Tokenizer`.

    Switches off truncation and padding, in `backend` itself. `special_tokens` are role -> token. Raises
    `UserError`, which names `source`, if it lacks a special token or does not put [CLS] first and [SEP] last.
    """
    backend.no_truncation()
    backend.no_padding()
    known = {role: token for role, token in special_tokens.items() if backend.token_to_id(token) is not None}
    missing = [special_tokens[role] for role in ("cls_token", "sep_token", "pad_token") if role not in known]
    if missing:
        raise UserError(f"{source}: the tokenizer has no token {', '.join(missing)}, which the model needs")
    tokenizer = import_transformers().PreTrainedTokenizerFast(tokenizer_object=backend, **known)
    _check_ends(tokenizer, source)
    return tokenizer


def copy_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copies a fast tokenizer, without its truncation and padding; they are states of the shared backend."""
    copied = copy.deepcopy(tokenizer)
    _switch(tokenizer, copied.backend_tokenizer)
    return copied


def copy_backend(tokenizer: Tokenizer) -> Any:
    """Like `copy_tokenizer`, but returns the backend alone, a `tokenizers.Tokenizer`."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    _switch(tokenizer, backend)
    return backend


def _switch(tokenizer: Tokenizer, backend: Any) -> None:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens  # decides on ids, and is not copied


def import_transformers() -> Any:
    """Imports `transformers`, without its advice to install PyTorch, which nothing here needs."""
    before = os.environ.get(_ADVICE)
    os.environ[_ADVICE] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[_ADVICE]
        else:
            os.environ[_ADVICE] = before
    return transformers


def _check_special_tokens(tokenizer: Tokenizer, directory: Path) -> None:
    """Raises `UserError` for a special token that the files lack, to which transformers gives a new id."""
    backend = tokenizer.backend_tokenizer
    known = backend.get_vocab(with_added_tokens=False).keys() | _added_tokens(directory)
    needed = {role: getattr(tokenizer, role) for role in ("cls_token", "sep_token", "pad_token")}
    if isinstance(unknown := getattr(backend.model, "unk_token", None), str):
        needed["unk_token"] = unknown
    if missing := [f"{token} ({role})" for role, token in needed.items() if token not in known]:
        raise UserError(f"{directory}: the tokenizer has no token {', '.join(missing)}; the model needs it")


def _added_tokens(directory: Path) -> set[str]:
    """Returns the tokens that a folder's files add to the vocabulary, with their ids."""
    decoder = _read_object(directory / _SETTINGS).get("added_tokens_decoder", {})
    entries = [*decoder.values(), *_read_object(directory / _TOKENIZER).get("added_tokens", ())]
    return {*_read_object(directory / _ADDED), *(entry["content"] for entry in entries)}


def _check_ends(tokenizer: Tokenizer, source: str) -> None:
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.backend_tokenizer.encode("").ids != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        problem = f"does not put {cls} first and {sep} last; give tokenizer.json BERT's post-processor"
        raise UserError(f"{source}: the tokenizer {problem}")


def save_tokenizer(directory: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Writes the tokenizer's files; `transformers.AutoTokenizer` reads them."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    # Some say how it was loaded, or what tokenizer.json says for a class of its own.
    settings = {key: value for key, value in read_json(path).items() if key not in (*_SWITCHES, *_LOADING)}
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
    """Raises `UserError` if the tokenizer can produce ids that the model has no embedding for."""
    token, top = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if top >= config.vocab_size:
        ids = f"ids up to {top} ({token!r}), the model's vocabulary has only {config.vocab_size} entries"
        raise UserError(f"{source}: the tokenizer gives {ids}; they do not belong together")


def train_wordpiece(texts: Sequence[str], vocab_size: int, markers: Sequence[str] = ()) -> Tokenizer:
    """Trains a tokenizer like that of BERT uncased; the same texts always give the same one.

    Its entries, at most `vocab_size`, begin with [PAD], [UNK], [CLS], [SEP], [MASK] and the `markers`, which
    no text is tokenized into, such as BERT's [unused1]. Raises `UserError` for less than 100 entries.
    """
    from tokenizers import trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; expected at least {MIN_VOCAB_SIZE}")
    scratch = _bert_backend({})
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(scratch.normalizer.normalize_str(text))
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(frequent[: min(_MAX_CHARACTERS, vocab_size // 10)])
    # The trainer numbers single characters, and breaks ties by those numbers, in the order of a
    # hash table that differs from run to run. Listed as special tokens they are numbered beforehand.
    listed = [*SPECIAL_TOKENS, *markers, *alphabet, *(_CONTINUES + c for c in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=listed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    scratch.train_from_iterator(texts, trainer, length=len(texts))
    return wrap_tokenizer(_bert_backend(scratch.get_vocab()))


def _bert_backend(vocabulary: dict[str, int]) -> Any:
    """Builds BERT's uncased tokenizer; without a vocabulary, one to train."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=BERT_TOKENS["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if vocabulary:
        sep, cls = ((BERT_TOKENS[key], vocabulary[BERT_TOKENS[key]]) for key in ("sep_token", "cls_token"))
        backend.post_processor = processors.BertProcessing(sep, cls)
        backend.decoder = decoders.WordPiece()
    return backend
