"""Export the packed model as StableHLO: one program for each of a ladder of shapes.

A folder gets `stablehlo.json`, which lists programs, weights and inputs, and a file for each program, which
`jax.export` reads without this package. Source: docs/serving.md, "Other engines".
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import export

from trbert_jax.errors import UserError
from trbert_jax.io import write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.engines import PLATFORMS
from trbert_jax.model.model import TokenReducingModel
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.tiles import Tiling
from trbert_jax.model.weights import parameters
from trbert_jax.reduction.selection import keep_above

INDEX = "stablehlo.json"
SUFFIX = ".stablehlo"  # of a program
ROWS = (1, 4, 32)  # of the programs
DAYS = 180  # for which JAX promises to read what it has exported


def write_programs(
    folder: Path,
    config: ModelConfig,
    thresholds: Sequence[float] | None,
    platform: str = "cpu",
    rows: Sequence[int] = ROWS,
) -> None:
    """Writes programs for batches of some numbers of `rows`, and of a quarter and of all `max_length` tokens.

    Each takes a list of weights, float32 in the order of `stablehlo.json`, and a dict of inputs: `input_ids`
    and `attention_mask` int32 [rows, tokens], `token_type_ids` alike if the backbone has types, and unless
    `thresholds` is None `threshold` float32 [points]. It returns `logits` float32 [rows, labels], or of spans
    [rows, 2, tokens], and `kept` bool [points, rows, tokens].

    Raises `UserError` for a head that reads more.
    """
    if config.head.inputs or config.task == "multiple_choice":
        kind = "models that label texts or find spans"
        raise UserError(f"--format stablehlo is for {kind}; this one is for {config.task}: use onnx")
    names = ["input_ids", "attention_mask", *["token_type_ids"] * bool(config.type_vocab_size)]
    widths = sorted({max(1, config.max_length // 4), config.max_length})
    programs = []
    for count in rows:
        for width in widths:
            inputs = {name: jax.ShapeDtypeStruct((count, width), jnp.int32) for name in names}
            if thresholds is not None:
                inputs["threshold"] = jax.ShapeDtypeStruct((config.num_reductions,), jnp.float32)
            file = f"model_{count}x{width}{SUFFIX}"
            (folder / file).write_bytes(_program(config, inputs, platform))
            programs.append({"file": file, "rows": count, "tokens": width})
    today = datetime.datetime.now(datetime.UTC).date()
    about: dict[str, Any] = {
        "jax": jax.__version__,
        "made": f"{today}",
        "expires": f"{today + datetime.timedelta(DAYS)}",
        "platform": platform,
        "programs": programs,
        "inputs": names,
        "threshold": None if thresholds is None else [*thresholds],
        "weights": [{"name": x.name, "transposed": x.transposed} for x in parameters(config)],
    }
    write_json(folder / INDEX, about)


def _program(config: ModelConfig, inputs: Mapping[str, Any], platform: str) -> bytearray:
    known = parameters(config)
    num_rows = inputs["input_ids"].shape[0]
    model, tiling = TokenReducingModel(config), Tiling.for_backend(PLATFORMS[platform], num_rows)

    def run(weights: list[jax.Array], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        params = unflatten_dict({x.path: weight for x, weight in zip(known, weights, strict=True)})
        # A row of padding has one token, whose result nobody reads.
        mask = (inputs["attention_mask"] > 0).at[:, 0].set(True)
        batch = {"input_ids": inputs["input_ids"], "mask": mask}
        if "token_type_ids" in inputs:
            batch["token_type_ids"] = inputs["token_type_ids"]
        rule = None
        if "threshold" in inputs:
            limits = jnp.log(inputs["threshold"]) - jnp.log(1 - inputs["threshold"])
            rule = keep_above(jnp.tile(limits, (len(mask), 1)))
        output = packed_forward(model, params, batch, rule=rule, tiling=tiling)
        kept = [selection.keep for selection in output.selections]
        return {
            "logits": output.logits,
            "kept": jnp.stack(kept) if kept else jnp.zeros((0, *mask.shape), bool),
        }

    weights = [jax.ShapeDtypeStruct(x.shape[::-1] if x.transposed else x.shape, jnp.float32) for x in known]
    return export.export(jax.jit(run), platforms=[platform])(weights, dict(inputs)).serialize()
