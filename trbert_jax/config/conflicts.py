"""Find settings that are valid alone but not together."""

from collections.abc import Iterator

from trbert_jax.config.sections import STAGES, DataConfig, JointConfig, RunConfig
from trbert_jax.datasets import find_dataset
from trbert_jax.datasets.registry import FIELD_KEYS, FILE_KEYS, OWN_KEYS
from trbert_jax.errors import UserError
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES


def find_conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the problem of each setting that does not go with the others."""
    if list(config.stages) != [stage for stage in STAGES if stage in config.stages] or not config.stages:
        yield "stages", f"expected some of {', '.join(STAGES)}, each once and in this order"
    data, model, scratch = config.data, config.model, config.model.scratch
    try:
        dataset = find_dataset(data.name)
    except UserError as error:
        yield "data.name", str(error)
        return
    if data.path is None and dataset.needs_path:
        yield "data.path", f"missing, expected the folder that holds the files of {data.name}"
    for key in OWN_KEYS:
        if key not in dataset.reads and getattr(data, key) != getattr(DataConfig, key):
            readers = "text, hf:NAME and tfds:NAME" if key in FIELD_KEYS else "text and hf:NAME"
            readers = "text" if key in FILE_KEYS else readers
            yield f"data.{key}", f"is for {readers} only; {data.name} has its own, remove it"
    if "train" in dataset.reads and not data.train and not data.path:
        yield "data.train", "missing, expected a file of texts with labels, or its folder in data.path"
    if data.unlabeled and config.finetune.max_examples is None:
        yield "finetune.max_examples", "missing, expected the number of texts with labels, for data.unlabeled"
    if data.labels is not None and len(set(data.labels)) < max(2, len(data.labels)):
        yield "data.labels", f"expected two or more different names, got {list(data.labels)}"
    if model.max_positions is not None and model.max_positions < model.max_length:
        yield "model.max_positions", f"{model.max_positions} is less than model.max_length {model.max_length}"
    layers = model.keep_layers
    if layers is not None and model.init == "scratch":
        yield "model.keep_layers", "is for a pretrained model; from scratch set model.scratch.num_layers"
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        yield "model.keep_layers", f"expected rising layer numbers, got {list(layers)}"
    if model.init == "scratch" and scratch.hidden_size % scratch.num_heads:
        yield "model.scratch.hidden_size", f"is not a multiple of model.scratch.num_heads {scratch.num_heads}"
    if model.selector_match and model.init == "scratch" and scratch.model_type != "bert":
        yield "model.selector_match", f"needs token types, which {scratch.model_type} lacks; remove it"
    for stage in STAGES if dataset.task == "classification" else ():
        if getattr(getattr(config, stage), "published_padding", False):
            yield f"{stage}.published_padding", f"padding takes no part for {data.name}, remove it"
    for stage in STAGES:
        if getattr(getattr(config, stage), "max_examples", None) and data.prepared is not None:
            yield f"{stage}.max_examples", "data.prepared is read as a whole; remove one of the two"
    if not config.joint.distill and config.joint.temperature != JointConfig.temperature:
        yield "joint.temperature", "is of distillation, and joint.distill is false; remove one of the two"
    joint, samples = config.joint, {"policy": config.policy.num_samples}
    samples["joint"] = joint.num_samples or config.policy.num_samples
    for stage, count in samples.items():
        section = getattr(config, stage)
        if section.credit != "reward" and section.penalty_gradient != "exact":
            yield f"{stage}.penalty_gradient", f"{stage}.credit {section.credit} needs exact"
        # The baseline of a reward is the mean over the example's samples.
        if section.credit == "reward" and count < 2:
            yield f"{stage}.num_samples", "expected 2 or more, to compare the rewards of samples"
    if joint.num_samples is not None and joint.rule == "threshold" and joint.credit != "reward":
        yield "joint.num_samples", "rule threshold draws no samples with this joint.credit; remove it"
    if config.joint.distill_states and not (config.joint.distill and config.teacher.states):
        yield "joint.distill_states", "needs joint.distill: true and teacher.states: true"
    evaluate, rule = config.evaluate, RULES[config.evaluate.rule]
    if evaluate.thresholds and not rule.has_threshold:
        yield "evaluate.thresholds", f"rule {rule.name} has none; use {DEFAULT_RULE}, or remove them"
    if evaluate.frontier and not rule.has_threshold:
        yield "evaluate.frontier", f"rule {rule.name} has no thresholds; use {DEFAULT_RULE}, or remove it"
    if evaluate.baselines and not rule.drops:
        yield "evaluate.baselines", f"rule {rule.name} drops nothing to compare with, remove them"
