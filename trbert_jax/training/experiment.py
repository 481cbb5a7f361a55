"""One run: its work directory, data and models, shared by all stages.

WORKDIR/config.json       the configuration the directory belongs to
WORKDIR/cache/            tokenized examples
WORKDIR/STAGE/done.json   what a finished stage says of itself; its presence means finished
WORKDIR/STAGE/model/      the model a training stage made
WORKDIR/model/            the model of the last stage, for `TRBert.from_pretrained`
WORKDIR/results.json      numbers of the whole run
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.config import STAGES, RunConfig, diff_configs, load_stored, to_dict
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.inference.engine import AfterBatch, CompiledForward, InferenceEngine, Outputs
from trbert_jax.io import make_directory, only_process, read_json, write_json
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import TokenReducingModel, init_params
from trbert_jax.model.pretrained import Pretrained, load_pretrained
from trbert_jax.model.tokenizers import load_tokenizer, read_line_breaks_as_spaces
from trbert_jax.parallel import DeviceMesh, make_mesh
from trbert_jax.tasks import Score, Splits
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.text_encoder import prepare_tokenizer
from trbert_jax.training.prepared import load_prepared, read_provenance, write_prepared

Announce = Callable[[str], None]

# Settings that may change between calls of one run: they do not touch what is in the directory.
_FREE_KEYS = (
    "workdir",
    "stages",
    "data.cache_dir",
    "data.prepared",
    "parallel.strategy",
    "parallel.fsdp",
    "parallel.remat",
)
# What only the last stage reads: free until that has finished.
_EVALUATION_KEYS = ("evaluate.split", "evaluate.baselines", "evaluate.thresholds")
SHARED_TIMEOUT = 20  # seconds that a file of one process may take to show in another
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A configuration at work.

    Attributes:
      config: of the whole run.
      announce: prints a line for the user.
      profile_steps: updates of each stage (0-based, first and one past the last) to record a profile of.
    """

    config: RunConfig
    announce: Announce = print
    profile_steps: tuple[int, int] | None = None
    _said: set[str] = dataclasses.field(default_factory=set, repr=False)

    def say_once(self, message: str) -> None:
        """Announces what several stages would say, such as how many texts were cut."""
        if message not in self._said:
            self._said.add(message)
            self.announce(message)

    @functools.cached_property
    def layout(self) -> DeviceMesh:
        """The devices of the run, and how they share its work."""
        settings = self.config.parallel
        return make_mesh(settings.strategy, settings.fsdp)

    @property
    def workdir(self) -> Path:
        """Folder of everything the run writes."""
        return Path(self.config.workdir)

    def directory(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.workdir / stage

    @contextlib.contextmanager
    def claim(self, stages: Sequence[str]) -> Iterator[None]:
        """Makes the work directory this configuration's own, and this run's alone, to run these stages in.

        Raises:
          UserError: it belongs to another one (with what differs), another run is at work in it, or it cannot
            be written to; processes that do not agree on what to run, or have different work directories.
        """
        self.layout.check_agreement("the configuration", to_dict(self.config))
        self.layout.check_agreement("the stages to run (--stages)", list(stages))
        with contextlib.ExitStack() as until_the_end:
            self.layout.on_main(lambda: self._claim(until_the_end))
            self._check_shared()
            yield

    def _check_shared(self) -> None:
        """Raises a UserError in every process unless all see the same work directory."""
        if self.layout.num_processes == 1:
            return
        name = self.layout.broadcast(f".seen-by-all-{uuid.uuid4().hex}")
        file = self.workdir / name
        self.layout.on_main(lambda: write_json(file, None))
        # A network file system may show it late.
        end = time.monotonic() + SHARED_TIMEOUT
        while not (found := file.exists()) and time.monotonic() < end:
            time.sleep(0.2)
        seen = self.layout.gather(np.asarray(found, np.int32))
        self.layout.on_main(lambda: file.unlink(missing_ok=True))
        if not seen.all():
            without = ", ".join(map(str, np.flatnonzero(seen == 0)))
            raise UserError(
                f"{self.workdir}: process {without} of {self.layout.num_processes} has another directory of "
                "that name than process 0; `workdir` must be on a file system that all of them share"
            )

    def _claim(self, until_the_end: contextlib.ExitStack) -> None:
        make_directory(self.workdir)
        self._check_free()
        until_the_end.enter_context(only_process(self.workdir))
        # A first try that failed before any stage wrote something, for a wrong path, is no claim.
        if any(any(self.directory(stage).glob("*")) for stage in STAGES):
            self.check_owner()
        write_json(self.workdir / "config.json", to_dict(self.config))

    def _check_free(self) -> None:
        """Raises `UserError` where WORKDIR/config.json is something else's, such as a model's."""
        path = self.workdir / "config.json"
        if path.exists():
            content = read_json(path)
            if not isinstance(content, dict) or "workdir" not in content:
                raise UserError(
                    f"{path}: is not a run's configuration, and would be overwritten; a `workdir` is a folder"
                    " of its own, not a model's: choose another"
                )

    def check_inputs(self, stage: str, model: Pretrained, splits: Sequence[str]) -> None:
        """Raises a UserError in every process unless all have the same parameters and data for a stage."""
        if self.layout.num_processes == 1:
            return
        self.layout.check_agreement(f"the parameters that stage {stage} starts from", _digest(model.params))
        for split in splits:
            digest = self.features(split, model).digest
            self.layout.check_agreement(f"the data of split {split} in stage {stage}", digest)

    def check_owner(self) -> None:
        """Raises `UserError` where the work directory belongs to another configuration."""
        path, mine = self.workdir / "config.json", to_dict(self.config)
        if path.exists():
            free = _FREE_KEYS if self.finished("evaluate") else _FREE_KEYS + _EVALUATION_KEYS
            lines = diff_configs(_stored_config(path), mine)
            differences = [line for line in lines if line.partition(":")[0] not in free]
            if differences:
                raise UserError(
                    f"{self.workdir}: this work directory belongs to another configuration, "
                    "which differs in\n  "
                    + "\n  ".join(differences)
                    + "\nset the values back, or choose another `workdir`"
                )

    # Stages -------------------------------------------------------------------------------------

    def finished(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage says of itself, or None."""
        path = self.directory(stage) / "done.json"
        return read_json(path) if path.exists() else None

    def output_of(self, stage: str, name: str, needed_by: str) -> Path:
        """A finished stage's output file or folder.

        Raises:
          UserError: the stage has not been run; names it.
        """
        path = self.directory(stage) / name
        if self.finished(stage) is None or not path.exists():
            if stage not in self.config.stages:
                raise UserError(
                    f"stage {needed_by} needs {path}, which stage {stage} makes; add {stage} to `stages`"
                )
            raise UserError(
                f"stage {needed_by} needs {path}, which stage {stage} makes; run that first "
                f"(`--stages {stage},{needed_by}`, or leave --stages out to run all)"
            )
        return path

    @property
    def last_model_stage(self) -> str:
        """The configured stage whose model is the run's result."""
        trained = [s for s in ("finetune", "init", "policy", "joint") if s in self.config.stages]
        return trained[-1] if trained else "finetune"

    # Models -------------------------------------------------------------------------------------

    def load(self, stage: str, needed_by: str) -> Pretrained:
        """The model a finished stage made."""
        path = self.output_of(stage, "model", needed_by)
        return load_pretrained(path, seed=self.config.seed)

    def base_model(self) -> Pretrained:
        """The model before any training, with a fresh classifier for the data's labels."""
        task, labels = self.data.task, self.data.task.labels
        base = self._scratch(labels) if self.config.model.init == "scratch" else self._pretrained(labels)
        base = dataclasses.replace(base, config=dataclasses.replace(base.config, inputs=task.inputs))
        if self.config.model.line_breaks_as_spaces:
            read_line_breaks_as_spaces(base.tokenizer)
        return base

    def _pretrained(self, labels: tuple[str, ...]) -> Pretrained:
        model = self.config.model
        loaded = load_pretrained(
            model.init,
            task=self.data.task.head,
            labels=labels or None,
            max_positions=model.max_positions,
            keep_layers=model.keep_layers,
            max_length=model.max_length,
            seed=self.config.seed,
        )
        tokenizer = load_tokenizer(model.tokenizer) if model.tokenizer else loaded.tokenizer
        if tokenizer is None:
            raise UserError(
                f"model.init: {model.init} has no tokenizer files; set model.tokenizer to a folder that has"
            )
        return dataclasses.replace(loaded, tokenizer=tokenizer)

    def _scratch(self, labels: tuple[str, ...]) -> Pretrained:
        from trbert_jax.model.tokenizers import train_wordpiece

        model, shape = self.config.model, self.config.model.scratch
        if model.tokenizer:
            tokenizer = load_tokenizer(model.tokenizer)
        else:
            texts = self.data.texts("train")
            tokenizer = train_wordpiece(texts, shape.vocab_size, self.data.task.markers)
            self.announce(f"trained a WordPiece vocabulary of {len(tokenizer)} tokens on {len(texts)} texts")
        backbone = BACKBONES[shape.model_type]
        sizes: dict[str, Any] = {
            "model_type": backbone.name,
            "task": self.data.task.head,
            "vocab_size": max(tokenizer.get_vocab().values()) + 1,  # a vocabulary may have gaps
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "intermediate_size": shape.intermediate_size,
            "max_positions": model.max_positions or model.max_length,
            "initializer_range": shape.initializer_range,
            "labels": labels or ModelConfig.labels,
            "max_length": model.max_length,
        }
        config = ModelConfig(**{**backbone.defaults, **sizes})
        params = jax.device_get(init_params(config, jax.random.key(self.config.seed)))
        return Pretrained(config, params, tokenizer, newly_initialized=("selectors", "head"))

    def module(self, config: ModelConfig) -> TokenReducingModel:
        """The model that computes, in the configured dtype."""
        return TokenReducingModel(config, DTYPES[self.config.model.dtype], self.config.parallel.remat)

    @functools.cache  # noqa: B019 - a run lives as long as the process
    def _programs(self, config: ModelConfig) -> CompiledForward:
        return CompiledForward(self.module(config), self.layout)

    def runner(
        self, config: ModelConfig, batch_size: int, after_batch: AfterBatch | None = None
    ) -> InferenceEngine:
        """Runs models of this shape; what one stage has compiled the next ones need not compile again."""
        programs = self._programs(config)
        return InferenceEngine(programs.model, batch_size, programs, after_batch)

    # Data ---------------------------------------------------------------------------------------

    @functools.cached_property
    def data(self) -> Splits:
        """The splits of the configured data set, and their task."""
        return Splits(self.config)

    def preparation(self, tokenizer: Any) -> dict[str, Any]:
        """What prepared data depends on, besides the data itself."""
        settings = to_dict(self.config)
        backend, ends = prepare_tokenizer(tokenizer)
        limits = ("max_train_examples", "max_eval_examples")
        keep = ("name", *limits, "text_field", "label_field", "choices", "skip_bad_records")
        inputs = ("max_length", "line_breaks_as_spaces", "max_question_length", "window_step", "max_segments")
        text = backend.to_str() + str(ends)
        return {
            **{f"data.{key}": settings["data"][key] for key in keep},
            **{f"model.{key}": settings["model"][key] for key in inputs},
            # Which examples a limit leaves depends on it; nothing does without one.
            "seed": self.config.seed if any(settings["data"][key] for key in limits) else None,
            "tokenizer": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        }

    @functools.cache  # noqa: B019 - a run lives as long as the process
    def _features(self, split: str, tokenizer: Any) -> Examples:
        prepared = self.config.data.prepared
        if prepared and split == "train":
            if self.data.task.resamples:
                raise UserError(
                    f"data.prepared: {self.config.data.name} draws new inputs in each epoch; leave it out"
                )
            return load_prepared(prepared, split, self.preparation(tokenizer))
        return self.read_features(split, tokenizer)

    def check_prepared(self) -> None:
        """Raises `UserError` where `data.prepared` is not there, before anything that takes long is done."""
        if self.config.data.prepared:
            read_provenance(self.config.data.prepared, "train")

    def read_features(self, split: str, tokenizer: Any) -> Examples:
        """Tokenized examples of a split, from the original files or the cache."""
        cache = self.config.data.cache_dir or self.workdir / "cache"
        return self.data.examples(split, tokenizer, Path(cache))

    def features(self, split: str, model: Pretrained) -> Examples:
        """Tokenized examples of a split for a model."""
        return self._features(split, model.tokenizer)

    def redraw(self, model: Pretrained) -> Callable[[int], Examples | None] | None:
        """Draws the training inputs of an epoch; None for data whose inputs are the same in all."""
        if not self.data.task.resamples:
            return None
        return functools.partial(self.data.resample, self.features("train", model))

    def prepare_data(self, directory: Path, shard_size: int, workers: int) -> Path:
        """Writes all splits as `data.prepared` reads them; see `trbert_jax.training.prepared`."""
        model = self.base_model()
        splits = {}
        for split in ("train", "dev", "test"):
            try:
                splits[split] = self.read_features(split, model.tokenizer)
            except MissingSplitError as error:
                if split == "train":
                    raise
                self.announce(f"{split}: left out, {error}")
        settings = self.preparation(model.tokenizer)
        return write_prepared(directory, splits, settings, shard_size=shard_size, workers=workers)

    def score(
        self, split: str, model: Pretrained, outputs: Outputs, null_threshold: float | None = None
    ) -> Score:
        """Scores a model's outputs for the examples of a split; see `Task.score`."""
        return self.data.task.score(self.features(split, model), outputs.logits, null_threshold)

    def fingerprint(self, stage: str, features: Examples) -> dict[str, Any]:
        """What a stage's checkpoints depend on."""
        settings = to_dict(self.config)
        return {
            "stage": stage,
            "seed": self.config.seed,
            "model": settings["model"],
            "settings": settings[stage],
            "examples": len(features),
            "data": features.digest,
        }


def _digest(params: Any) -> str:
    """Of the names, shapes and values of arrays."""
    found = hashlib.blake2b(digest_size=16)
    for path, array in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        return to_dict(load_stored(path))  # with the defaults of keys that are newer than the file
    except UserError:  # a key that this version does not know: show it as a difference
        return read_json(path)
