"""Manage an experiment: its work directory, data and models, which all stages share.

WORKDIR/config.json       the configuration that the directory belongs to
WORKDIR/cache/            tokenized examples
WORKDIR/STAGE/done.json   summary of a finished stage; its presence means that the stage is finished
WORKDIR/STAGE/made_from.json  settings, and hashes of what the stage reads and of its outputs
WORKDIR/STAGE.old/        a stage that was stale and had to be made again
WORKDIR/STAGE/model/      the model of a training stage
WORKDIR/model/            the model of the last stage, for `TRBert.from_pretrained`
WORKDIR/results.json      results of all stages
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.config import STAGES, DataConfig, RunConfig, TrainingConfig, to_dict
from trbert_jax.datasets.registry import OWN_KEYS
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.inference.engine import AfterBatch, CompiledForward, InferenceEngine
from trbert_jax.io import check_outputs, make_directory, only_process, read_json, write_json
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.model.config import InputConfig, ModelConfig, model_config_from_dict
from trbert_jax.model.model import Params, TokenReducingModel, init_params
from trbert_jax.model.pretrained import Pretrained, load_pretrained
from trbert_jax.model.tokenizers import load_tokenizer, read_line_breaks_as_spaces, train_wordpiece
from trbert_jax.parallel import DeviceMesh, find_devices, make_mesh
from trbert_jax.reduction.budget import largest_speedup
from trbert_jax.reduction.flops import EncoderShape
from trbert_jax.reduction.selection import random_key
from trbert_jax.tasks import Splits, Trained
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.text_encoder import prepare_tokenizer
from trbert_jax.training.made_from import check_settings
from trbert_jax.training.prepared import load_prepared, read_provenance, write_prepared

logger = logging.getLogger(__name__)

REPORT, CURVES, CONFUSION = "report.html", "curves.png", "confusion.png"  # in the work directory
SHARED_TIMEOUT = 20  # seconds until a file of one process must be visible to the others
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Experiment:
    """A configuration with its work directory, data, devices and models.

    `profile_steps` are the updates of each stage to profile: the first (0-based) and one past the last.
    Raises `UserError` for an unknown data set, or a setting that its task does not read.
    """

    def __init__(self, config: RunConfig, profile_steps: tuple[int, int] | None = None) -> None:
        self.config, self.profile_steps = config, profile_steps
        self.workdir, self.data = Path(config.workdir), Splits(config, self._trained)
        self._cache = Path(config.data.cache_dir or self.workdir / "cache")
        # Whether the fine-tuned model is not stale, so that it can stand for the training set.
        self.is_settled = False
        self._features: dict[tuple[Any, ...], Examples] = {}
        self._programs: dict[ModelConfig, CompiledForward] = {}

    @functools.cached_property
    def devices(self) -> DeviceMesh:
        """The devices, and how they share the work."""
        return make_mesh(self.config.parallel.strategy, self.config.parallel.fsdp)

    # Work directory -----------------------------------------------------------------------------

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Reads the summary of a finished stage; returns None before that."""
        path = self.workdir / stage / "done.json"
        return read_json(path) if path.exists() else None

    def output_of(self, stage: str, name: str, needed_by: str) -> Path:
        """Returns the path of a finished stage's output. Raises `UserError` if the stage has not been run."""
        path = self.workdir / stage / name
        if self.finished(stage) is None or not path.exists():
            advice = self.how_to_run(stage, needed_by)
            raise UserError(f"stage {needed_by} needs {path}, which stage {stage} makes; {advice}")
        return path

    def how_to_run(self, stage: str, needed_by: str) -> str:
        """Returns how a user runs a stage that another one needs."""
        if stage not in self.config.stages:
            return f"add {stage} to `stages`"
        return f"run that first (`--stages {stage},{needed_by}`, or leave --stages out to run all)"

    @contextlib.contextmanager
    def claim(self, stages: Sequence[str]) -> Iterator[None]:
        """Reserves the work directory for this configuration and process while `stages` run.

        Raises `UserError` if the directory belongs to another configuration, is in use, or cannot be written
        to; or if the processes differ in configuration, stages or directory.
        """
        self.devices.check_agreement("the configuration", to_dict(self.config))
        self.devices.check_agreement("the stages to run (--stages)", list(stages))
        with contextlib.ExitStack() as stack:
            self.devices.on_main(lambda: self._claim(stack))
            self._check_shared()
            yield

    def _claim(self, stack: contextlib.ExitStack) -> None:
        self.check_paths()
        make_directory(self.workdir)
        path = self.workdir / "config.json"
        if path.exists():
            content = read_json(path)
            if not isinstance(content, dict) or "workdir" not in content:
                other = "belongs to something else, such as a model, and would be overwritten"
                raise UserError(f"{path}: {other}; choose another `workdir`")
        elif not any((self.workdir / stage).exists() for stage in STAGES):
            for other in ("model", "results.json", REPORT, CURVES, CONFUSION):
                if (self.workdir / other).exists():
                    advice = "move it away, or choose another `workdir`"
                    raise UserError(f"{self.workdir / other}: is no run's and would be replaced; {advice}")
        stack.enter_context(only_process(self.workdir))
        self.check_owner()
        write_json(path, to_dict(self.config))

    def check_paths(self, output: Path | None = None) -> None:
        """Raises `UserError` if the run would replace what it reads, or `output` is a file of the run."""
        data, model = self.config.data, self.config.model
        stages = [self.workdir / stage for stage in STAGES]
        read = [getattr(data, name, None) for name in ("path", "prepared", "train", "dev", "test")]
        check_outputs(inputs=read, models=[model.init], folders=[self.workdir / "model", *stages])
        own = [self.workdir / name for name in ("config.json", "results.json", "model", *STAGES)]
        check_outputs([output], inputs=[*read, *own], models=[model.init])

    def _check_shared(self) -> None:
        """Raises a UserError in every process unless all see the same work directory."""
        if self.devices.num_processes == 1:
            return
        file = self.workdir / self.devices.broadcast(f".seen-by-all-{uuid.uuid4().hex}")
        self.devices.on_main(lambda: write_json(file, None))
        # A network file system may show the file late.
        end = time.monotonic() + SHARED_TIMEOUT
        while not (seen := file.exists()) and time.monotonic() < end:
            time.sleep(0.2)
        all_seen = self.devices.gather(np.asarray(seen, np.int32))
        self.devices.on_main(lambda: file.unlink(missing_ok=True))
        if not all_seen.all():
            missing = ", ".join(map(str, np.flatnonzero(all_seen == 0)))
            other = f"process {missing} of {self.devices.num_processes} has another directory of that name"
            advice = "`workdir` must be on a file system that all of them share"
            raise UserError(f"{self.workdir}: {other} than process 0; {advice}")

    def check_owner(self) -> None:
        """Raises a UserError if a stage in the work directory was begun with another configuration."""
        check_settings(self)

    def fingerprint(self, stage: str, examples: Examples | None = None) -> dict[str, Any]:
        """Returns the settings and data that a stage's checkpoints depend on."""
        settings = to_dict(self.config)
        trained = {"seed": self.config.seed, "model": settings["model"], "settings": settings[stage]}
        data = {} if examples is None else {"examples": len(examples), "data": examples.digest}
        return {"stage": stage, **trained, **data}

    def check_inputs(self, stage: str, model: Pretrained, splits: Sequence[str]) -> None:
        """Raises a UserError in every process unless all have the same parameters and data for a stage."""
        if self.devices.num_processes == 1:
            return
        agree = self.devices.check_agreement
        agree(f"the parameters that stage {stage} starts from", params_digest(model.params))
        for split in splits:
            agree(f"the data of split {split} in stage {stage}", self.features(split, model).digest)

    # Models -------------------------------------------------------------------------------------

    def load(self, stage: str, needed_by: str) -> Pretrained:
        """Loads the model of a finished stage."""
        return load_pretrained(self.output_of(stage, "model", needed_by), seed=self.config.seed)

    def base_model(self) -> Pretrained:
        """Makes the model before any training, with a new head for the labels of the data."""
        find_devices()  # before anything else asks JAX
        model, task = self.config.model, self.data.task
        tokenizer = load_tokenizer(model.tokenizer) if model.tokenizer else None
        if model.init == "scratch":
            base = self._scratch(tokenizer)
        else:
            keys = ("max_positions", "keep_layers", "max_length", "selector_match")
            shape = {key: getattr(model, key) for key in keys}
            labels, seed = task.labels or None, self.config.seed
            base = load_pretrained(model.init, task=task.head, labels=labels, seed=seed, **shape)
        tokenizer = base.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            advice = "set model.tokenizer to a folder that has"
            raise UserError(f"model.init: {model.init} has no tokenizer files; {advice}")
        if model.line_breaks_as_spaces:
            read_line_breaks_as_spaces(tokenizer)
        made: dict[str, Any] = {"score": "", "operating_points": (), "evaluation": None}  # for another task
        config = dataclasses.replace(base.config, inputs=task.inputs, **made)
        return dataclasses.replace(base, config=config, tokenizer=tokenizer)

    def _scratch(self, tokenizer: Any) -> Pretrained:
        model, shape, task = self.config.model, self.config.model.scratch, self.data.task
        if tokenizer is None:
            texts = self.data.texts("train")
            tokenizer = train_wordpiece(texts, shape.vocab_size, task.markers)
            logger.info("trained a WordPiece vocabulary of %d tokens on %d texts", len(tokenizer), len(texts))
        sizes: dict[str, Any] = {
            **dataclasses.asdict(shape),
            "task": task.head,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,  # a vocabulary may have gaps
            "max_positions": model.max_positions or model.max_length,
            "labels": task.labels or ModelConfig.labels,
            "max_length": model.max_length,
            "selector_match": model.selector_match,
        }
        config = ModelConfig(**{**BACKBONES[shape.model_type].defaults, **sizes})
        params = jax.device_get(init_params(config, random_key(self.config.seed)))
        return Pretrained(config, params, tokenizer, newly_initialized=("selectors", "head"))

    def module(self, config: ModelConfig) -> TokenReducingModel:
        """Returns the Flax module of a model, in the configured dtype.

        Raises `UserError` if a stage asks for a speed-up that such a model cannot have.
        """
        most = largest_speedup(EncoderShape.of(config), config.max_length)
        for name in self.config.stages:
            if (getattr(getattr(self.config, name), "target_speedup", None) or 1) >= most:
                problem = f"out of reach; {config.num_layers} layers allow less than {most:.2f}"
                raise UserError(f"{name}.target_speedup: {problem}, at which all tokens are dropped")
        dtype, parallel = DTYPES[self.config.model.dtype], self.config.parallel
        return TokenReducingModel(config, dtype, parallel.remat, parallel.activation_memory * 2**30)

    def engine(
        self, config: ModelConfig, batch_size: int, after_batch: AfterBatch | None = None
    ) -> InferenceEngine:
        """Returns an engine for models of this shape; all engines of one shape share compiled programs."""
        if config not in self._programs:
            self._programs[config] = CompiledForward(self.module(config), self.devices)
        programs = self._programs[config]
        return InferenceEngine(programs.model, batch_size, programs, after_batch)

    # Data ---------------------------------------------------------------------------------------

    def features(self, split: str, model: Pretrained) -> Examples:
        """Returns the tokenized examples of a split for a model; `Splits.part` names those of a part."""
        prepared, key = self.config.data.prepared, (split, model.tokenizer)
        if key not in self._features:
            if not prepared or not split.startswith("train"):
                self._features[key] = self.data.examples(*key, self._cache)
            elif self.data.task.resamples:
                name = self.config.data.name
                raise UserError(f"data.prepared: {name} draws new inputs in each epoch; leave it out")
            else:
                self._features[key] = load_prepared(prepared, split, self.preparation(model.tokenizer))
        return self._features[key]

    def training_examples(self, model: Pretrained, limit: int | None, labeled: int | None) -> Examples:
        """Returns `limit` training examples, None for all; the label is -1 except of `labeled` of them."""
        whole, part = self.data.part(limit), self.data.part(labeled)
        if self.config.data.unlabeled and any(x.label < 0 for x in self.data.records(part)):
            count = sum(x.label >= 0 for x in self.data.records(part))
            wrong = f"{labeled} is more than the {count} training texts with labels"
            raise UserError(f"finetune.max_examples: {wrong}; the others are those of data.unlabeled")
        key = (whole, part, model.tokenizer)
        if labeled is None or whole == part or not self.features(whole, model).has_labels:
            return self.features(whole, model)
        if key not in self._features:
            examples, known = self.features(whole, model), {x.id for x in self.data.records(part)}
            labels = [y if id in known else -1 for id, y in zip(examples.ids, examples.labels, strict=True)]
            self._features[key] = dataclasses.replace(examples, labels=np.array(labels, np.int32))
        return self._features[key]

    def data_digest(self, key: str) -> Any:
        """Returns a hash of the data of a split, see `Splits.digest`, or None if prepared data lacks it."""
        if self.config.data.prepared and key in ("train", "labels"):
            return read_provenance(self.config.data.prepared, "train").get("made_from", {}).get(key)
        return self.data.digest(key)

    def _trained(self) -> Trained | None:
        """Returns inputs and labels of the fine-tuned model or of prepared data; see `Splits`."""
        first = next(name for name, section in STAGES.items() if issubclass(section, TrainingConfig))
        path = self.workdir / first / "model" / "config.json"
        if self.is_settled and self.finished(first) is not None and path.is_file():
            model = model_config_from_dict(read_json(path), str(path))
            return model.inputs, model.labels
        if self.config.data.prepared:
            about = read_provenance(self.config.data.prepared, "train").get("made_from", {})
            return (InputConfig(**about["inputs"]), about["labels"]) if about else None
        return None

    def preparation(self, tokenizer: Any) -> dict[str, Any]:
        """Returns the settings that prepared data depends on."""
        settings = to_dict(self.config)
        backend, ends = prepare_tokenizer(tokenizer)
        limits = ("max_train_examples", "max_eval_examples")
        keep = ["name", *limits, "text_field", "label_field", "choices", "skip_bad_records"]
        keep += [
            key for key in OWN_KEYS if key not in keep and settings["data"][key] != getattr(DataConfig, key)
        ]
        inputs = ("max_length", "line_breaks_as_spaces", "max_question_length", "window_step", "max_segments")
        text = backend.to_str() + str(ends)
        return {
            **{f"data.{key}": settings["data"][key] for key in keep},
            **{f"model.{key}": settings["model"][key] for key in inputs},
            # The seed chooses the examples that a limit leaves, and nothing else.
            "seed": self.config.seed if any(settings["data"][key] for key in limits) else None,
            "tokenizer": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        }

    def prepare_data(self, directory: Path, shard_size: int, workers: int) -> Path:
        """Writes all splits for `data.prepared`; see `trbert_jax.training.prepared`."""
        model, splits = self.base_model(), {}
        for split in ("train", "dev", "test"):
            try:
                splits[split] = self.data.examples(split, model.tokenizer, self._cache)
            except MissingSplitError as error:
                if split == "train":
                    raise
                logger.info("%s: skipped, %s", split, error)
        made_from: dict[str, Any] = {key: self.data.digest(key) for key in ("train", "labels")}
        made_from["inputs"] = dataclasses.asdict(self.data.task.inputs)
        sizes = {"shard_size": shard_size, "workers": workers}
        return write_prepared(directory, splits, self.preparation(model.tokenizer), made_from, **sizes)


def params_digest(params: Params) -> str:
    """Hashes the names, dtypes, shapes and values of all parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for path, array in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
