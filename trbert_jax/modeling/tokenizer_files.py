"""Former name of `trbert_jax.model.tokenizers`."""

from trbert_jax.model.tokenizers import find_tokenizer, load_tokenizer, save_tokenizer, wrap_tokenizer

__all__ = ["find_tokenizer", "load_tokenizer", "save_tokenizer", "wrap_tokenizer"]
