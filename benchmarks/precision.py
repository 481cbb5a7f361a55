"""Compares the answers of exported forms with those of JAX: parity in float32, accuracy in int8 and bfloat16.

    python benchmarks/precision.py --model runs/imdb/model --data test.jsonl --operating-point 3.5x \
        --json benchmarks/precision.json

Each form of `FORMS`, with and without reduction, labels the same texts. Of the reducing and of the dense
model the reference is JAX in float32. `other_tokens` counts texts that keep others than it does.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import write_json
from trbert_jax.model.operating_points import find_thresholds

# Name -> engine, its dtype, and whether the graph is quantized.
FORMS = {
    "onnxruntime": ("onnxruntime", "float32", False),
    "onnxruntime_int8": ("onnxruntime", "float32", True),
    "openvino": ("openvino", "float32", False),
    "openvino_bfloat16": ("openvino", "bfloat16", False),
}


def compared(outputs: Outputs, reference: Outputs, width: int) -> dict[str, Any]:
    """Returns accuracy and speed of a run, and how it differs from the reference."""
    size = np.abs(reference.logits).max()
    masks = [x.kept_masks(width) for x in (outputs, reference)]
    return {
        "accuracy": outputs.accuracy,
        "agreement": float((outputs.logits.argmax(-1) == reference.logits.argmax(-1)).mean()),
        "largest_difference": float(np.abs(outputs.logits - reference.logits).max() / size),
        "other_tokens": int((masks[0] != masks[1]).any((1, 2)).sum()),
        "texts_per_second": len(outputs.logits) / outputs.seconds,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all forms."""
    model = TRBert.from_pretrained(args.model, max_length=args.max_length)
    examples = read_examples(model, args.data, BadRecords())
    order = np.sort(np.random.default_rng(0).permutation(len(examples))[: args.max_texts])
    examples, width, rows = examples.take(order), model.config.max_length, dict[str, Any]()
    threshold = find_thresholds(model.config.operating_points, args.operating_point, threshold=args.threshold)
    for rule in ("threshold", "dense"):
        options: Any = {"rule": rule, **({"threshold": threshold} if rule == "threshold" else {})}
        reference = model.engine(args.batch_size).run(model.params, examples, **options)
        rows[f"jax, {rule}"] = compared(reference, reference, width)
        for name, (engine, dtype, quantize) in FORMS.items():
            print(f"{rule}: {name}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                path = model.export(Path(folder) / "model", quantize=quantize, rule=rule)
                other = TRBert.from_pretrained(path, backend=engine, dtype=dtype, max_length=args.max_length)
                found = other.engine(args.batch_size).run({}, examples, backend=engine, **options)
            rows[f"{name}, {rule}"] = compared(found, reference, width)
    command = shlex.join(["python", "benchmarks/precision.py", *sys.argv[1:]])
    about = {"command": command, "machine": machine(), "texts": len(examples), "threshold": threshold}
    return {**about, "forms": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the reducing model")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="labeled texts")
    parser.add_argument("--operating-point", metavar="NAME")
    parser.add_argument(
        "--threshold", type=lambda x: tuple(map(float, x.split(","))), default=0.5, metavar="P,P"
    )
    parser.add_argument("--max-texts", type=int, default=4000, metavar="N", help="drawn at random")
    parser.add_argument("--max-length", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where to write the numbers")
    args = parser.parse_args()
    result = measure(args)
    write_json(args.json, result)
    for name, row in result["forms"].items():
        print(f"{name:28}", "  ".join(f"{key} {value:.6g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
