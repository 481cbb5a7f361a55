"""Record what each stage was made from, and find the stages that are stale.

WORKDIR/STAGE/made_from.json, written as the stage begins, holds hashes of contents, not of paths or times:

config    the settings of the run
data      `train`, `dev`, `test` -> records that decide the result; `test.ids` their ids; `labels` the names
models    `model.init`, `model.tokenizer` -> the files, for the stage that starts from them
stages    each stage that it reads -> the outputs of that stage
output    its own outputs, added at the end

null stands for what could not be read, and is not compared; nor is a stage of a version without this file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbert_jax.config import STAGES, RunConfig, build_stored, flat, path_keys, to_dict
from trbert_jax.datasets.registry import OWN_KEYS
from trbert_jax.errors import MissingSplitError, UserError
from trbert_jax.io import hash_file, read_json, write_json
from trbert_jax.model.weight_files import local_directory, model_files

if TYPE_CHECKING:
    from trbert_jax.training.experiment import Experiment
    from trbert_jax.training.stages import Stage

logger = logging.getLogger(__name__)

NAME, FORMAT = "made_from.json", 1
# Settings that change no result: of the run, and of a stage.
_FREE = ("workdir", "stages", "parallel.", "data.cache_dir", "data.prepared")
_FREE_IN_STAGE = ("save_steps", "keep_checkpoints")
_FREE_BATCHES = ("score.batch_size", "teacher.batch_size")
# Settings that decide what is read, and nothing else: they may change as long as the contents do not.
_CONTENT = {"model.init", "model.tokenizer", *(f"data.{key}" for key in ("path", *OWN_KEYS))}
_CONTENT |= {"data.max_train_examples", "data.max_eval_examples", "data.skip_bad_records"}
# Keys of a checkpoint's fingerprint that may change.
FREE_IN_CHECKPOINT = frozenset(("model.init", "model.tokenizer", *(f"settings.{x}" for x in _FREE_IN_STAGE)))


def settings_of(config: RunConfig, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings that decide a stage's result, and those that name what it reads; dotted keys."""
    whole = {key: value for key, value in flat(to_dict(config)).items() if not key.startswith(_FREE)}
    evaluated = {"evaluate.rule", *["evaluate.batch_size"] * (config.evaluate.rule == "batch_max")}
    # Evaluation decides which checkpoint is the best.
    others = evaluated if getattr(getattr(config, stage), "output", "last") == "best" else set()
    decisive, content = dict[str, Any](), dict[str, Any]()
    for key, value in whole.items():
        section, _, name = key.partition(".")
        if section in STAGES:
            free = name in _FREE_IN_STAGE or key in _FREE_BATCHES
            free |= key == "evaluate.batch_size" and key not in evaluated
            if key in others or (section == stage and not free):
                decisive[key] = value
        elif key in _CONTENT:
            content[key] = value
        else:
            decisive[key] = value
    return decisive, content


def read_made(directory: Path) -> dict[str, Any]:
    """Returns the content of a stage's made_from.json; {} if it has none of this format."""
    path = directory / NAME
    made = read_json(path) if path.exists() else {}
    return made if isinstance(made, dict) and made.get("format") == FORMAT else {}


def _begun(directory: Path) -> bool:
    """Whether a stage has written anything; a try that failed because of a wrong path has not."""
    return any(path.name != NAME for path in directory.glob("*"))


def check_settings(experiment: Experiment) -> None:
    """Raises `UserError` if a stage of the work directory was begun with other settings.

    Stage evaluate is left out: it is cheap, and `settle` runs it again.
    """
    workdir, found = experiment.workdir, dict[str, list[str]]()
    for stage in STAGES:
        directory = workdir / stage
        if not _begun(directory):
            continue
        made = read_made(directory)
        if not made and not (workdir / "config.json").exists():
            continue
        try:
            stored = build_stored(made.get("config") or read_json(workdir / "config.json"), directory)
        except UserError as error:  # of a version with other keys
            raise UserError(f"{error}; choose another `workdir`") from error
        if stage == "evaluate" and (made or experiment.finished(stage) is None):
            continue
        (old, old_content), (new, new_content) = (settings_of(x, stage) for x in (stored, experiment.config))
        lines = _lines(old, new)
        moved = _lines(old_content, new_content)
        if moved and not _same_contents(experiment, made, [line.partition(":")[0] for line in moved]):
            lines += moved
        for line in lines:
            found.setdefault(line, []).append(stage)
    if found:
        begun = list(dict.fromkeys(stage for stages in found.values() for stage in stages))
        folders = ", ".join(str(workdir / stage) for stage in begun)
        belongs = "this work directory belongs to another configuration, which differs in"
        differ = "\n  ".join([belongs, *found])
        advice = f"choose another `workdir`, or delete {folders} to make them again"
        raise UserError(f"{workdir}: {differ}\nset the values back, {advice}")


def _lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    values = ((key, old.get(key), new.get(key)) for key in {**old, **new})
    return [f"{key}: {was} -> {now}" for key, was, now in values if was != now]


def _same_contents(experiment: Experiment, made: Mapping[str, Any], moved: Sequence[str]) -> bool:
    """Whether a stage reads the same contents by other settings; what a moved folder lacks does not count."""
    if not made:
        return False
    for key, old in made["data"].items():
        new, lacking = _readable(experiment, key)
        if old is None or (new != old and not (lacking and set(moved) <= set(path_keys()))):
            return False
    models = _models(experiment.config) if made["models"] else {}
    return None not in models.values() and models == made["models"]


def _readable(experiment: Experiment, key: str) -> tuple[Any, str]:
    """Returns the hash of some data; or None and a reason if it is not there. Raises for malformed data."""
    try:
        return experiment.data_digest(key), ""
    except UserError as error:
        cause = error.__cause__  # a file that is missing or cannot be opened, or a library that fails
        if isinstance(error, MissingSplitError) or (cause and not isinstance(cause, ValueError | UserError)):
            return None, str(error)
        raise


# Contents -----------------------------------------------------------------------------------------


def _models(config: RunConfig) -> dict[str, str | None]:
    given = {"model.init": config.model.init, "model.tokenizer": config.model.tokenizer}
    return {key: folder_digest(path) for key, path in given.items() if path not in (None, "scratch")}


def folder_digest(path: str | Path | None) -> str | None:
    """Hashes the files of a model or tokenizer, by folder or hub id; None if it is not on this machine."""
    try:
        files = model_files(local_directory(str(path), download=False))
    except UserError:
        return None
    hashes = {file.name: _hash(file, os.stat(file).st_mtime_ns)["blake2b"] for file in files}
    return _digest(hashes) if hashes else None


@functools.lru_cache(maxsize=256)
def _hash(file: Path, _: int) -> dict[str, Any]:
    return hash_file(file)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def output_digest(experiment: Experiment, stage: Stage) -> str | None:
    """Hashes the outputs of a finished stage; None if they are not there or not known."""
    directory = experiment.workdir / stage.name
    if stage.trains or stage.evaluates:
        return folder_digest((experiment.workdir if stage.evaluates else directory) / "model")
    # Arrays are large and follow from what they were made of.
    made, sizes = read_made(directory), {path.name: path.stat().st_size for path in directory.glob("*.npy")}
    settings = settings_of(build_stored(made["config"], directory), stage.name)[0] if made else {}
    return _digest([settings, made["data"], made["stages"], sizes]) if made and sizes else None


def _made(experiment: Experiment, stage: Stage, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Returns what a stage is made from now. Logs a warning if a finished stage's data cannot be read."""
    data, finished = dict[str, Any](), experiment.finished(stage.name) is not None
    for key in stage.reads_data(experiment):
        data[key], problem = _readable(experiment, key) if finished else (experiment.data_digest(key), "")
        if problem:
            unknown = "finished before; whether its data has changed cannot be seen"
            logger.warning("%s: %s (%s)", stage.name, unknown, problem)
            break
    return {
        "format": FORMAT,
        "config": to_dict(experiment.config),
        "data": data,
        "models": _models(experiment.config) if stage.trains and not stage.starts_from else {},
        "stages": _upstream(experiment, stage, stages),
    }


def _upstream(experiment: Experiment, stage: Stage, stages: Mapping[str, Stage]) -> dict[str, str | None]:
    return {name: output_digest(experiment, stages[name]) for name in stage.reads(experiment.config)}


# Stale stages -------------------------------------------------------------------------------------


def _changes(made: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> Iterator[str]:
    """Yields what a stage was made from that is not as it was."""
    if not made:
        return
    for part, name in (("data", "data {}"), ("models", "{}"), ("stages", "stage {}")):
        old, new = made.get(part, {}), now.get(part, {})
        if part == "stages":
            yield from (f"it now reads stage {key}" for key in new if key not in old)
            yield from (f"it no longer reads stage {key}" for key in old if key not in new)
        for key in (key for key in old if key in new and None not in (old[key], new[key])):
            if old[key] != new[key]:
                yield f"{name.format(key)} changed"
    if "config" in now:
        configs = (build_stored(x["config"], Path(stage)) for x in (made, now))
        yield from _lines(*(settings_of(config, stage)[0] for config in configs))


def stale(experiment: Experiment, stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """Returns why a finished stage is stale, as far as that shows without reading data; [] if it is not."""
    made = read_made(experiment.workdir / stage.name)
    now = {"stages": _upstream(experiment, stage, stages), "config": to_dict(experiment.config)}
    return [*_changes(made, now, stage.name), *_lost(experiment, stage, made)]


def _lost(experiment: Experiment, stage: Stage, made: Mapping[str, Any]) -> Iterator[str]:
    if experiment.finished(stage.name) is not None:
        digest = output_digest(experiment, stage)
        if digest is None and (made or stage.trains):
            yield "its output is missing"
        elif made and made.get("output") not in (None, digest):
            yield "its output is not as it was written"


def check_upstream(
    experiment: Experiment, stage: Stage, stages: Mapping[str, Stage], done: Sequence[str], needed_by: str
) -> None:
    """Raises `UserError` if a stage that this one reads, directly or not, is stale; `done` are not."""
    for name in stage.reads(experiment.config):
        if name in done or experiment.finished(name) is None:
            continue
        reasons = stale(experiment, stages[name], stages)
        made = read_made(experiment.workdir / name).get("data", {})
        # The stages may read parts of one split, `train` and `train[:2000]`.
        splits = {key.partition("[")[0] for key in stages[needed_by].reads_data(experiment)}
        keys = [key for key in made if key.partition("[")[0] in splits]
        now = {"data": {key: experiment.data_digest(key) for key in keys}}
        if reasons := [*reasons, *_changes({"data": made}, now, name)]:
            where = f"{experiment.workdir / name}: stage {needed_by} needs this, which is stale"
            advice = experiment.how_to_run(name, needed_by)
            raise UserError(f"{where} ({'; '.join(reasons)}); {advice}")
        check_upstream(experiment, stages[name], stages, done, needed_by)


def settle(experiment: Experiment, stage: Stage, stages: Mapping[str, Stage]) -> bool:
    """Returns whether a stage is finished and made from what is there now; else makes room to run it.

    A stale stage is moved to `STAGE.old`, or taken back from there if that one fits. A stage whose output was
    lost keeps its checkpoints.
    """
    directory = experiment.workdir / stage.name
    begun, finished = _begun(directory), experiment.finished(stage.name) is not None
    if not finished:
        for name in stage.reads(experiment.config):
            experiment.output_of(name, "model" if stages[name].trains else "", stage.name)
    made, now = read_made(directory), _made(experiment, stage, stages)
    if begun and (reasons := [*_changes(made, now, stage.name)]):
        old = directory.with_name(f"{stage.name}.old")
        fits = (old / "done.json").exists() and not [*_changes(read_made(old), now, stage.name)]
        note = f"taken back from {old}" if fits else f"made again, {old} has the files of before"
        if stage.evaluates:
            note = "made again"
            shutil.rmtree(directory)
        else:
            _swap(directory, old, back=fits)
        logger.warning("%s: stale (%s); %s", stage.name, "; ".join(reasons), note)
        made, finished = read_made(directory), fits and not stage.evaluates
    if finished and made and None not in now["data"].values() and made["config"] != now["config"]:
        made |= {"config": now["config"]}  # contents are the same: from now on these paths count
        write_json(directory / NAME, made)
    if finished:
        for reason in _lost(experiment, stage, made):
            logger.warning("%s: %s; made again", stage.name, reason)
            (directory / "done.json").unlink()
            finished = False
    if not finished:
        write_json(directory / NAME, now)
    return finished


def _swap(directory: Path, old: Path, *, back: bool) -> None:
    """Moves a folder to `old`, and if `back` the one that is there to its place."""
    aside = directory.with_name(f"{directory.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    if back:
        os.replace(old, aside)
    else:
        shutil.rmtree(old, ignore_errors=True)
    os.replace(directory, old)
    if back:
        os.replace(aside, directory)


def finish(experiment: Experiment, stage: Stage) -> None:
    """Records the hash of a stage's outputs."""
    directory = experiment.workdir / stage.name
    made = read_made(directory)
    if made["models"]:  # which may have been downloaded by now
        made["models"] = _models(experiment.config)
    write_json(directory / NAME, {**made, "output": output_digest(experiment, stage)})
