"""Hugging Face's PyTorch model of the same weights as a benchmark's peer."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.inference.benchmark.runs import PreparedRun
from trbert_jax.inference.benchmark.workload import Workload
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.reduction.flops import EncoderShape, dense_flops

NAME = "huggingface"


def available() -> bool:
    """Whether PyTorch is installed and runs on the kind of device that JAX runs on."""
    if importlib.util.find_spec("torch") is None:
        return False
    if jax.default_backend() == "cpu":
        return True
    import torch

    return jax.default_backend() == "gpu" and bool(torch.cuda.is_available())


def prepare_huggingface(
    config: ModelConfig, params: Params, workload: Workload, batch_size: int, dtype: str
) -> PreparedRun:
    """The dense model in inference mode, every batch padded to its longest text, a thread a core.

    Args:
      config: the model's shape.
      params: its parameters.
      workload: what to run; its actions play no part.
      batch_size: texts of a batch.
      dtype: `float32` or `bfloat16`.
    """
    import torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    model = _load(config, params).to(device, getattr(torch, dtype))
    torch.set_num_threads(num_cores())
    batches = []
    for batch in workload.batches(batch_size, (workload.max_length,)):
        longest = batch["mask"].sum(-1).max()
        batches.append(
            {
                "input_ids": torch.tensor(batch["input_ids"][:, :longest]).long(),
                "attention_mask": torch.tensor(batch["mask"][:, :longest]).long(),
            }
        )

    def run_batch(number: int) -> Any:
        with torch.inference_mode():
            inputs = {key: value.to(model.device) for key, value in batches[number].items()}
            return model(**inputs).logits.float().cpu().numpy()

    logits = np.concatenate([run_batch(number) for number in range(len(batches))])
    widths = np.repeat([batch["input_ids"].shape[1] for batch in batches], batch_size)
    flops = dense_flops(EncoderShape.of(config), widths)
    return PreparedRun(
        NAME, run_batch, len(batches), len(logits), float(flops.mean()), None, None, logits, None
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _load(config: ModelConfig, params: Params) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from trbert_jax.model.pretrained import save_pretrained

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        # Without the selectors, which it has no place for.
        save_pretrained(Path(folder) / "model", config, jax.device_get(params), None, exclude=("selectors",))
        return AutoModelForSequenceClassification.from_pretrained(Path(folder) / "model").eval()
