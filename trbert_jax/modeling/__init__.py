"""Former name of `trbert_jax.model`, for imports of `trbert_jax.modeling.tokenizer_files`."""
