"""Times training steps of finetune, policy and joint, packed against masked.

    python benchmarks/training_steps.py --json benchmarks/training_steps.json

Uses random weights, texts with the lengths of film reviews, and the default dropout of each stage. The K
samples of an example keep given random tokens, as many as --share sets, so that both backends do the same
work. If PyTorch is installed, Hugging Face's step of finetune is timed too, on batches padded to the longest
text. Runs are interleaved; the medians are reported.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import random_actions, random_examples, review_lengths

from trbert_jax.config import FinetuneConfig, JointConfig, PolicyConfig, TrainingConfig
from trbert_jax.inference.benchmark import SIZES, memory_bytes, time_runs, torch_available
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.io import check_outputs, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch, Params, TokenReducingModel, init_params
from trbert_jax.model.packed import BACKENDS
from trbert_jax.parallel import make_mesh
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction.flops import EncoderShape, dense_flops, reduced_flops
from trbert_jax.tasks.examples import pad_batch
from trbert_jax.training import objectives
from trbert_jax.training import step as optimizer
from trbert_jax.training import step as steps
from trbert_jax.training.step import ObjectiveFn, init_state

DEFAULTS: dict[str, TrainingConfig] = {
    "finetune": FinetuneConfig(),
    "policy": PolicyConfig(),
    "joint": JointConfig(),
}
TRAINS = {
    "finetune": optimizer.trains_dense,
    "policy": optimizer.trains_selectors,
    "joint": optimizer.trains_all,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Work of a step.

    Attributes:
      batch_size: examples of a step, B.
      num_samples: selections of an example, K.
      shares: share of an example's tokens that each point of reduction keeps.
      num_batches: number of batches.
      repeats: timings of each batch.
    """

    batch_size: int = 8
    num_samples: int = 8
    shares: tuple[float, ...] = (0.3, 0.3)
    num_batches: int = 4
    repeats: int = 3


def make_batches(config: ModelConfig, setting: Setting) -> list[dict[str, np.ndarray]]:
    """Makes batches with all inputs of a stage, and `actions` bool [K * B, stages, S]."""
    rng = np.random.default_rng(0)
    lengths = review_lengths(setting.num_batches * setting.batch_size, rng, config.max_length)
    features = random_examples(config, lengths, rng)
    batches = []
    for index in np.split(np.arange(len(features)), setting.num_batches):
        batch = pad_batch(features, index, setting.batch_size, config.max_length)
        copies = np.tile(lengths[index], setting.num_samples)
        batch["actions"] = random_actions(copies, config.max_length, setting.shares, rng)
        logits = rng.normal(size=(setting.batch_size, config.num_labels))
        batch["teacher_logits"] = logits.astype(np.float32)
        batches.append(batch)
    return batches


def make_objective(
    stage: str, model: TokenReducingModel, backend: str, num_samples: int, *, dropout: bool
) -> ObjectiveFn:
    """Returns the objective of a stage with the selections `batch["actions"]` instead of sampled ones."""
    execute, alpha = BACKENDS[backend], PolicyConfig().alpha

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        dropout_rng = rng if dropout else None
        if stage == "finetune":
            return objectives.dense_objective(model, params, batch, dropout_rng=dropout_rng, execute=execute)
        read = {key: value for key, value in batch.items() if key != "teacher_logits" or stage == "joint"}
        samples = objectives.sample_policy(
            model,
            params,
            read,
            rule=tokens.replay(jnp.swapaxes(batch["actions"], 0, 1)),
            num_samples=num_samples,
            alpha=alpha,
            max_length=model.config.max_length,
            dropout_rng=dropout_rng,
            execute=execute,
        )
        make = objectives.policy_objective if stage == "policy" else objectives.joint_objective
        return make(batch, samples)

    return objective


def model_flops(
    stage: str, config: ModelConfig, batches: Sequence[dict[str, np.ndarray]], num_samples: int
) -> float:
    """Returns the FLOPs that the method needs for a step, without padding and recomputation.

    A backward pass counts as two forward passes. The layers before the first point of reduction count once
    for the K samples; `policy` runs the encoder forward only.
    """
    shape, total = EncoderShape.of(config), 0.0
    for batch in batches:
        lengths = batch["mask"].sum(-1)
        if stage == "finetune":
            total += 3 * float(dense_flops(shape, lengths).sum())
            continue
        kept = batch["actions"].sum(-1)
        every = reduced_flops(shape, np.tile(lengths, num_samples), kept).sum()
        first = 2 * shape.segments[0] * shape.layer_macs(lengths).sum()
        total += (1 if stage == "policy" else 3) * float(every - (num_samples - 1) * first)
    return total / len(batches)


class Step:
    """A compiled training step and its state, which each call advances."""

    def __init__(
        self,
        stage: str,
        model: TokenReducingModel,
        backend: str,
        params: Params,
        batches: Sequence[dict[str, np.ndarray]],
        num_samples: int,
        strategy: str = "jit",
    ) -> None:
        # pmap runs on all devices; jit on all that the batch can be divided over, or on one.
        rows = len(batches[0]["input_ids"])
        shared = rows % jax.device_count() == 0
        layout = make_mesh(strategy) if shared else make_mesh(strategy, devices=jax.devices()[:1])
        trained, frozen = optimizer.split_params(params, TRAINS[stage](model.config))
        adamw = optimizer.adamw(optimizer.linear_schedule(3e-5, 1000, 0), model.config)
        # Copies: the step donates its state.
        state = init_state(jax.tree.map(jnp.copy, trained), adamw)
        self._state, self._frozen = steps.place(state, layout), steps.place(frozen, layout)
        rng = jax.random.key(0)
        self._rng = rng if strategy == "pmap" else layout.replicate(rng)
        # [accumulation steps, B, ...], on the device: loading is not measured.
        placed = [steps.place_batches({k: v[None] for k, v in b.items()}, layout) for b in batches]
        self._batches = [jax.device_put(b) if layout.is_single and strategy == "jit" else b for b in placed]
        dropout = DEFAULTS[stage].dropout
        objective = make_objective(stage, model, backend, num_samples, dropout=dropout)
        step = steps.update_step(objective, adamw, layout)
        start = time.perf_counter()
        self._step = step.lower(self._state, self._frozen, self._batches[0], self._rng).compile()
        self.compile_seconds = time.perf_counter() - start
        self.memory_bytes = memory_bytes(self._step)
        self.devices = layout.num_devices

    def run(self) -> dict[str, Any]:
        """Runs a step on each batch; returns the metrics of the last."""
        metrics: dict[str, Any] = {}
        for batch in self._batches:
            self._state, metrics = self._step(self._state, self._frozen, batch, self._rng)
        return jax.block_until_ready(metrics)


class HuggingFaceStep:
    """The same step of finetune in PyTorch, with the model of transformers."""

    compile_seconds, memory_bytes, devices = 0.0, None, 1

    def __init__(self, config: ModelConfig, batches: Sequence[dict[str, np.ndarray]]) -> None:
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.intermediate_size,
        }
        self._model = BertForSequenceClassification(BertConfig(**sizes, num_labels=config.num_labels)).train()
        self._adamw = torch.optim.AdamW(self._model.parameters(), lr=3e-5, weight_decay=0.01)
        self._batches = []
        for batch in batches:
            longest = int(batch["mask"].sum(-1).max())
            names = {"input_ids": "input_ids", "mask": "attention_mask"}
            arrays = {names[x]: torch.tensor(batch[x][:, :longest].astype(np.int64)) for x in names}
            self._batches.append({**arrays, "labels": torch.tensor(batch["labels"].astype(np.int64))})

    def run(self) -> dict[str, Any]:
        """Runs a step on each batch; returns the loss of the last."""
        loss = 0.0
        for batch in self._batches:
            output = self._model(**batch).loss
            output.backward()
            self._adamw.step()
            self._adamw.zero_grad()
            loss = output.item()
        return {"loss": loss}


def measure(
    config: ModelConfig,
    setting: Setting,
    *,
    stages: Sequence[str] = tuple(DEFAULTS),
    backends: Sequence[str] = tuple(BACKENDS),
    strategies: Sequence[str] = ("jit",),
    dtype: Any = jnp.float32,
) -> list[dict[str, Any]]:
    """Returns one record for each stage, backend and strategy.

    `faster` is the ratio to the masked step of strategy jit, if that was timed. The other strategies are
    timed packed only.
    """
    model, batches = TokenReducingModel(config, dtype), make_batches(config, setting)
    params = init_params(config, jax.random.key(0))
    records = []
    for stage in stages:
        ways = [(name, "jit") for name in backends]
        ways += [("packed", strategy) for strategy in strategies if strategy != "jit"]
        timed: dict[tuple[str, str], Any] = {
            way: Step(stage, model, way[0], params, batches, setting.num_samples, way[1]) for way in ways
        }
        if stage == "finetune" and torch_available() and jax.default_backend() == "cpu":
            timed["huggingface", "eager"] = HuggingFaceStep(config, batches)
        losses = {way: float(np.ravel(step.run()["loss"])[0]) for way, step in timed.items()}
        seconds = time_runs({way: [step.run] for way, step in timed.items()}, setting.repeats)
        median = {way: float(np.median(times)) / len(batches) for way, times in seconds.items()}
        masked = median.get(("masked", "jit"))
        flops = model_flops(stage, config, batches, setting.num_samples)
        for way, step in timed.items():
            records.append(
                {
                    "stage": stage,
                    "backend": way[0],
                    "strategy": way[1],
                    "devices": step.devices,
                    "examples_per_second": setting.batch_size / median[way],
                    "seconds_per_step": median[way],
                    "faster": masked / median[way] if masked else None,
                    "model_flops_per_step": flops,
                    "model_flops_per_second": flops / median[way],
                    "compile_seconds": step.compile_seconds,
                    "peak_memory_bytes": step.memory_bytes,
                    "loss": losses[way],
                    "dropout": DEFAULTS[stage].dropout,
                    "kept": np.mean([b["actions"].sum(-1).mean(0) for b in batches], axis=0).tolist(),
                    "tokens": float(np.mean([b["mask"].sum(-1).mean() for b in batches])),
                    "max_length": config.max_length,
                    "hidden_size": config.hidden_size,
                    "num_layers": config.num_layers,
                    "dtype": jnp.dtype(dtype).name,
                    **dataclasses.asdict(setting),
                }
            )
            print(line_of(records[-1]), flush=True)
    return records


def line_of(record: dict[str, Any]) -> str:
    """Formats a record as a line of text."""
    faster = "" if record["faster"] is None else f"  {record['faster']:5.2f} x masked"
    return (
        f"{record['stage']:<9} {record['backend']:<11} {record['strategy']:<5} "
        f"{record['examples_per_second']:8.2f} examples/s{faster}"
        f"  compiled in {record['compile_seconds']:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--size", choices=tuple(SIZES), default="minilm")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.3, help="share of the tokens to keep (default 0.3)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", default=",".join(DEFAULTS), help="default all three")
    args = parser.parse_args()
    if args.json:
        check_outputs([args.json])
    config = dataclasses.replace(SIZES[args.size], max_length=args.max_length)
    setting = Setting(batch_size=args.batch_size, shares=(args.share, args.share), repeats=args.repeats)
    records = measure(config, setting, stages=args.stages.split(","))
    if args.json:
        write_json(args.json, {"steps": records, "machine": machine()})


if __name__ == "__main__":
    main()
