"""Says what limits a reducing model: its selection, its encoder, or the signal its selectors learn from.

    python benchmarks/diagnose.py --dense work/imdb/finetune/model --model work/imdb/model \
        --data dev.jsonl --speedups 2.5,3,4 --json diagnose.json

Runs the dense and the reducing encoder with the tokens that several selections keep, as many of each text as
the model keeps. Compares with the dense model's answers (KL divergence, flips), which needs no labels;
labels give the accuracy beside it. For models that label texts.
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from trbert_jax.datasets import BadRecords
from trbert_jax.inference.calibrate import copying
from trbert_jax.inference.copies import judging_logits
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import read_examples, summarize
from trbert_jax.inference.frontier import best, compare, find_frontier
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import write_json
from trbert_jax.model.model import Batch, Params, TokenReducingModel
from trbert_jax.model.packed import packed_forward
from trbert_jax.reduction.selection import random_key
from trbert_jax.tasks.examples import Examples, batch_rows, length_batches, pad_batch, width_buckets
from trbert_jax.training import objectives

SAMPLES = 4  # runs with sampled tokens
BINS = 10  # of the histograms of keep probabilities


def cls_attention(model: TokenReducingModel, params: Params, batch: Batch) -> jax.Array:
    """Returns the attention of [CLS] in the layer before each point, [B, stages, S], a mean over heads."""
    config, mask = model.config, batch["mask"]

    def attention(module: TokenReducingModel) -> jax.Array:
        encoder, found = module.encoder, []
        tokens = encoder.embed(batch["input_ids"], mask, batch.get("token_type_ids"))
        for layer in range(config.reduction_layers[-1]):
            if layer + 1 in config.reduction_layers:
                query, key, _ = encoder.layer[layer].attention_inputs(tokens.states)
                heads = (*mask.shape, config.num_heads, -1)
                scores = jnp.einsum("bhd,bshd->bhs", query.reshape(heads)[:, 0], key.reshape(heads))
                scores = jnp.where(mask[:, None], scores, -jnp.inf)
                found.append(jax.nn.softmax(scores).mean(1))
            tokens = encoder.run_layers(tokens, [layer])
        return jnp.stack(found, 1)

    return model.apply({"params": params}, method=attention)


def token_scores(
    model: TokenReducingModel, params: Params, examples: Examples, kind: str, size: int
) -> np.ndarray:
    """Scores all tokens by the dense model and its own answers, float32 [R, stages, max_length]."""

    @jax.jit
    def scores(params: Params, batch: Batch) -> jax.Array:
        if kind == "attention":
            return cls_attention(model, params, batch)
        if kind == "residual":
            logits = packed_forward(model, params, batch, rule=None).logits
            batch = {**batch, "labels": logits.argmax(-1)}
        return objectives.SCORES[kind](model, params, batch)[0][:, : model.config.num_reductions]

    shape = (examples.num_rows, model.config.num_reductions, model.config.max_length)
    found = np.zeros(shape, np.float32)
    for index, width in length_batches(examples, size, width_buckets(model.config.max_length)):
        values = np.asarray(scores(params, pad_batch(examples, index, size, width)))
        rows = batch_rows(examples, index, size)
        found[rows[rows >= 0], :, :width] = values[rows >= 0]
    return found


def described(outputs: Outputs, dense: Outputs, config: Any) -> dict[str, Any]:
    """Returns the numbers of one run."""
    result = summarize(outputs, config, {"accuracy": outputs.accuracy})
    divergence, flips = compare(dense, outputs)
    names: tuple[str, ...] = ("accuracy", "flops_speedup", "kept")
    found = {name: result[name] for name in names if name in result}
    return {**found, "divergence": divergence, "flips": flips}


def selections(
    dense: TRBert, model: TRBert, examples: Examples, reference: Outputs, speedups: list[float], size: int
) -> list[dict[str, Any]]:
    """Runs both encoders with all selections, at the model's own counts and at those of some speeds."""
    points: list[Any] = [("0.5", 0.5)]
    engine = model.engine(size)
    if speedups:
        arguments = (model.params, examples, model.task, reference, speedups)
        points += [(f"{p.target:g}x", p.thresholds) for p in best(find_frontier(copying(engine), *arguments))]
    oracles = ("residual", "gate", "attention")
    scores = {
        kind: token_scores(dense.engine(size).model, dense.params, examples, kind, size) for kind in oracles
    }
    width, records = model.config.max_length, []
    for name, threshold in points:
        learned = engine.run(model.params, examples, threshold=threshold)
        kept = learned.kept_masks(width)
        scores["learned"] = kept.astype(np.float32)
        runs: dict[str, Any] = {kind: {"rule": "scores", "scores": x} for kind, x in scores.items()}
        runs |= {rule: {"rule": rule} for rule in ("random", "first_k")}
        for encoder, owner in (("dense", dense), ("reducing", model)):
            for kind, options in runs.items():
                print(f"{name}: {kind} tokens, {encoder} encoder", file=sys.stderr)
                outputs = owner.engine(size).run(owner.params, examples, num_kept=learned.num_kept, **options)
                record = described(outputs, reference, owner.config)
                both = (outputs.kept_masks(width) & kept)[:, :, 1:].sum((0, 2))
                recall = both / np.maximum(kept[:, :, 1:].sum((0, 2)), 1)
                about = {"threshold": threshold, "encoder": encoder, "selection": kind}
                records.append({"point": name, **about, **record, "recall": recall.tolist()})
    return records


def matched(judged: np.ndarray, wanted: float) -> float:
    """Returns the logit from which a row keeps `wanted` tokens in the mean; see `judging_logits`."""
    values = np.sort(judged[np.isfinite(judged)])[::-1]
    number = round(wanted * len(judged) - np.isposinf(judged).sum())
    return float(values[int(np.clip(number, 1, len(values))) - 1])


def sampling(model: TRBert, examples: Examples, reference: Outputs, size: int) -> dict[str, Any]:
    """Compares sampled selections with thresholds that keep as many; describes the keep probabilities."""
    engine, stages = model.engine(size), model.config.num_reductions
    options: Any = {"rule": "sample", "num_kept": np.ones((examples.num_rows, stages), np.int32)}  # not read
    runs = [engine.run(model.params, examples, seed=seed, **options) for seed in range(SAMPLES)]
    records = [described(outputs, reference, model.config) for outputs in runs]
    sampled = {key: np.mean([record[key] for record in records], 0).tolist() for key in records[0]}
    copies, logits = copying(engine), np.full((1, stages), np.inf, np.float32)
    for stage in range(stages):
        judged = judging_logits(copies, model.params, examples, logits, stage, "packed")[0]
        logits[0, stage] = matched(judged, sampled["kept"][stage])
    thresholds = tuple((1 / (1 + np.exp(-logits[0].astype(np.float64)))).tolist())
    outputs = engine.run(model.params, examples, threshold=thresholds)
    result: dict[str, Any] = {"sampled": sampled, "same counts": described(outputs, reference, model.config)}
    result["same counts"]["threshold"] = thresholds
    half, result["keep_probability"] = np.zeros((1, stages), np.float32), []
    for stage in range(stages):
        judged = judging_logits(copies, model.params, examples, half, stage, "packed")[0]
        p = 1 / (1 + np.exp(-judged[np.isfinite(judged)].astype(np.float64)))
        counts, _ = np.histogram(p, np.linspace(0, 1, BINS + 1))
        record = {"histogram": (counts / len(p)).tolist(), "expected": p.sum() / len(judged)}
        record |= {"thresholded": (p >= 0.5).sum() / len(judged)}
        result["keep_probability"].append({**record, "sampled_below": p[p < 0.5].sum() / p.sum()})
    return result


def signal(
    model: TRBert, examples: Examples, reference: Outputs, num_texts: int, seeds: int
) -> dict[str, Any]:
    """Compares estimates of the gradient of the task loss by the selectors, of fixed texts and many samples.

    The loss is distillation from the dense model. Returns for each estimator its signal-to-noise ratio (the
    squared norm of the mean, without the noise's part, over the trace of the covariance), and the cosine of
    one estimate, and of their mean, with the mean of REINFORCE with K = 8 over as many other seeds.
    """
    module, few = model.engine(1).model, examples.take(range(min(num_texts, len(examples))))
    batch = pad_batch(few, np.arange(len(few)), len(few), model.config.max_length)
    batch["teacher_logits"] = reference.logits[: len(few)]

    def loss(params: Params, batch: Batch, key: jax.Array, copies: int, credit: str) -> jax.Array:
        rule = objectives.sampling_rule(key, batch, copies, False)
        options: Any = {"num_samples": copies, "alpha": 0.0, "max_length": model.config.max_length}
        options |= {"credit": credit, "penalty_gradient": "exact", "execute": packed_forward}
        samples = objectives.sample_policy(module, params, batch, rule=rule, **options)
        return objectives.policy_objective(batch, samples).total.mean()

    def estimates(credit: str, copies: int, first: int) -> np.ndarray:
        @jax.jit
        def gradient(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
            alone = functools.partial(loss, batch=batch, key=key, copies=copies, credit=credit)
            found = jax.grad(lambda params: alone(objectives.only_selectors(params)))(params)
            names = [f"selector_{stage}" for stage in range(model.config.num_reductions)]
            return ravel_pytree([found["encoder"][name] for name in names])[0]

        keys = [random_key(first + seed) for seed in range(seeds)]
        return np.stack([np.asarray(gradient(model.params, batch, key), np.float64) for key in keys])

    truth, result = estimates("reward", 8, seeds).mean(0), dict[str, Any]()
    for name, copies in (("reward", 8), ("reward", 2), ("gate", 2), ("secant", 2)):
        print(f"gradients: {name}, K = {copies}", file=sys.stderr)
        found = estimates(name, copies, 0)
        mean, noise = found.mean(0), found.var(0, ddof=1).sum()
        one = np.mean([cosine(estimate, truth) for estimate in found])
        ratio = max(0.0, mean @ mean - noise / seeds) / noise
        result[f"{name}, K={copies}"] = {"snr": ratio, "cosine_of_one": one, "cosine": cosine(mean, truth)}
    return {"texts": len(few), "seeds": seeds, **result}


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the cosine of the angle between two vectors."""
    return float(left @ right / max(np.linalg.norm(left) * np.linalg.norm(right), 1e-30))


def diagnose(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the numbers of all parts that were asked for."""
    dense, model = (TRBert.from_pretrained(x, max_length=args.max_length) for x in (args.dense, args.model))
    examples = read_examples(model, args.data, BadRecords())
    examples = examples.take(range(len(examples))[: args.max_texts])
    engine: InferenceEngine = dense.engine(args.batch_size)
    reference = engine.run(dense.params, examples, rule="dense")
    whole = model.engine(args.batch_size).run(model.params, examples, rule="dense")
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/diagnose.py", *sys.argv[1:]]),
        "texts": len(examples),
        "dense": described(reference, reference, dense.config),
        "reducing encoder, all tokens": described(whole, reference, model.config),
    }
    if "selection" in args.parts:
        arguments = (dense, model, examples, reference, args.speedups, args.batch_size)
        result["selection"] = selections(*arguments)
    if "sampling" in args.parts:
        result["sampling"] = sampling(model, examples, reference, args.batch_size)
    if "signal" in args.parts:
        result["signal"] = signal(model, examples, reference, args.signal_texts, args.signal_seeds)
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the part about selections as a Markdown table."""
    lines = ["| point | encoder | tokens | accuracy | flips | KL | speed-up | recall |", "|" + "---|" * 8]
    for r in result.get("selection", []):
        recall = ", ".join(f"{x:.2f}" for x in r["recall"])
        numbers = f"{r['accuracy']:.4f} | {r['flips']:.4f} | {r['divergence']:.4f} | {r['flops_speedup']:.2f}"
        lines.append(f"| {r['point']} | {r['encoder']} | {r['selection']} | {numbers} | {recall} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dense", required=True, metavar="DIR", help="folder of the fine-tuned dense model")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the reducing model")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="labeled texts")
    parser.add_argument("--max-texts", type=int, help="use only the first texts of the file")
    parser.add_argument("--max-length", type=int, help="tokens after which texts are cut")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--speedups", type=lambda x: [*map(float, x.split(","))], default=[], metavar="X,X")
    parts = ("selection", "sampling", "signal")
    parser.add_argument("--parts", type=lambda x: x.split(","), default=parts, help=f"of {', '.join(parts)}")
    parser.add_argument("--signal-texts", type=int, default=64)
    parser.add_argument("--signal-seeds", type=int, default=16)
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where to write the numbers")
    args = parser.parse_args()
    result = diagnose(args)
    write_json(args.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
