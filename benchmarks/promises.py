"""Checks how often the promise of `trbert calibrate` is broken.

    python benchmarks/promises.py --model runs/imdb/model --dense runs/imdb/finetune/model \
        --dev dev.jsonl --data test.jsonl --max-texts 5000 --json benchmarks/promises.json

Thresholds of several speeds are found on the dev texts. Then the texts of `--data` are divided at random many
times: one part tests the thresholds, as `trbert calibrate` does, and the promise is broken if the share over
all texts, the truth here, is above its bound. `broken_on_rest` counts how often the share of the other part
alone is above it, which has chance of its own.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.inference import promise
from trbert_jax.inference.calibrate import copying
from trbert_jax.inference.copies import run_copies
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.frontier import SPEEDUPS, best, find_frontier
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import write_json
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES
from trbert_jax.reduction.selection import min_logit

DISAGREEMENT = (0.02, 0.03, 0.05, 0.1)  # bounds
DROP = (0.005, 0.01, 0.02, 0.04)


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Returns the points found on dev, and for each promise the changes of all texts, int [points, texts]."""
    model, reference = (
        TRBert.from_pretrained(x, max_length=args.max_length) for x in (args.model, args.dense)
    )
    dev, texts = (read_examples(model, path, BadRecords()) for path in (args.dev, args.data))
    dev, texts = dev.take(range(len(dev))[: args.max_dev]), texts.take(range(len(texts))[: args.max_texts])
    engine, dense_engine = copying(model.engine(args.batch_size)), reference.engine(args.batch_size)
    dense = [dense_engine.run(reference.params, x, rule="dense") for x in (dev, texts)]
    points = best(find_frontier(engine, model.params, dev, model.task, dense[0], args.speedups))
    limits = np.array([[min_logit(x) for x in point.thresholds] for point in points], np.float32)
    runs = run_copies(engine, model.params, texts, "min_logit", limits, RULES[DEFAULT_RULE], "packed")
    changes: dict[str, list[np.ndarray]] = {"disagreement": [], "drop": []}
    for run in runs:
        for kind, found in changes.items():
            found.append(promise.changed(model.task, texts, dense[1], run, kind))
    names = [{"speedup": point.speedup, "thresholds": [*point.thresholds]} for point in points]
    return names, {kind: np.array(found) for kind, found in changes.items()}


def divided(
    changes: np.ndarray, kind: str, most: float, confidence: float, splits: int, size: int
) -> dict[str, Any]:
    """Tests the points on random parts of the texts, and compares with the truth."""
    truth, level, rng = changes.mean(1), 1 - confidence, np.random.default_rng(0)
    kept, broken, on_rest = list[int](), 0, 0
    for _ in range(splits):
        order = rng.permutation(changes.shape[1])
        part, rest = changes[:, order[:size]], changes[:, order[size:]]
        p_values = [
            promise.disagreement_p_value(x > 0, most)
            if kind == "disagreement"
            else promise.drop_p_value(x, most, level)
            for x in part
        ]
        chosen = promise.last_kept(p_values, level)
        if chosen is not None:
            kept.append(chosen)
            broken += bool(truth[chosen] > most)
            on_rest += bool(rest[chosen].mean() > most)
    return {
        "kind": kind,
        "most": most,
        "splits": splits,
        "texts_tested": size,
        "promised": len(kept),
        "broken": broken,
        "broken_on_rest": on_rest,
        "points": np.bincount(kept, minlength=len(changes)).tolist(),
        "truth": truth.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the reducing model")
    parser.add_argument("--dense", required=True, metavar="DIR", help="folder of the dense model")
    parser.add_argument("--dev", required=True, type=Path, metavar="FILE", help="texts that find thresholds")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="texts that test them")
    parser.add_argument("--max-texts", type=int, default=5000, metavar="N")
    parser.add_argument("--max-dev", type=int, default=500, metavar="N")
    parser.add_argument("--max-length", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument(
        "--speedups", type=lambda x: [*map(float, x.split(","))], default=SPEEDUPS, metavar="X,X"
    )
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--splits", type=int, default=200, metavar="N")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where to write the numbers")
    args = parser.parse_args()
    points, changes = measured(args)
    count = changes["drop"].shape[1]
    rows = [
        divided(changes[kind], kind, most, args.confidence, args.splits, size)
        for kind, bounds in (("disagreement", DISAGREEMENT), ("drop", DROP))
        for most in bounds
        for size in (count // 5, count // 2)
    ]
    command = shlex.join(["python", "benchmarks/promises.py", *sys.argv[1:]])
    about = {"command": command, "texts": count, "confidence": args.confidence, "points": points}
    write_json(args.json, {**about, "promises": rows})
    for row in rows:
        print(
            {
                key: row[key]
                for key in ("kind", "most", "texts_tested", "promised", "broken", "broken_on_rest")
            }
        )


if __name__ == "__main__":
    main()
