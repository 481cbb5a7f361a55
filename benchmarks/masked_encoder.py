"""Times one forward pass of the masked, the dense and the Hugging Face encoder.

    python benchmarks/masked_encoder.py --json benchmarks/masked_encoder.json

All run the same random weights and inputs at one padded shape, interleaved; the medians are reported.
Masking saves no time, but must not cost any. PyTorch is skipped if it is not installed.
"""

import argparse
import functools
import importlib.util
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.inference.benchmark import time_runs
from trbert_jax.io import write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import TokenReducingModel, forward, init_params
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.reduction.selection import Rule, keep_probable

# The shape of MiniLM.
CONFIG = ModelConfig(hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536)


def _logits(model: TokenReducingModel, rule: Rule | None, params: Any, batch: Any) -> jax.Array:
    return forward(model, params, batch, rule=rule).logits


def _await(step: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    return step(*arguments).block_until_ready()


def jax_runs(params: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Returns the compiled dense and masked forward passes, which wait for their results."""
    model, batch = TokenReducingModel(CONFIG), {"input_ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}
    runs: dict[str, Callable[[], Any]] = {}
    for name, rule in (("dense", None), ("masked", keep_probable)):
        step = jax.jit(functools.partial(_logits, model, rule))
        runs[name] = functools.partial(_await, step, params, batch)
    return runs


def torch_run(params: Any, ids: np.ndarray, mask: np.ndarray, threads: int) -> Callable[[], Any]:
    """Returns Hugging Face's BERT with the same weights, in inference mode."""
    import torch
    from transformers import BertForSequenceClassification

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder) / "model", CONFIG, params, None, exclude=("selectors",))
        model = BertForSequenceClassification.from_pretrained(Path(folder) / "model").eval()
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}

    def run() -> Any:
        with torch.inference_mode():
            return model(**inputs).logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.tokens)
    ids, mask = rng.integers(1000, 30000, shape, np.int32), np.ones(shape, bool)
    params = jax.device_get(init_params(CONFIG, jax.random.key(0)))
    runs = jax_runs(jax.device_put(params), ids, mask)
    threads = len(os.sched_getaffinity(0))
    if importlib.util.find_spec("torch"):
        runs["huggingface"] = torch_run(params, ids, mask, threads)

    for run in runs.values():
        run()  # compiles, warms up
    seconds = time_runs({name: [run] for name, run in runs.items()}, args.repeats)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    result = {
        "median_seconds": median,
        "ratio_to_dense": {name: value / median["dense"] for name, value in median.items()},
        "batch_size": args.batch_size,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpus": threads,
        "platform": platform.platform(),
    }
    for name, value in median.items():
        print(f"{name:<12} {value:8.3f} s  {value / median['dense']:5.2f} x dense")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
