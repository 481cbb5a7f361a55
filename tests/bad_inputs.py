"""What a user can get wrong, case by case: the command, what it has to say, how the mistake is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spoiling import (
    BENCHMARK,
    CONVERT,
    EVALUATE,
    FINETUNE,
    PREDICT,
    RECORDS,
    WEIGHTS,
    Case,
    append,
    corrupt,
    cut,
    cut_scores,
    forbid,
    remove,
    scale_weights,
    scores_of_other_data,
    set_json,
    unfinished_shards,
    write,
)

CONFIG_CASES = [
    Case(
        "unknown key",
        FINETUNE,
        ("config.yaml:9: policy.alpah: unknown key", "did you mean policy.alpha?"),
        append("config.yaml", "policy: {alpah: 2}\n"),
        leaves="",
    ),
    Case(
        "unknown key on the command line",
        f"{FINETUNE} modle.max_length=8",
        ("command line: modle: unknown key", "did you mean model?"),
        leaves="",
    ),
    Case(
        "wrong type",
        FINETUNE,
        ("config.yaml:10: policy.num_samples: ", '"many"'),
        append("config.yaml", "policy:\n  num_samples: many\n"),
        leaves="",
    ),
    Case(
        "out of range",
        f"{FINETUNE} policy.guide_rate=1.5",
        ("command line: policy.guide_rate: ", "1.5"),
        leaves="",
    ),
    Case("missing config", FINETUNE, ("config.yaml: no such file",), remove("config.yaml"), leaves=""),
    Case("empty config", FINETUNE, ("config.yaml: ", "configs/"), write("config.yaml", ""), leaves=""),
    Case(
        "unknown stage",
        "train --config config.yaml --stages finetune,polish",
        ("--stages", "'polish'", "expected some of finetune, score"),
        leaves="",
    ),
]

LINE = json.dumps(RECORDS[0]) + "\n"
# What stands in a data file, and what is said after the file's name.
BAD_DATA: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty file": ("", (": has no usable record",)),
    "malformed line": (
        LINE + '{"text": "a"\n' + LINE,
        (":2: not valid JSON (", "expected one object a line"),
    ),
    "malformed line after odd line ends": (
        '{"text": "good\u2028and\u0085bad", "label": 1}\n' * 2 + "x\n",
        (":3: not valid JSON (",),
    ),
    "label out of range": (
        LINE + '{"text": "a", "label": 2}\n',
        (":2: label: is 2",),
    ),
    "missing field": (LINE + '{"text": "a"}\n', (":2: label: missing",)),
    "unreadable encoding": (
        LINE.encode() + '{"text": "caf\u00e9", "label": 1}\n'.encode("latin-1"),
        (":2: not UTF-8", "convert it to UTF-8"),
    ),
    "empty text": (LINE + '{"text": "", "label": 1}\n', (":2: text: is empty",)),
    "text without tokens": (
        LINE + '{"text": "\u200b", "label": 1}\n' + LINE * 8,
        (":2: the text has no tokens; remove the example",),
    ),
}
DATA_CASES = [
    Case(f"{name}, {command.split()[0]}", command, tuple(words), write(path, content))
    for name, (content, said) in BAD_DATA.items()
    for command, path in ((FINETUNE, "data/train.jsonl"), (EVALUATE, "data/test.jsonl"))
    # A text without tokens is found after reading and is called as in predictions.jsonl.
    for words in [(Path(path).name + said[0] if "tokens" in name else path + said[0], *said[1:])]
] + [
    Case("missing data, train", FINETUNE, ("train.jsonl",), remove("data/train.jsonl")),
    Case("missing data, evaluate", EVALUATE, ("data/test.jsonl: no such file",), remove("data/test.jsonl")),
    Case(
        "missing data folder",
        f"{FINETUNE} data.path=dada",
        ("data.path: dada", "train.jsonl"),
    ),
    Case(
        "other kind of data",
        EVALUATE.replace("test.jsonl", "test.txt"),
        ("data/test.txt", "expected a .jsonl file (text, label) or a .csv file"),
    ),
    Case(
        "line ends of other kinds are part of a text",
        EVALUATE,
        ("examples                          2\n",),
        write("data/test.jsonl", '{"text": "good\u2028film\u0085bad", "label": 1}\n' * 2),
        code=0,
        leaves=r"out/(result\.json|lines\.jsonl)",
    ),
    Case(
        "a long text is cut, counted and said",
        EVALUATE,
        ("1 of 4 texts are longer than 18 tokens and were cut\n", "examples                          4\n"),
        append("data/test.jsonl", json.dumps({"text": "very " * 5000, "label": 1})),
        code=0,
        leaves=r"out/(result\.json|lines\.jsonl)",
    ),
]

# How a model's folder is spoiled, and what is said.
BAD_MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "other shapes": (
        set_json("model/config.json", intermediate_size=32),
        (
            "model: the weights are not those of a bert model for classification with 4 layers",
            "bert.encoder.layer.3.intermediate.dense.weight: [24, 16] in the checkpoint, [32, 16] expected",
        ),
    ),
    "fewer layers": (
        set_json("model/config.json", num_hidden_layers=5),
        ("missing from the checkpoint", "bert.encoder.layer.4.output.dense.weight [16, 24]"),
    ),
    "truncated weights": (cut(WEIGHTS, 0.5), (f"{WEIGHTS}: truncated or damaged", "again")),
    "truncated header": (cut(WEIGHTS, 0.01), (f"{WEIGHTS}: truncated or damaged", "again")),
    "no bytes": (cut(WEIGHTS, 0), (f"{WEIGHTS}: truncated or damaged", "again")),
    "corrupt weights": (corrupt(WEIGHTS, 8, 40), (f"{WEIGHTS}: truncated or damaged", "again")),
    "corrupt length": (corrupt(WEIGHTS, 0, 8), (f"{WEIGHTS}: truncated or damaged", "again")),
    "corrupt values": (corrupt(WEIGHTS, -400, -1), ("not finite numbers: ", "damaged")),
    "unfinished, no config": (remove("model/config.json"), ("model: no config.json here", "unfinished")),
    "unfinished, no weights": (
        remove(WEIGHTS),
        ("model: no weights here; expected model.safetensors", "unfinished"),
    ),
    "no folder": (lambda: shutil.rmtree("model"), ("model: no such directory",)),
}
MODEL_CASES = [
    Case(f"{name}, {command.split()[0]}", command, words, spoil)
    for name, (spoil, words) in BAD_MODELS.items()
    for command in (EVALUATE, PREDICT, BENCHMARK, CONVERT)
]

STEP_2 = "work/finetune/checkpoints/step_00000002"
MODEL_CASES += [
    Case(
        f"logits that overflow, {command.split()[0]}",
        command,
        ("the model's logits are not finite", "its weights are damaged"),
        scale_weights(3e38),
    )
    for command in (EVALUATE, PREDICT)
]
MODEL_CASES.append(
    Case(
        "half a character in a file",
        "predict --model model --file data/half.jsonl --output out/lines.jsonl --batch-size 1",
        ("data/half.jsonl:40: text is not valid Unicode",),
        write("data/half.jsonl", (json.dumps({"text": "good"}) + "\n") * 39 + '{"text": "a \\ud800"}\n'),
    )
)
RUN_CASES = [
    Case(
        "work directory of another config",
        f"{FINETUNE} finetune.learning_rate=0.01 seed=7",
        (
            "work: this work directory belongs to another configuration",
            "seed: 42 -> 7",
            "finetune.learning_rate: 3e-05 -> 0.01",
            "choose another `workdir`",
        ),
        start="interrupted",
        leaves="",
    ),
    Case(
        "checkpoints of another config",
        "evaluate --config config.yaml --all-checkpoints seed=7 --json out/result.json",
        ("work: this work directory belongs to another configuration", "seed: 42 -> 7"),
        start="interrupted",
        leaves="",
    ),
    Case(
        "no checkpoints",
        "evaluate --config config.yaml --all-checkpoints --json out/result.json",
        ("work: has no checkpoints; run `trbert train`",),
        leaves="",
    ),
    Case(
        "prepared data that is not there",
        f"{FINETUNE} data.prepared=nowhere",
        ("data.prepared: nowhere: no such folder; make it with `trbert prepare-data --output nowhere`\n",),
        leaves="",
    ),
    Case(
        "prepared data that is not finished",
        f"{FINETUNE} data.prepared=shards",
        ("data.prepared: shards is not finished; run `trbert prepare-data` again, it goes on\n",),
        unfinished_shards,
        leaves="",
    ),
    Case(
        "missing inputs of a stage",
        "train --config config.yaml --stages policy",
        ("stage policy needs work/finetune/model, which stage finetune makes", "`--stages finetune,policy`"),
    ),
    Case(
        "missing scores",
        "train --config config.yaml --stages policy",
        ("stage policy needs work/score/scores.npy, which stage score makes", "`--stages score,policy`"),
        start="finetuned",
    ),
    Case(
        "missing inputs of evaluate",
        "train --config config.yaml --stages evaluate",
        ("stage evaluate needs work/policy/model, which stage policy makes", "`--stages policy,evaluate`"),
        start="finetuned",
        leaves=r"work/evaluate/predictions_finetune\.jsonl|work/cache/features-\w+\.npz",
    ),
    Case(
        "a stage that the config leaves out",
        "train --config config.yaml stages=[joint]",
        ("stage joint needs work/policy/model", "add policy to `stages`"),
    ),
    Case(
        "damaged scores",
        "train --config config.yaml --stages policy",
        ("work/score/scores.npy: damaged", "delete work/score to run stage score again"),
        cut_scores,
        start="finetuned",
    ),
    Case(
        "scores of other data",
        "train --config config.yaml --stages policy",
        ("work/score/scores.npy: has 8 entries, of other training data", "delete work/score"),
        scores_of_other_data,
        start="finetuned",
    ),
    Case(
        "damaged model of an earlier stage",
        "train --config config.yaml --stages score",
        ("work/finetune/model/model.safetensors: truncated or damaged",),
        cut("work/finetune/model/model.safetensors", 0.5),
        start="finetuned",
    ),
    Case(
        "damaged checkpoint",
        "evaluate --config config.yaml --all-checkpoints",
        (f"{STEP_2}: damaged checkpoint", "delete this folder, the run then goes on from step 1"),
        remove(f"{STEP_2}/manifest.json"),
        start="interrupted",
    ),
    Case(
        "changed data under a checkpoint",
        FINETUNE,
        (f"{STEP_2}: saved by a run with other settings", "examples: 8 then, 9 now", "delete work/finetune"),
        append("data/train.jsonl", LINE),
        start="interrupted",
    ),
    Case(
        "half-written checkpoint",
        FINETUNE,
        (
            "step_00000003.partial-x7: unfinished checkpoint of a run that was stopped while saving; ignored",
            "finetune: going on from step 2 of 4",
            "finetune: done",
        ),
        made_by="finetuned",
        code=0,
        leaves="work/.*",
    ),
]

WRITE_CASES = [
    Case(
        "Ctrl-C",
        FINETUNE,
        ("trbert: interrupted; run the same command again to go on from the last checkpoint\n",),
        made_by="interrupted",
        code=130,
        leaves="work/.*",
    ),
    Case(
        "work directory below a file",
        f"{FINETUNE} workdir=config.yaml/x",
        ("config.yaml/x: cannot be written",),
    ),
    Case("work directory is a file", f"{FINETUNE} workdir=config.yaml", ("config.yaml: cannot be written",)),
    Case(
        "work directory is a model",
        f"{FINETUNE} workdir=model",
        ("model/config.json: is not a run's configuration", "choose another"),
        leaves="",
    ),
    Case(
        "result below a file",
        EVALUATE.replace("out/result", "config.yaml/result"),
        ("config.yaml/result.json: cannot be written, Not a directory",),
    ),
    Case(
        "predictions into a folder",
        PREDICT.replace("out/lines.jsonl", "data"),
        ("data: is a directory, a file was expected",),
    ),
    Case(
        "model in place of a file",
        CONVERT.replace("out/model", "config.yaml"),
        ("config.yaml: is a file, a directory was expected", "choose another output path"),
    ),
    Case(
        "model in place of other files",
        CONVERT.replace("out/model", "data"),
        ("data: exists and is not empty", "choose another --output"),
    ),
    Case(
        "model in place of other files, with --overwrite",
        CONVERT.replace("out/model", "data --overwrite"),
        ("data: holds what is no part of a model", "dev.jsonl, test.jsonl, train.jsonl", "choose another"),
    ),
    Case(
        "two outputs in one file",
        EVALUATE.replace("out/lines.jsonl", "out/../out/result.json"),
        ("out/../out/result.json: is named for two outputs; give each a file of its own",),
    ),
    Case(
        "no permission for the work directory",
        f"{FINETUNE} workdir=closed/work",
        ("closed/work: no permission to write there; choose another",),
        forbid("closed"),
    ),
    Case(
        "no permission for the result",
        EVALUATE.replace("out/", "closed/"),
        ("closed/result.json: no permission to write there; choose another",),
        forbid("closed"),
    ),
]

# The same again for whoever may do everything, root in a container say, and for what is read.
DENIED_CASES = [
    Case(
        "denied work directory",
        f"{FINETUNE} workdir=closed/work",
        ("closed/work: no permission to write there; choose another",),
        Path("closed").mkdir,
        denied="closed",
    ),
    Case(
        "denied result",
        EVALUATE.replace("out/", "closed/"),
        ("closed/result.json: no permission to write there; choose another",),
        Path("closed").mkdir,
        denied="closed",
    ),
    Case(
        "denied model",
        CONVERT.replace("out/", "closed/"),
        ("closed/model: no permission to write there; choose another",),
        Path("closed").mkdir,
        denied="closed",
    ),
    Case(
        "denied config",
        FINETUNE,
        ("config.yaml: no permission to read it",),
        denied="config.yaml",
        leaves="",
    ),
    Case(
        "denied data",
        EVALUATE,
        ("data/test.jsonl: no permission to read it",),
        denied="data/test.jsonl",
    ),
    Case(
        "denied texts",
        PREDICT.replace("good", "--file data/test.jsonl"),
        ("data/test.jsonl: no permission to read it",),
        denied="data/test.jsonl",
    ),
]

BENCHMARK_CASES = [
    Case(f"{name}, benchmark", command, words, spoil)
    for name, command, words, spoil in (
        ("missing data", BENCHMARK, ("data/test.jsonl: no such file",), remove("data/test.jsonl")),
        ("empty file", BENCHMARK, ("data/test.jsonl: is empty",), write("data/test.jsonl", "")),
        (
            "malformed line",
            BENCHMARK,
            ("data/test.jsonl:2: not valid JSON",),
            write("data/test.jsonl", LINE + '{"text": "a"\n'),
        ),
        (
            "text without tokens",
            BENCHMARK,
            ("data/test.jsonl: text 2: the text has no tokens",),
            write("data/test.jsonl", LINE + '{"text": ""}\n'),
        ),
        (
            "unknown execution",
            BENCHMARK.replace("packed", "packed,warp"),
            ("--variants", "'warp'", "masked_full"),
            lambda: None,
        ),
        (
            "batch larger than the file",
            BENCHMARK.replace("sizes 1", "sizes 1,4"),
            ("--batch-sizes: 4 is more than the 3 texts of data/test.jsonl", "smaller batches"),
            lambda: None,
        ),
        (
            "random weights without a tokenizer",
            BENCHMARK.replace("--model model", "--random minilm"),
            ("--random takes tokenizer and kept tokens from another model", "--replay DIR"),
            lambda: None,
        ),
        (
            "random weights of an unknown size",
            BENCHMARK.replace("--model model", "--random large --replay model"),
            ("--random: there is no 'large'; expected one of bert-base, minilm",),
            lambda: None,
        ),
        (
            "nothing to replay",
            BENCHMARK + " --replay models/other",
            ("models/other: no such directory",),
            lambda: None,
        ),
        (
            "longer than the positions",
            BENCHMARK + " --max-length 99",
            ("max_length is 99; the model has 20 positions",),
            lambda: None,
        ),
        (
            "records below a file",
            BENCHMARK.replace("out/speed.json", "config.yaml/speed.json"),
            ("config.yaml/speed.json: cannot be written, Not a directory",),
            lambda: None,
        ),
        (
            "picture into a folder",
            BENCHMARK.replace("out/speed.png", "data"),
            ("data: is a directory, a file was expected",),
            lambda: None,
        ),
    )
]

CASES = [*CONFIG_CASES, *DATA_CASES, *MODEL_CASES, *RUN_CASES, *WRITE_CASES, *DENIED_CASES, *BENCHMARK_CASES]
