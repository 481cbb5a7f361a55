"""Choose the settings of a run on one's own texts, by their number and length, in place of a YAML file.

The run follows the recipe of configs/base/plus.yaml; source: docs/method.md, "Beyond the paper".
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trbert_jax.config import STAGES, RunConfig, build_config
from trbert_jax.datasets.registry import FAMILIES
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import find_path
from trbert_jax.model.config import model_config_from_dict
from trbert_jax.model.pretrained import read_config
from trbert_jax.model.tokenizers import find_tokenizer, load_tokenizer, train_wordpiece
from trbert_jax.model.weight_files import local_directory
from trbert_jax.tasks import Splits
from trbert_jax.tasks.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

SCRATCH = "scratch"
_LONGEST = 512  # tokens of a text at most
_STEP = 16  # the longest text is a multiple of it
_SAMPLE = 2000  # examples whose length is measured
# A small model with random weights, as in configs/quickstart.yaml.
_SHAPE: dict[str, Any] = {"vocab_size": 4000, "initializer_range": 0.05}
_SHAPE |= {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 512}
_NARROW = 256  # width up to which a model takes, and needs, higher rates and more updates
# Stage -> updates to aim at, fewest and most epochs, and learning rate: of a wide model and of a narrow one.
_TRAINING = {
    "finetune": ((300, 2, 5, 5e-5), (600, 3, 20, 5e-4)),
    "init": ((200, 1, 3, 1e-3), (200, 1, 4, 3e-3)),
    "joint": ((1000, 2, 8, 1e-4), (600, 3, 10, 3e-4)),
}
# Other settings of the recipe, as in configs/base/plus.yaml.
RECIPE: dict[str, dict[str, Any]] = {
    "score": {"kind": "gate", "max_examples": 4000},
    "init": {"loss": "bce"},
    "joint": {"hard_fraction": 1.0, "dropout": False, "temperature": 2.0, "jitter": 1.0},
}


def choose_settings(
    data: str,
    model: str,
    output: str,
    given: Mapping[str, Any],
    overrides: Sequence[str] = (),
    speedup: float | None = None,
) -> RunConfig:
    """Returns the configuration of a run.

    Args:
      data: a file of labeled texts, a folder with train.csv and the like, `hf:NAME` or `tfds:NAME`.
      model: folder or hub id of a model to start from; `scratch` for a small one with random weights.
      output: the work directory.
      given: further keys of section `data`.
      overrides: `key=value`, which win over the settings chosen here.
      speedup: FLOPs of the dense model over those of the reduced one; None for 3, or for half the number of
        layers, and at least 1.5, if there are fewer than six.

    Raises `UserError` for data or a model that cannot be read, or a wrong setting.
    """
    file = find_path(data)
    source = {"name": "text", "path" if file.is_dir() else "train": str(file)}
    if data.partition(":")[0] in FAMILIES and not file.exists():
        source = {"name": data}
    values: dict[str, Any] = {"workdir": output, "data": {**source, **given}, "model": {"init": model}}
    limit = {"finetune": {"max_examples": 1}} if given.get("unlabeled") else {}  # until they are counted
    config = build_config({**values, **limit}, overrides)
    splits = Splits(config)
    if splits.task.name != "classification":
        raise UserError(f"{data}: holds questions; train on them with --config")
    labels, texts = splits.task.labels, splits.records("train")
    records = [record for record in texts if record.label >= 0] if limit else texts
    try:
        has_test = any(record.label >= 0 for record in splits.records("test"))
    except MissingSplitError:
        has_test = False
    chosen = np.random.default_rng(0).permutation(len(records))[:_SAMPLE]
    sample = splits.task.texts([records[i] for i in sorted(chosen.tolist())])
    longest, width, layers = _fit(config, sample)
    values["model"] |= {"max_length": longest, **({"scratch": _SHAPE} if model == SCRATCH else {})}
    values |= _training(len(records), len(texts), longest, width)
    values["finetune"] |= {"max_examples": len(records)} if limit else {}
    values["joint"]["target_speedup"] = speedup or min(3.0, max(1.5, layers / 2))
    values["stages"] = [stage for stage in STAGES if stage in ("evaluate", "finetune", "teacher", *RECIPE)]
    values["evaluate"] = {"split": "test" if has_test else "dev", "baselines": ["random"]}
    config = build_config(values, overrides)
    logger.info(
        "%s: %d examples of %d classes for training, %d more without labels; "
        "texts are cut at %d tokens, results are those of %s",
        *(data, len(records), len(labels), len(texts) - len(records)),
        *(config.model.max_length, config.evaluate.split),
    )
    return config


def _fit(config: RunConfig, texts: Sequence[str]) -> tuple[int, int, int]:
    """Returns the length at which texts are cut, and width and number of layers of the model.

    The length is that of the longest text, unless that is out of the ordinary.
    """
    most, width, layers = _LONGEST, _SHAPE["hidden_size"], _SHAPE["num_layers"]
    given = config.model.tokenizer
    tokenizer = load_tokenizer(given) if given else None
    if config.model.init != SCRATCH:
        directory = local_directory(config.model.init)
        shape = model_config_from_dict(read_config(directory), str(directory / "config.json"))
        most, width = min(most, config.model.max_positions or shape.max_positions), shape.hidden_size
        layers = len(config.model.keep_layers or range(shape.num_layers))
        tokenizer = tokenizer or find_tokenizer(directory, shape.backbone.special_tokens)
        if tokenizer is None:
            raise UserError(f"{directory}: has no tokenizer files; set model.tokenizer to a folder that has")
    elif tokenizer is None:
        tokenizer = train_wordpiece(texts, _SHAPE["vocab_size"])
    lengths = TextEncoder(tokenizer).encode(texts, max_tokens=most).num_tokens
    if config.data.text_pair_field:
        lengths = lengths.reshape(-1, 2).sum(1) + 1
    longest, usual = int(lengths.max()), int(np.quantile(lengths, 0.9))
    if longest > 2 * usual:
        longest = int(np.quantile(lengths, 0.98))
    return min(most, _STEP * math.ceil((longest + 2) / _STEP)), width, layers


def _training(count: int, total: int, max_length: int, width: int) -> dict[str, Any]:
    """Returns the sections of the training stages for `count` texts with labels, `total` with the others."""
    size = 8 if count < 2_000 else 16 if count < 20_000 else 32
    passes = max(1, size // 8) if max_length > 128 else 1
    sections: dict[str, Any] = {"score": dict(RECIPE["score"])}
    for stage, choices in _TRAINING.items():
        updates, fewest, most, rate = choices[width <= _NARROW]
        sections[stage] = {
            "batch_size": size // passes,
            "accumulation_steps": passes,
            "epochs": min(max(round(updates * size / (total if stage == "joint" else count)), fewest), most),
            "learning_rate": rate,
            **RECIPE.get(stage, {}),
        }
    if width <= _NARROW:  # compiling the packed program costs more than it saves
        sections["finetune"]["backend"] = "masked"
    return sections
