"""Time the variants of running one model, side by side on the same texts."""

import dataclasses
import functools
import importlib.util
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError
from trbert_jax.inference import benchmark_report as report
from trbert_jax.inference.benchmark_report import VARIANTS, PreparedRun, Record
from trbert_jax.inference.engine import CompiledForward, InferenceEngine, Inputs, bucket_widths
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.export import build
from trbert_jax.inference.lines import PAUSE, Source, Text
from trbert_jax.inference.predictor import TRBert
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.engines import ENGINES, FILE, Graph
from trbert_jax.model.model import Params, TokenReducingModel, init_params
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.reduction.flops import EncoderShape, dense_flops, reduced_flops
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES, RuleSpec, Threshold, point_thresholds
from trbert_jax.reduction.selection import Rule, keep_batch_max, min_logit, random_key
from trbert_jax.tasks.classification import encode_texts
from trbert_jax.tasks.examples import Examples, pad_batch

logger = logging.getLogger(__name__)

Name = TypeVar("Name")

BATCH_SIZES = (1, 8, 32, 128)
SIZES = {
    "bert-base": ModelConfig(),
    "minilm": ModelConfig(hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536),
    # Too small to measure speed; shows that a benchmark runs.
    "tiny": ModelConfig(
        hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32, max_positions=256, max_length=256
    ),
}
_REFERENCE_BATCH = 32
_SETTLE_SECONDS = 0.02  # threads of one library may spin for a while after their work


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Texts, or questions, in the order of their arrival."""

    examples: Examples  # n tokenized texts, or questions of R rows
    max_length: int  # width of the full-length variants
    actions: np.ndarray | None = None  # bool [n, stages, max_length], tokens to keep; None: the model decides
    min_logit: tuple[float, ...] = (0.0, 0.0)  # of each point of reduction, see `selection.min_logit`

    def whole_batches(self, batch_size: int) -> Examples:
        """Returns the examples of full batches; the others are not run."""
        return self.examples.take(np.arange(len(self.examples) // batch_size * batch_size))

    def batches(self, batch_size: int, widths: Sequence[int]) -> Iterator[tuple[np.ndarray, Inputs]]:
        """Pads the full batches, in order, each to the smallest width (ascending) that holds it.

        Yields positions of the texts, int [B], and arrays with the rule's inputs `min_logit` float32 [B * G,
        stages] and, if actions are given, `actions` bool [B, stages, W].
        """
        for index in np.arange(len(self.whole_batches(batch_size))).reshape(-1, batch_size):
            longest = self.examples.lengths[index].max()
            width = next(width for width in widths if width >= longest)
            batch = pad_batch(self.examples, index, batch_size, width)
            batch["min_logit"] = np.tile(np.array(self.min_logit, np.float32), (len(batch["input_ids"]), 1))
            if self.actions is not None:
                batch["actions"] = self.actions[index, :, :width]
            yield index, batch


def prepare(
    name: str, programs: CompiledForward, params: Params, workload: Workload, batch_size: int
) -> PreparedRun:
    """Compiles a variant for all batches of a workload and runs each batch once."""
    variant, model, longest = VARIANTS[name], programs.model, workload.max_length
    if variant.backend == "torch":
        return _prepare_torch(name, model, params, workload, batch_size)
    if variant.backend in ENGINES:
        return _prepare_exported(name, model.config, params, workload, batch_size)
    rule = RULES[variant.rule]
    if workload.actions is not None:
        rule = _GIVEN.get(rule.name, rule)
    widths = (longest,) if variant.full_length else bucket_widths(variant.backend, longest)
    numbered = list(workload.batches(batch_size, widths))
    examples = workload.whole_batches(batch_size)
    engine = InferenceEngine(model, batch_size, programs)
    outputs = engine.run_batches(params, examples, numbered, rule, variant.backend)

    def run(program: Any, batch: Inputs) -> Any:
        return jax.block_until_ready(program(params, batch))

    batches = [batch for _, batch in numbered]
    compiled = [programs.get(params, batch, rule, variant.backend) for batch in batches]
    keys = {programs.key(batch, rule, variant.backend) for batch in batches}
    shapes = [batch["input_ids"].shape for batch in batches]
    lengths, kept = examples.row_lengths, outputs.num_kept
    if variant.backend == "masked":  # computes padding too, and dropped tokens to the end
        lengths = np.concatenate([np.full(rows, width) for rows, width in shapes])
        kept = np.repeat(lengths[:, None], model.config.num_reductions, axis=1)
    shape = EncoderShape.of(model.config)
    flops = reduced_flops(shape, lengths, kept) if rule.drops else dense_flops(shape, lengths)
    return PreparedRun(
        name=name,
        calls=[functools.partial(run, *pair) for pair in zip(compiled, batches, strict=True)],
        num_texts=len(examples),
        flops=float(flops.sum() / len(examples)),
        logits=outputs.logits,
        keep=outputs.kept_masks(longest) if rule.drops else None,
        compile_seconds=sum(programs.compile_seconds[key] for key in keys),
        peak_memory_bytes=max(memory_bytes(program) for program in compiled),
    )


def _given(batch: Inputs) -> Rule:
    """Keeps the tokens of `batch["actions"]`."""
    actions = jnp.swapaxes(batch["actions"], 0, 1)  # [stages, B, S]
    # Reads the logits too: the compiler would remove selectors whose result is not used.
    return lambda stage, logits, valid: actions[stage] & (logits > -jnp.inf) & valid


def _given_batch_max(batch: Inputs) -> Rule:
    given, sign = _given(batch), lambda kept: jnp.where(kept, 1.0, -1.0)
    return lambda stage, logits, valid: keep_batch_max(stage, sign(given(stage, logits, valid)), valid)


_GIVEN = {
    "threshold": RuleSpec("given", "keep given tokens", _given),
    "batch_max": RuleSpec("given_batch_max", "fill rows of given tokens up", _given_batch_max, exact=False),
}


def memory_bytes(program: Any) -> int:
    """Returns a compiled program's peak memory by the compiler's plan: arguments, outputs, temporaries."""
    plan = program.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return int(total - plan.alias_size_in_bytes)


def time_runs(
    runs: Mapping[Name, Sequence[Callable[[], Any]]], repeats: int, label: str = ""
) -> dict[Name, np.ndarray]:
    """Times functions in turns: all calls of one run, then of the next; and again, `repeats` times.

    The functions wait for their results; `label` begins each message. Returns name -> seconds of each call,
    float64 [repeats, calls].
    """
    seconds = {name: np.zeros((repeats, len(calls))) for name, calls in runs.items()}
    for repeat in range(repeats):
        logger.info("%srepeat %d of %d", label, repeat + 1, repeats)
        for name, calls in runs.items():
            time.sleep(_SETTLE_SECONDS)
            for number, call in enumerate(calls):
                start = time.perf_counter()
                call()
                seconds[name][repeat, number] = time.perf_counter() - start
    return seconds


def torch_available() -> bool:
    """Whether PyTorch is installed for the kind of device that JAX runs on."""
    if importlib.util.find_spec("torch") is None:
        return False
    if jax.default_backend() == "cpu":
        return True
    import torch

    return jax.default_backend() == "gpu" and bool(torch.cuda.is_available())


def _prepare_torch(
    name: str, ours: TokenReducingModel, params: Params, workload: Workload, batch_size: int
) -> PreparedRun:
    """Prepares Hugging Face's dense model, each batch padded to its longest text."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"  # without the selectors, which it does not know
        save_pretrained(path, ours.config, jax.device_get(params), None, exclude=("selectors",))
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    model = model.to(device, getattr(torch, jnp.dtype(ours.dtype).name))
    torch.set_num_threads(report.num_cores())

    def run(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            placed = {key: value.to(model.device) for key, value in inputs.items()}
            return model(**placed).logits.float().cpu().numpy()

    calls, widths = [], []
    for _, batch in workload.batches(batch_size, (workload.max_length,)):
        widths.append(batch["mask"].sum(-1).max())
        arrays = {"input_ids": batch["input_ids"], "attention_mask": batch["mask"]}
        inputs = {name: torch.tensor(array[:, : widths[-1]]).long() for name, array in arrays.items()}
        calls.append(functools.partial(run, inputs))
    logits = np.concatenate([call() for call in calls])
    flops = float(dense_flops(EncoderShape.of(ours.config), np.repeat(widths, batch_size)).mean())
    return PreparedRun(name, calls, len(logits), flops, logits)


def _prepare_exported(
    name: str, config: ModelConfig, params: Params, workload: Workload, batch_size: int
) -> PreparedRun:
    """Prepares a graph and its engine; each batch is as wide as its longest text."""
    variant, points = VARIANTS[name], config.num_reductions
    reduces, given = RULES[variant.rule].drops, workload.actions is not None
    with tempfile.TemporaryDirectory() as folder:
        path, chosen = Path(folder) / FILE, (0.5,) * points if reduces else None
        # A single text has no padding, and the fastest dense graph nothing to spare it.
        options: Any = {"given": given and reduces, "padded": not reduces and batch_size == 1}
        build(path, config, params, chosen, quantize=variant.quantize, **options)
        graph = Graph(path.read_bytes(), variant.backend, variant.dtype)
    least = -np.inf if given else np.array(workload.min_logit)
    inputs, logits, keep = list[dict[str, np.ndarray]](), list[np.ndarray](), list[np.ndarray]()
    for index, batch in workload.batches(batch_size, range(1, workload.max_length + 1)):
        types = batch.get("token_type_ids", np.zeros_like(batch["input_ids"]))
        arrays = {"input_ids": batch["input_ids"], "attention_mask": batch["mask"], "token_type_ids": types}
        found = {key: x.astype(np.int64) for key, x in arrays.items()}
        found["threshold"] = np.broadcast_to(1 / (1 + np.exp(-least)), points).astype(np.float32)
        if given:
            found["actions"] = np.ascontiguousarray(np.swapaxes(batch["actions"], 0, 1))
        inputs.append(found)
        outputs = graph.run(found)
        logits.append(outputs["logits"])
        kept = np.zeros((len(index), points if reduces else 0, workload.max_length), bool)
        for stage in range(kept.shape[1]):
            kept[:, stage, : batch["mask"].shape[1]] = outputs[f"kept_{stage}"]
        keep.append(kept)
    shape, lengths = EncoderShape.of(config), workload.whole_batches(batch_size).row_lengths
    masks = np.concatenate(keep)
    flops = reduced_flops(shape, lengths, masks.sum(-1)) if reduces else dense_flops(shape, lengths)
    calls = [functools.partial(graph.run, x) for x in inputs]
    return PreparedRun(
        name, calls, len(lengths), float(flops.mean()), np.concatenate(logits), masks if reduces else None
    )


def benchmark_file(
    data: str | Path,
    *,
    model_dir: str | Path | None = None,
    random: str | None = None,
    replay_dir: str | Path | None = None,
    batch_sizes: Sequence[int] | None = None,
    variants: Sequence[str] | None = None,
    max_texts: int | None = None,
    max_length: int | None = None,
    repeats: int = 5,
    dtype: str = "float32",
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    command: str | None = None,
    skip_bad_records: bool = False,
) -> list[Record]:
    """Times the variants of running a model on the same texts, in the order of the file.

    Args:
      data: texts in any format of `datasets.tables`, or one text per line; for a model that answers
        questions a file in the published format of its data set.
      model_dir, max_length, dtype: see `TRBert.from_pretrained`.
      random: in place of a model, a key of `SIZES`: random weights, tokenizer and labels of `replay_dir`.
      replay_dir: a model whose kept tokens the model under test keeps.
      batch_sizes: None takes those of `BATCH_SIZES` that the texts are enough for.
      variants: keys of `VARIANTS`; None takes all that can run.
      max_texts: number of texts (of questions: inputs) to read; None reads all.
      repeats: passes over all variants.
      threshold, operating_point: see `TRBert.predict`; of the replayed model if one is given. Variant
        batch_max has neither.
      command: what the user typed, for the records.
      skip_bad_records: skip malformed records, instead of raising an error.

    Returns:
      The records of `make_records`, with what describes the run, the data and the machine, `tokens` (mean of
      a text), and for bfloat16 the values of `drift`.

    Raises `UserError` for an unreadable model or file, an unknown variant, too few texts, or an unfit replay.
    """
    names = _check_variants(variants)
    replayed = None if replay_dir is None else TRBert.from_pretrained(replay_dir, max_length=max_length)
    if random is not None:
        model = _random_model(random, replayed, dtype)
    elif model_dir is not None:
        model = TRBert.from_pretrained(model_dir, max_length=max_length, dtype=dtype)
    else:
        raise ValueError("model_dir or random is needed")
    selecting = replayed or model
    threshold = find_thresholds(selecting.config.operating_points, operating_point, threshold=threshold)
    thresholds = point_thresholds(threshold, selecting.config.num_reductions)
    if set(thresholds) != {DEFAULT_THRESHOLD}:
        if "batch_max" in (variants or ()):
            raise UserError("--variants: batch_max keeps tokens from keep probability 0.5 on only")
        names = [name for name in names if name != "batch_max"]
    actions = None
    if model.answers_questions:
        if replayed is not None:
            raise UserError("--replay: kept tokens are replayed for models that label texts only")
        if elsewhere := [x for x in variants or () if VARIANTS[x].backend in ("torch", *ENGINES)]:
            raise UserError(f"--variants: {elsewhere[0]} is compared for models that label texts only")
        others = ("torch", *ENGINES)
        names = [name for name in names if VARIANTS[name].backend not in others]
        examples = read_examples(model, Path(data), BadRecords(skip=skip_bad_records))
        examples = examples.take(range(len(examples))[:max_texts])
    else:
        model.check_use(questions=False, trained=False)
        bad = BadRecords(skip=skip_bad_records)
        found = Source(path=Path(data)).texts(model.config.inputs.fields(), bad)
        texts = list(itertools.islice((text for text in found if text is not PAUSE), max_texts))
        examples = _encode(texts, model, str(data))
        if replayed is not None:
            logger.info("computing the tokens that %s keeps", replay_dir)
            actions = _actions_of(replayed, str(replay_dir), texts, model, examples, thresholds)
    least = tuple(map(min_logit, thresholds))
    workload, count = Workload(examples, model.config.max_length, actions, least), len(examples)
    sizes = list(dict.fromkeys(batch_sizes or [size for size in BATCH_SIZES if size <= count]))
    if max(sizes) > count:
        raise UserError(f"--batch-sizes: {max(sizes)} is more than the {count} texts of {data}")
    about: Record = {
        "dtype": dtype,
        "model": str(random or model_dir),
        "replay": None if replay_dir is None else str(replay_dir),
        "max_length": model.config.max_length,
        "thresholds": thresholds,
        "repeats": repeats,
        "command": command,
        **report.described(Path(data)),
        **report.machine(),
    }
    exact = TRBert(model.config, model.params)

    @functools.cache
    def float32_run(name: str) -> PreparedRun:
        return prepare(name, exact.programs, exact.params, workload, min(_REFERENCE_BATCH, count))

    records = []
    for size in sizes:
        runs = []
        for name in names:
            logger.info("batch size %d: preparing %s", size, name)
            runs.append(prepare(name, model.programs, model.params, workload, size))
        seconds = time_runs({run.name: run.calls for run in runs}, repeats, f"batch size {size}: ")
        about["tokens"] = float(workload.whole_batches(size).row_lengths.mean())
        for run, record in zip(runs, report.make_records(runs, seconds, size), strict=True):
            if dtype != "float32":
                reference = None  # batch_max compares only with the same batches
                if run.name != "batch_max":
                    reference = float32_run("dense" if run.keep is None else "packed")
                record |= report.drift(run, reference, examples.row_lengths, given=actions is not None)
            records.append({**record, **about})
    return records


def _check_variants(names: Sequence[str] | None) -> list[str]:
    possible = [name for name, variant in VARIANTS.items() if _can_run(variant.backend)]
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"--variants: unknown variant {name!r}; expected some of {', '.join(VARIANTS)}")
        if name not in possible:
            raise UserError(
                f"--variants: {name} needs {VARIANTS[name].backend}: "
                f"pip install 'trbert-jax[{VARIANTS[name].backend}]'"
            )
    return list(dict.fromkeys(names or possible))


def _can_run(backend: str) -> bool:
    if backend == "torch":
        return torch_available()
    needed = ("spox", backend) if backend in ENGINES else ()
    return all(importlib.util.find_spec(package) for package in needed)


def _random_model(size: str, replayed: TRBert | None, dtype: str) -> TRBert:
    if size not in SIZES:
        raise UserError(f"--random: unknown size {size!r}; expected one of {', '.join(SIZES)}")
    if replayed is None:
        raise UserError("--random needs the tokenizer and kept tokens of another model: --replay DIR")
    fields = ("vocab_size", "max_positions", "max_length", "labels")
    config = dataclasses.replace(SIZES[size], **{name: getattr(replayed.config, name) for name in fields})
    return TRBert(config, init_params(config, random_key(0)), replayed.tokenizer, dtype=dtype)


def _encode(texts: Sequence[Text], model: TRBert, source: str) -> Examples:
    records = [Example(f"{source}: text {i}", x.text, 0, x.pair) for i, x in enumerate(texts, 1)]
    return encode_texts(records, model.require_tokenizer(), model.config.max_length)


def _actions_of(
    replayed: TRBert,
    name: str,
    texts: Sequence[Text],
    model: TRBert,
    examples: Examples,
    thresholds: tuple[float, ...],
) -> np.ndarray:
    """Returns what the replayed model keeps, bool [n, stages, max_length]."""
    for field in ("num_reductions", "max_length"):
        theirs, ours = getattr(replayed.config, field), getattr(model.config, field)
        if theirs != ours:
            raise UserError(f"--replay: {name} has {field} {theirs}, the model under test {ours}")
    if not np.array_equal(_encode(texts, replayed, name).tokens, examples.tokens):
        raise UserError(f"--replay: {name} splits the texts into other tokens; it needs the same tokenizer")
    engine = replayed.engine(min(_REFERENCE_BATCH, len(examples)))
    options: Any = {} if replayed.default_rule == "dense" else {"threshold": thresholds}
    outputs = engine.run(replayed.params, examples, rule=replayed.default_rule, **options)
    return outputs.kept_masks(model.config.max_length)
