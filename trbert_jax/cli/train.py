"""Commands that train: `train`, `sweep`, `prepare-data`, `split-hyperpartisan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trbert_jax import io
from trbert_jax.cli.arguments import (
    AMOUNT,
    CONFIG,
    COUNT,
    FACTOR,
    FIELDS,
    INDEX,
    LABEL_FIELD,
    NAME,
    OVERRIDES,
    SKIP,
    STEPS,
    Arguments,
    chosen,
    command,
    config_of,
    found_path,
    list_of,
    option,
    path_option,
    switch,
)
from trbert_jax.errors import UserError
from trbert_jax.io import streams

if TYPE_CHECKING:
    from trbert_jax.config import RunConfig


def _own_run(args: Arguments) -> RunConfig:
    """Returns the settings of `train --data`."""
    from trbert_jax.training.own_run import choose_settings

    data = {key: value for key, value in chosen(args, OWN).items() if value}
    if args.skip_bad_records:
        data["skip_bad_records"] = True
    return choose_settings(args.data, args.model, args.output, data, args.overrides, args.speedup)


OWN = "dev test unlabeled text_field text_pair_field label_field"


@command(
    "train",
    path_option("inputs", "--config", "FILE", "YAML file with the settings of the run"),
    option("--data", "FILE", str, "labeled texts, a folder with train.csv and the like, or hf:NAME"),
    option("--model", "DIR", str, "for --data: folder or hub id of the model to start from, or scratch"),
    option("--output", "DIR", str, "for --data: folder of the run; the model will be in DIR/model"),
    option(
        "--speedup", "X", FACTOR, "for --data: times fewer FLOPs to reach (default 3; less for few layers)"
    ),
    *(option(f"--{name}", "FILE", str, f"for --data: {name} set") for name in ("dev", "test")),
    option("--unlabeled", "FILE", str, "for --data: more texts, whose labels are not read"),
    *FIELDS,
    LABEL_FIELD,
    option("--stages", "A,B", list_of(NAME), "run only these stages"),
    switch("--dry-run", "print the plan for --devices of --processes, and do nothing"),
    option("--devices", "N", COUNT, "devices, for --dry-run (default 1)"),
    option("--processes", "P", COUNT, "processes, for --dry-run (default 1)"),
    option("--profile-steps", "A:B", STEPS, "record a profile of updates A to B of each stage"),
    switch("--distributed", "join the processes that SLURM, Open MPI, Kubernetes or Cloud TPU has started"),
    option("--coordinator", "HOST:PORT", str, "join several processes: address of process 0"),
    option("--num-processes", "N", COUNT, "number of processes, for --coordinator"),
    option("--process-id", "I", INDEX, "number of this process, for --coordinator"),
    option("--join-timeout", "S", COUNT, "seconds to wait for the others (default 300)", default=300),
    SKIP,
    OVERRIDES,
)
def _train(args: Arguments) -> None:
    """Train a model through all stages, or continue an interrupted run.

    --data, --model and --output train on your own texts without a YAML file. Settings are chosen by the
    number and length of the texts, and written to OUTPUT/run.yaml; key=value replaces them.

    The stages run in order:
    {stages}
    Run again, the command skips finished stages and continues the one that was interrupted.

    Examples:
      trbert train --data reviews.csv --model google-bert/bert-base-uncased --output runs/reviews
      trbert train --config configs/imdb_bert.yaml data.path=~/imdb workdir=/tmp/imdb policy.alpha=2
      trbert train --config configs/imdb_bert.yaml --stages finetune,score
    """
    if not args.dry_run and (args.devices or args.processes):
        raise UserError("--devices and --processes need --dry-run; a run uses all devices")
    given = [x is not None for x in (args.coordinator, args.num_processes, args.process_id)]
    if any(given) and (args.distributed or not all(given)):
        raise UserError("--coordinator, --num-processes and --process-id go together, without --distributed")
    if all(given) and args.process_id >= args.num_processes:
        raise UserError(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    own = [name for name, value in chosen(args, f"data model output speedup {OWN}").items() if value]
    if bool(own) == bool(args.config):
        raise UserError("expected --config, or --data with --model and --output")
    if own and not (args.data and args.model and args.output):
        option, needed = own[0].replace("_", "-"), "--data FILE --model DIR --output DIR"
        raise UserError(f"--{option} is for training on your own texts, which needs {needed}")
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"  # leave accelerators to others
    config = _own_run(args) if own else config_of(args)  # before the slow import
    if args.dry_run:
        from trbert_jax.training import dry_run
        from trbert_jax.training.experiment import Experiment

        streams.show(*dry_run.lines(Experiment(config), args.devices or 1, args.processes or 1))
        return
    io.enable_compilation_cache()
    if args.distributed or args.coordinator is not None:
        from trbert_jax.parallel import join

        join(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
    from trbert_jax.training.run import results_table, train

    options = {"write_settings": True} if own else {}
    results = train(config, args.stages, profile_steps=args.profile_steps, **options)
    streams.show(*results_table(config, results))


@command(
    "sweep",
    CONFIG,
    option("--targets", "X,X", list_of(FACTOR), "train a run for each of these speed-ups in FLOPs"),
    option("--alphas", "X,X", list_of(AMOUNT), "or for each of these penalties on kept tokens"),
    SKIP,
    OVERRIDES,
)
def _sweep(args: Arguments) -> None:
    """Train one run for each of several speeds, sharing the stages before.

    Prints, and writes to WORKDIR/sweep.csv and sweep.png, the metric, FLOPs and measured speed of each run,
    and of its operating points. WORKDIR/shared has the shared stages, WORKDIR/target_3 a run. Run again, the
    command goes on where it stopped.

    Example:
      trbert sweep --config configs/imdb_minilm_plus.yaml --targets 2,3,4
    """
    if bool(args.targets) == bool(args.alphas):
        raise UserError("one of --targets and --alphas is needed")
    config = config_of(args)
    io.enable_compilation_cache()
    from trbert_jax.training.sweep import PICTURE, TABLE, sweep, sweep_table

    key, values = ("target_speedup", args.targets) if args.targets else ("alpha", args.alphas)
    streams.show(*sweep_table(sweep(config, key, values)))
    streams.show(*(f"{config.workdir}/{name}" for name in (TABLE, PICTURE)))


@command(
    "prepare-data",
    CONFIG,
    option("--output", "DIR", found_path, "folder of the shards", required=True),
    option("--shard-size", "N", COUNT, "examples per shard (default 4096)", default=4096),
    option("--workers", "N", COUNT, "shards written at a time (default 2)", default=2),
    SKIP,
    OVERRIDES,
)
def _prepare_data(args: Arguments) -> None:
    """Tokenize a data set once, into shards.

    Training reads the shards with data.prepared=DIR, as TensorFlow Datasets does. Started again, the command
    continues.

    Example:
      trbert prepare-data --config configs/yelp_f_bert.yaml --output prepared/yelp_f data.path=data/yelp_f
    """
    config = config_of(args)
    from trbert_jax.training.experiment import Experiment

    Experiment(config).prepare_data(args.output, args.shard_size, args.workers)


@command(
    "split-hyperpartisan",
    option("--input", "PATH", Path, "original_data.txt, articles-*.xml, or a folder", required=True),
    option("--output", "DIR", Path, "folder for the three files", required=True),
)
def _split_hyperpartisan(args: Arguments) -> None:
    """Split the Hyperpartisan articles.

    Writes the published split, shuffled with a fixed seed: train.jsonl, dev.jsonl and test.jsonl.

    Example:
      trbert split-hyperpartisan --input original_data.txt --output data/hyperpartisan
    """
    from trbert_jax.datasets.hyperpartisan import split_hyperpartisan

    for name, count in split_hyperpartisan(args.input, args.output).items():
        streams.show(f"{args.output}/{name}.jsonl: {count} articles")
