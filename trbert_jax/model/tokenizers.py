"""Read, write and train the tokenizer of a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.errors import UserError
from trbert_jax.io import read_json, read_text, write_json
from trbert_jax.model.backbones import BERT_TOKENS
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.weight_files import local_directory

Tokenizer = Any  # transformers.PreTrainedTokenizerFast; importing transformers takes a second

SPECIAL_TOKENS = tuple(BERT_TOKENS.values())
MIN_VOCAB_SIZE = 100
_MAX_CHARACTERS = 1000
_CONTINUES = "##"


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """Reads the fast tokenizer, a `PreTrainedTokenizerFast`, of a directory or of a model on the hub.

    Switches off stored truncation and padding, which would cut texts silently. Raises `UserError` if there is
    no tokenizer, or one that is damaged or does not put [CLS] first.
    """
    directory = local_directory(path_or_id)
    if (tokenizer := find_tokenizer(directory)) is None:
        raise UserError(f"{directory}: no tokenizer here; copy tokenizer.json or vocab.txt into it")
    return tokenizer


def find_tokenizer(directory: Path, special_tokens: Mapping[str, str] = BERT_TOKENS) -> Tokenizer | None:
    """Like `load_tokenizer` for a local directory, but returns None if there is no tokenizer.

    `special_tokens` are those that the files do not name, role -> token.
    """
    import tokenizers

    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # both are optional
        if (directory / name).is_file():
            values = read_json(directory / name)
            if not isinstance(values, dict):
                raise UserError(f"{directory / name}: expected a JSON object")
            settings.update(values)
    tokens = dict(special_tokens)
    for role in special_tokens:
        entry = settings.get(role)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            tokens[role] = token
    # tokenizer.json is the tokenizer itself; the classes of transformers rebuild it from parts of
    # that file and lose, for one, a normalizer that keeps the case.
    if (file := directory / "tokenizer.json").is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{file}: not a tokenizer ({error}); fetch it again") from error
    elif (file := directory / "vocab.txt").is_file():
        backend = _backend_of_vocabulary(file, settings, tokens)
    else:
        return None
    return wrap_tokenizer(backend, tokens, source=str(directory))


def wrap_tokenizer(
    backend: Any, special_tokens: Mapping[str, str] = BERT_TOKENS, source: str = "tokenizer"
) -> Tokenizer:
    """Makes a `transformers` tokenizer of a `tokenizers.Tokenizer`.

    Switches off truncation and padding, in `backend` itself. `special_tokens` are role -> token. Raises
    `UserError`, which names `source`, if it lacks a special token or does not put [CLS] first and [SEP] last.
    """
    from transformers import PreTrainedTokenizerFast

    backend.no_truncation()
    backend.no_padding()
    known = {role: token for role, token in special_tokens.items() if backend.token_to_id(token) is not None}
    missing = [special_tokens[role] for role in ("cls_token", "sep_token", "pad_token") if role not in known]
    if missing:
        raise UserError(f"{source}: the tokenizer has no token {', '.join(missing)}, which the model needs")
    if backend.encode("").ids != [backend.token_to_id(known[role]) for role in ("cls_token", "sep_token")]:
        problem = f"does not put {known['cls_token']} first and {known['sep_token']} last"
        raise UserError(f"{source}: the tokenizer {problem}; give tokenizer.json BERT's post-processor")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **known)


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
    """Raises `UserError` if the tokenizer can produce ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}"
        raise UserError(f"{source}: the tokenizer has {sizes}; they do not belong together")


def train_wordpiece(texts: Sequence[str], vocab_size: int, markers: Sequence[str] = ()) -> Tokenizer:
    """Trains a tokenizer like that of BERT uncased; the same texts always give the same one.

    Its entries, at most `vocab_size`, begin with [PAD], [UNK], [CLS], [SEP], [MASK] and the `markers`, which
    no text is tokenized into, such as BERT's [unused1]. Raises `UserError` for less than 100 entries.
    """
    from tokenizers import trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; expected at least {MIN_VOCAB_SIZE}")
    scratch = _bert_backend({}, {}, BERT_TOKENS)
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
    return wrap_tokenizer(_bert_backend(scratch.get_vocab(), {}, BERT_TOKENS))


def _backend_of_vocabulary(file: Path, settings: Mapping[str, Any], tokens: Mapping[str, str]) -> Any:
    """Builds BERT's WordPiece from the bare vocabulary, one token a line."""
    vocabulary = {line: i for i, line in enumerate(read_text(file).rstrip("\n").split("\n"))}
    needed = (tokens[role] for role in ("unk_token", "cls_token", "sep_token"))
    missing = ", ".join(token for token in needed if token not in vocabulary)
    if missing:
        raise UserError(f"{file}: no token {missing}; expected a BERT vocabulary, one token a line")
    return _bert_backend(vocabulary, settings, tokens)


def _bert_backend(vocabulary: dict[str, int], settings: Mapping[str, Any], tokens: Mapping[str, str]) -> Any:
    """Builds BERT's tokenizer; without a vocabulary, one to train."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if vocabulary:
        sep, cls = ((tokens[key], vocabulary[tokens[key]]) for key in ("sep_token", "cls_token"))
        backend.post_processor = processors.BertProcessing(sep, cls)
        backend.decoder = decoders.WordPiece()
    return backend
