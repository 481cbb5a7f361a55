"""Measures inference and training on an accelerator, in one command of less than eight minutes.

    python benchmarks/accelerator.py --json benchmarks/accelerator.json

Needs no network, data or trained model: it uses random weights of MiniLM's and BERT-base's size, random
token ids with the lengths of film reviews (203 tokens on average, 256 at most), and random tokens to keep,
98 and 51 on average, as many as a model trained on such reviews keeps.

Checks packed against masked in float32 first: logits, kept tokens and the gradients of a joint step. Then
times, in bfloat16, the variants of a model side by side and the training steps. Skips and reports what does
not fit into --minutes. `--tiny` is a test run for any machine.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import random_actions, random_examples, review_lengths
from training_steps import Setting, make_batches, make_objective, measure

from trbert_jax.inference.benchmark import SIZES, Workload, prepare, time_runs, torch_available
from trbert_jax.inference.benchmark_report import machine, make_records, table
from trbert_jax.inference.engine import CompiledForward
from trbert_jax.io import check_outputs, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params, TokenReducingModel, init_params
from trbert_jax.reduction.flops import known_peak
from trbert_jax.training import step as optimizer

VARIANTS = ("packed", "masked_full", "batch_max", "dense", "dense_full")
SHARES = (98 / 203, 51 / 203)
LOGITS_TOLERANCE, GRADIENTS_TOLERANCE = 1e-5, 1e-4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes, longest text, batch sizes, texts, repeats, stages and training step of a session."""

    sizes: tuple[str, ...] = ("minilm", "bert-base")
    max_length: int = 256
    batch_sizes: tuple[int, ...] = (32, 128, 8, 1)  # most important first, in case time runs out
    num_texts: int = 256
    repeats: int = 5
    stages: tuple[str, ...] = ("finetune", "policy", "joint")  # whose steps to time
    setting: Setting = dataclasses.field(
        default_factory=lambda: Setting(batch_size=16, shares=SHARES, num_batches=2, repeats=5)
    )


TINY = Plan(("tiny",), 64, (4,), 8, 2, ("joint",), Setting(2, 2, SHARES, 1, 2))


def make_workload(config: ModelConfig, num_texts: int) -> Workload:
    """Makes random texts and random tokens to keep."""
    rng = np.random.default_rng(0)
    lengths = review_lengths(num_texts, rng, config.max_length)
    features = random_examples(config, lengths, rng)
    return Workload(features, config.max_length, random_actions(lengths, config.max_length, SHARES, rng))


def check(config: ModelConfig, params: Params, plan: Plan, *, thorough: bool) -> list[dict[str, Any]]:
    """Compares packed with masked in float32, with given kept tokens and, if thorough, with chosen ones."""
    model, given = TokenReducingModel(config), make_workload(config, plan.batch_sizes[0])
    found = [check_logits("logits, kept tokens given", model, params, given)]
    if thorough:
        own = dataclasses.replace(given, actions=None)
        found.append(check_logits("logits, the model's own choice", model, decided(params), own))
        found.append(check_gradients(model, params, plan))
    for line in found:
        print(f"{'ok' if line['ok'] else 'NOT OK':<7} {line['what']}: {line['largest_difference']:.2e}")
    return found


def check_logits(what: str, model: TokenReducingModel, params: Params, workload: Workload) -> dict[str, Any]:
    """Compares logits and kept tokens of one batch."""
    programs, batch_size = CompiledForward(model), len(workload.examples)
    packed = prepare("packed", programs, params, workload, batch_size)
    masked = prepare("masked", programs, params, workload, batch_size)
    difference = float(np.abs(packed.logits - masked.logits).max())
    changed = int(np.sum(packed.keep != masked.keep))
    return {
        "what": what,
        "largest_difference": difference,
        "largest": float(np.abs(masked.logits).max()),
        "kept_tokens": np.sum(masked.keep, axis=(0, 2)).tolist() if masked.keep is not None else None,
        "tokens": int(workload.examples.lengths.sum()),
        "kept_tokens_that_differ": changed,
        "ok": difference <= LOGITS_TOLERANCE and changed == 0,
    }


def check_gradients(model: TokenReducingModel, params: Params, plan: Plan) -> dict[str, Any]:
    """Compares the gradients of a joint step for all parameters."""
    packed, masked = (
        jax.tree.leaves(joint_gradients(model, params, plan, name)) for name in ("packed", "masked")
    )
    largest = max(float(jnp.abs(x).max()) for x in masked)
    difference = max(float(jnp.abs(x - y).max()) for x, y in zip(packed, masked, strict=True))
    return {
        "what": "gradients, joint",
        "largest_difference": difference,
        "largest": largest,
        "ok": difference <= GRADIENTS_TOLERANCE * min(largest, 1.0),
    }


def decided(params: Params) -> Params:
    """Scales the selectors up: new ones give probabilities so close to one half that rounding decides."""
    encoder = dict(params["encoder"])
    for name in encoder:
        if name.startswith("selector_"):
            encoder[name] = jax.tree.map(lambda x: 20 * x, encoder[name])
    return {**params, "encoder": encoder}


def joint_gradients(model: TokenReducingModel, params: Params, plan: Plan, backend: str) -> Params:
    """Returns the gradients of the mean loss of a joint step without dropout, for all parameters."""
    setting = dataclasses.replace(plan.setting, batch_size=min(8, plan.setting.batch_size), num_batches=1)
    (batch,) = make_batches(model.config, setting)
    objective = make_objective("joint", model, backend, setting.num_samples, dropout=False)
    trained, frozen = optimizer.split_params(params, optimizer.trains_all(model.config))

    @jax.jit
    def gradients(trained: Params, frozen: Params, batch: dict[str, Any]) -> Params:
        def loss(trained: Params) -> jax.Array:
            merged = optimizer.merge_params(trained, frozen)
            return objective(merged, batch, jax.random.key(0), jnp.zeros((), jnp.int32)).total.mean()

        return jax.grad(loss)(trained)

    return gradients(trained, frozen, batch)


def inference(config: ModelConfig, params: Params, plan: Plan, batch_size: int) -> list[dict[str, Any]]:
    """Times the variants of a model in bfloat16, side by side, at one batch size."""
    programs = CompiledForward(TokenReducingModel(config, jnp.bfloat16))
    workload = make_workload(config, plan.num_texts)
    others = ("huggingface",) if jax.default_backend() != "cpu" and torch_available() else ()
    prepared = [prepare(name, programs, params, workload, batch_size) for name in (*VARIANTS, *others)]
    seconds = time_runs({run.name: run.calls for run in prepared}, plan.repeats)
    found = make_records(prepared, seconds, batch_size)
    print("\n".join(table(found)), flush=True)
    tokens = float(workload.examples.lengths.mean())
    return [{**record, "dtype": "bfloat16", "tokens": tokens} for record in found]


def training(config: ModelConfig, plan: Plan, stage: str) -> list[dict[str, Any]]:
    """Times the steps of one stage in bfloat16, packed (by jit and by pmap) and masked."""
    return measure(config, plan.setting, stages=[stage], strategies=("jit", "pmap"), dtype=jnp.bfloat16)


class Session:
    """Runs tasks while time remains and collects their records.

    Skips a task if the longest one of its kind so far would exceed the time left, or if the device fails on
    it. Writes the file after each task, so that an interrupted session keeps its records.

    Attributes:
      result: section -> records of all tasks so far, and `left_out`.
    """

    def __init__(self, minutes: float, about: dict[str, Any], path: Path | None) -> None:
        self._start, self._limit, self._path = time.monotonic(), 60 * minutes, path
        self._longest: dict[str, float] = {}
        self.result: dict[str, Any] = {"machine": about, "checks": [], "inference": [], "training": []}
        self.result |= {"left_out": [], "seconds": 0.0, "finished": False}

    def run(self, section: str, size: str, what: str, task: Callable[[], list[dict[str, Any]]]) -> None:
        """Runs a task if time remains, and adds its records to a section."""
        name, start = f"{section}: {size}, {what}", time.monotonic() - self._start
        kind = f"{section}, {what}"  # sizes are in ascending order
        if start + self._longest.get(kind, 0.0) > self._limit:
            self.result["left_out"].append(name)
            print(f"--- {name}: left out, no time", flush=True)
            return
        print(f"--- {name} ({start:.0f} s)", flush=True)
        try:
            found = task()
        except jax.errors.JaxRuntimeError as error:  # usually out of memory
            if section == "checks":
                raise
            reason = str(error).partition("\n")[0]
            self.result["left_out"].append(f"{name}: {reason}")
            print(f"--- {name}: failed, {reason}", flush=True)
            return
        end = time.monotonic() - self._start
        self._longest[kind] = max(self._longest.get(kind, 0.0), end - start)
        self.result[section] += [{"size": size, **record} for record in found]
        self.result["seconds"] = end
        self.save()

    def save(self) -> None:
        """Writes the file, if one was asked for."""
        if self._path:
            write_json(self._path, self.result)


def run_all(plan: Plan, session: Session) -> None:
    """Runs all checks and measurements, most important first."""
    configs = {size: dataclasses.replace(SIZES[size], max_length=plan.max_length) for size in plan.sizes}
    models = {size: init_params(config, jax.random.key(0)) for size, config in configs.items()}
    for size, config in configs.items():
        thorough = size == plan.sizes[0]
        task = functools.partial(check, config, models[size], plan, thorough=thorough)
        session.run("checks", size, "packed against masked", task)
    for batch_size in plan.batch_sizes:
        for size, config in configs.items():
            table = functools.partial(inference, config, models[size], plan, batch_size)
            session.run("inference", size, f"batch size {batch_size}", table)
        if batch_size == plan.batch_sizes[0]:
            for size, config in configs.items():
                for stage in plan.stages:
                    step = functools.partial(training, config, plan, stage)
                    session.run("training", size, stage, step)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no task that would exceed this")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, for the utilization")
    parser.add_argument("--tiny", action="store_true", help="a minute on any machine; times mean nothing")
    args = parser.parse_args()
    if args.json:
        check_outputs([args.json])
    device = jax.devices()[0]
    about = {
        **machine(),
        "devices": len(jax.devices()),
        "runtime": device.client.platform_version,
        "device_memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "peak_tflops": args.peak_tflops or known_peak(device.device_kind),
    }
    session = Session(args.minutes, about, args.json)
    run_all(TINY if args.tiny else Plan(), session)
    result = session.result
    for record in (*result["inference"], *result["training"]):
        used = record.get("model_flops_per_second", record.get("flops_per_second"))
        peak = about["peak_tflops"]
        record["flop_utilization"] = used / peak / 1e12 / record.get("devices", 1) if peak else None
    about["device_peak_memory_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    result["finished"] = True
    session.save()
    for record in result["training"]:
        if record["flop_utilization"] is not None:
            share = 100 * record["flop_utilization"]
            what = " ".join(record[key] for key in ("size", "stage", "backend", "strategy"))
            print(f"{what}: {share:.1f} % of the peak")
    failed = [f"{line['size']}, {line['what']}" for line in result["checks"] if not line["ok"]]
    print(f"{result['seconds']:.0f} s; checks: {'NOT OK: ' + '; '.join(failed) if failed else 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
