"""Asking trained models questions: predict and evaluate of the command line, for every kind of question."""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models
from tiny_qa import VOCABULARY, qa_tokenizer
from tiny_qa_files import SAMPLES, write_lines

from trbert_jax import TRBert, answer_questions
from trbert_jax.cli import main
from trbert_jax.config import BackboneConfig, DataConfig, RunConfig, load_config
from trbert_jax.datasets import BadRecords
from trbert_jax.errors import UserError
from trbert_jax.inference.copies import run_copies
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.frontier import compare
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.verify import compared
from trbert_jax.model.config import InputConfig, ModelConfig
from trbert_jax.model.engines import ENGINES
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.reduction.rules import RULES
from trbert_jax.tasks import Splits
from trbert_jax.training.run import results_table

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 8, "max_positions": 64, "max_length": 64}
BASE = dataclasses.replace(tiny_models.BERT, vocab_size=len(VOCABULARY), **SIZES)
LETTERS = tuple("ABCD")
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
Capture = pytest.CaptureFixture[str]
# Kind of question -> data set, task, labels, the sample of a published file, its ids.
KINDS: dict[str, tuple[str, str, tuple[str, ...], str, list[str]]] = {
    "span": ("squad", "span", (), "squad", ["q1", "q2", "q3", "q4"]),
    "no null": ("newsqa", "span", (), "mrqa_gz", ["n1", "n2", "n3"]),
    "choice": ("race", "multiple_choice", LETTERS, "race", ["high2.txt:0", "high2.txt:2", "middle/1.txt:0"]),
    "pairs": ("race", "classification", ("wrong", "right"), "race", []),
    "segments": ("triviaqa", "span", (), "triviaqa", ["tc_33", "tc_34"]),
    "candidates": ("wikihop", "candidates", (), "wikihop", ["WH_dev_0", "WH_dev_1"]),
    "multi_hop": ("hotpotqa", "multi_hop", (), "hotpotqa", ["h1", "h2"]),
}
SPAN = {"question": "who was born in paris ?", "context": "the king was born in paris . the queen was not"}
CHOICE = {"passage": SPAN["context"], "question": "who ?", "options": ["king", "queen", "paris", "japan"]}
CANDIDATES = {"query": "born paris", "candidates": ["the king", "queen"], "supports": [SPAN["context"]]}
MULTI_HOP = {
    "question": "who ?",
    "paragraphs": [
        {"title": "paris", "sentences": ["paris is in france.", " the king was born in paris."]},
        {"title": "king", "sentences": ["the king is in japan."]},
    ],
}
REQUESTS: dict[str, dict[str, Any]] = dict.fromkeys(KINDS, SPAN) | {"choice": CHOICE, "pairs": CHOICE}
REQUESTS |= {"candidates": CANDIDATES, "multi_hop": MULTI_HOP}


def without(request: dict[str, Any], field: str) -> dict[str, Any]:
    return {k: v for k, v in request.items() if k != field}


def longer(kind: str) -> Any:
    """The request of a kind with more text."""
    return json.loads(json.dumps(REQUESTS[kind]).replace("the queen was not", "the queen was not " * 9))


def model_config(kind: str) -> ModelConfig:
    data, task, labels, *_ = KINDS[kind]
    choices, segments = "shared" if kind == "choice" else "pairs", 2 if kind == "segments" else 1
    inputs = InputConfig(data=data, choices=choices, max_segments=segments, unanswerable=kind == "span")
    return dataclasses.replace(BASE, task=task, labels=labels or BASE.labels, inputs=inputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, of random weights."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        config = model_config(kind)
        save_pretrained(folder / kind, config, tiny_models.tiny_params(config), qa_tokenizer())
    return {kind: folder / kind for kind in KINDS}


def predict(
    model: Path, folder: Path, requests: list[Any] | str, *arguments: str, code: int = 0
) -> list[dict[str, Any]]:
    source, output = folder / "questions.jsonl", folder / "answers.jsonl"
    lines = requests if isinstance(requests, str) else "".join(json.dumps(x) + "\n" for x in requests)
    source.write_text(lines, encoding="utf-8")
    options = ["--file", str(source), "--output", str(output), "--backend", "masked", *arguments]
    assert main(["predict", "--model", str(model), *options]) == code
    if code != 0:
        assert not output.exists()
        return []
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def possible(kind: str, request: dict[str, Any], answer: str) -> bool:
    """Whether an answer is one at all."""
    if kind in ("choice", "pairs"):
        return answer in LETTERS
    if kind == "candidates":
        return answer in request["candidates"]
    if kind == "multi_hop":
        texts = ["".join(p["sentences"]) for p in request["paragraphs"]]
        return answer in ("yes", "no") or any(answer in text for text in texts)
    return answer in request["context"] and (bool(answer) or kind == "span")


@pytest.mark.parametrize("kind", KINDS)
def test_predict_answers_in_order(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    first = REQUESTS[kind]
    requests = [{**longer(kind), "id": "long"}, {**first, "id": "short"}, first]
    answers = predict(models[kind], tmp_path, requests, "--batch-size", "2")
    assert [a["id"] for a in answers] == ["long", "short", "3"]
    for request, answer in zip(requests, answers, strict=True):
        assert possible(kind, request, answer["answer"]), answer
        assert len(answer["num_kept"]) == 1  # two layers have one point of reduction
        assert 0 < answer["num_kept"][0] <= answer["num_tokens"]
        assert ("supporting" in answer) == (kind == "multi_hop")
        assert 0 <= answer["score"] <= 1
        if "start" in answer:
            paragraph = request.get("paragraphs", [{}])[answer.get("paragraph", 0)]
            text = request.get("context") or "".join(paragraph["sentences"])
            assert text[answer["start"] : answer["end"]] == answer["answer"]
    # Whatever else is in the batch.
    assert answers[1].pop("score") == pytest.approx(answers[2].pop("score"), abs=1e-5)
    answers[1].pop("null_odds", 0), answers[2].pop("null_odds", 0)
    assert without(answers[1], "id") == without(answers[2], "id")


@pytest.mark.parametrize("kind", KINDS)
def test_exported_models_answer_alike(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The same answers, kept tokens and scores from each engine, of a folder without weights."""
    folder, requests = tmp_path / "exported", [{**longer(kind), "id": "long"}, REQUESTS[kind]]
    chosen = ["--threshold", "0.45"]
    assert main(["export", "--model", str(models[kind]), "--output", str(folder), *chosen]) == 0
    expected = predict(models[kind], tmp_path, requests, *chosen)
    for engine in ENGINES:
        found = predict(folder, tmp_path, requests, "--backend", engine)
        for one, other in zip(found, expected, strict=True):
            for name in {"score", "null_odds"} & one.keys():
                assert one.pop(name) == pytest.approx(other[name], abs=1e-5)
            assert one == {name: other[name] for name in one}


OTHERS = [pytest.param(x, marks=pytest.mark.slow) for x in ("choice", "segments", "candidates", "multi_hop")]


@pytest.mark.parametrize("kind", ["span", *OTHERS])
def test_verify(
    models: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Each way to run a model gives the same answers; with no tolerance none does, which is exit code 1."""
    form = SAMPLES[KINDS[kind][3]]
    data = form.write(tmp_path / form.path, form.fresh())
    command = ["verify", "--model", str(models[kind]), "--data", str(data), "--batch-size", "2"]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    ways = ["batches of 2", "another order", "backend masked", *(f"backend {name}" for name in ENGINES)]
    assert [row["way"] for row in json.loads((tmp_path / "r.json").read_text())] == ways
    monkeypatch.setattr("trbert_jax.inference.verify.TOLERANCE", -1.0)
    assert main(command) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == len(ways)


def test_verify_excuses_ties_alone() -> None:
    kept = ([np.array([0, 2]), np.array([0])],)
    alone = Outputs(np.zeros((2, 2)), kept, np.array([3, 3]), np.zeros(2), 0.0)
    logits = np.array([[0.0, 0.0], [0.1, 0.0]])
    other = dataclasses.replace(alone, logits=logits, kept=([np.array([0, 2]), np.array([0, 1])],))
    near = np.array([False, True])
    assert compared(alone, other, near) == {"logits": 0, "kept": 1, "ties": 1, "same": True}
    assert not compared(alone, other, ~near)["same"]
    assert not compared(alone, dataclasses.replace(alone, logits=logits), near)["same"]


def test_one_bad_question_among_good_ones(models: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    """It stops the run after the answers before it, or is skipped; an id is given back as it was."""
    good, output = {**SPAN, "id": 7}, tmp_path / "answers.jsonl"
    for bad in ({**SPAN, "context": "\u200b"}, {**SPAN, "id": 7}, {**SPAN, "id": [1]}, {"question": "who ?"}):
        lines = "".join(json.dumps(x) + "\n" for x in (good, bad, {**SPAN, "id": "last"}))
        source = tmp_path / "questions.jsonl"
        source.write_text(lines)
        command = ["predict", "--model", str(models["no null"]), "--file", str(source), "--backend", "masked"]
        command += ["--output", str(output), "--n-best", "2", "--max-answer-length", "1"]
        assert main(command) == 2
        assert "questions.jsonl:2" in capsys.readouterr().err
        assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [7]
        assert main([*command, "--skip-bad-records"]) == 0
        answers = [json.loads(line) for line in output.read_text().splitlines()]
        assert [answer["id"] for answer in answers] == [7, "last"]
        assert len(answers[0]["n_best"]) == 2
        assert " " not in answers[0]["answer"]
    assert main([*command, "--null-threshold", "nan"]) == 2


def test_blank_lines_text_and_rule(models: dict[str, Path], tmp_path: Path) -> None:
    """Skips blank lines; `--with-text` repeats the question; rule `dense` drops nothing."""
    lines = "\n" + (json.dumps(CHOICE) + "\n \n") * 2
    answers = predict(models["choice"], tmp_path, lines, "--with-text", "--rule", "dense")
    assert [answer["id"] for answer in answers] == ["1", "2"]
    assert {name: answers[0][name] for name in CHOICE} == CHOICE
    assert answers[0]["answer"] in LETTERS
    assert answers[0]["num_kept"] == []
    assert answers[0]["num_tokens"] > 0


@pytest.mark.parametrize(
    ("unanswerable", "threshold", "answered"), [(True, -1e6, False), (True, 1e6, True), (False, -1e6, True)]
)
def test_the_models_null_threshold_decides(
    tmp_path: Path, unanswerable: bool, threshold: float, answered: bool
) -> None:
    """Of SQuAD 2.0; in SQuAD 1.1 each question has an answer."""
    config = model_config("span")
    inputs = dataclasses.replace(config.inputs, unanswerable=unanswerable, null_threshold=threshold)
    own = dataclasses.replace(config, inputs=inputs)
    save_pretrained(tmp_path / "model", own, tiny_models.tiny_params(own), qa_tokenizer())
    (answer,) = predict(tmp_path / "model", tmp_path, [SPAN])
    assert bool(answer["answer"]) == answered


def evaluation(model: Path, folder: Path, sample: str, document: Any = None) -> list[str]:
    """Writes the sample of a published file; returns the arguments that evaluate it."""
    form = SAMPLES[sample]
    data = form.write(folder / form.path, document or form.fresh())
    outputs = ["--json", str(folder / "result.json"), "--predictions", str(folder / "predictions.json")]
    return ["evaluate", "--model", str(model), "--data", str(data), "--backend", "masked", *outputs]


def withheld(document: Any) -> Any:
    """Leaves the answers out of a document."""
    fields = ("answer", "answers", "Answer", "detected_answers", "is_impossible", "supporting_facts")
    if isinstance(document, dict):
        return {key: withheld(value) for key, value in document.items() if key not in fields}
    return [withheld(item) for item in document] if isinstance(document, list) else document


def results(folder: Path) -> list[Any]:
    return [json.loads((folder / name).read_text()) for name in ("result.json", "predictions.json")]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_reads_the_published_file(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    *_, sample, ids = KINDS[kind]
    assert main(evaluation(models[kind], tmp_path, sample)) == 0
    result, found = results(tmp_path)
    metric = "accuracy" if kind in ("choice", "pairs", "candidates") else "f1"
    assert 0 <= result[metric] <= 100
    assert result["flops_speedup"] > 1
    assert result["data"]["num_rows"] >= result["data"]["num_examples"] >= 2
    odds = tmp_path / "predictions.null_odds.json"
    assert odds.exists() == (kind == "span")
    assert kind != "span" or set(json.loads(odds.read_text())) == set(found)
    answered = set(found["answer"] if kind == "multi_hop" else found)
    assert len(answered) >= 2
    # Without answers there are predictions, and no metrics.
    assert main(evaluation(models[kind], tmp_path, sample, withheld(SAMPLES[sample].fresh()))) == 0
    result, again = results(tmp_path)
    assert (again, metric in result) == (found, False)
    if ids and kind != "choice":
        assert answered == set(ids)


@pytest.mark.parametrize("kind", ["span", "choice", "segments", "candidates", "multi_hop"])
def test_thresholds_in_one_pass(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Have the answers and kept tokens of passes of their own, and the same distance from the dense model."""
    form = SAMPLES[KINDS[kind][3]]
    data = Path(form.write(tmp_path / form.path, form.fresh()))
    model = TRBert.from_pretrained(models[kind])
    examples, engine = read_examples(model, data, BadRecords()), model.engine(2)
    values = (-1.0, 0.5)
    logits, rule = np.array(values, np.float32)[:, None], RULES["threshold"]
    copies = run_copies(engine, model.params, examples, "min_logit", logits, rule, "masked")
    dense = engine.run(model.params, examples, rule="dense", backend="masked")
    for logit, found in zip(values, copies, strict=True):
        threshold = 1 / (1 + np.exp(-logit))
        expected = engine.run(model.params, examples, threshold=threshold, backend="masked")
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found.logits, expected.logits)
        np.testing.assert_array_equal(found.num_kept, expected.num_kept)
        divergence, flips = compare(dense, found)
        assert (divergence is None) == (flips is None) == (kind == "multi_hop")
        assert divergence is None or divergence > 0


def test_benchmark_runs_questions(models: dict[str, Path], tmp_path: Path) -> None:
    form, out = SAMPLES["race"], tmp_path / "speed.json"
    data = form.write(tmp_path / form.path, form.fresh())
    options = f"--variants masked_full,dense --batch-sizes 2 --repeats 1 --json {out}"
    assert main(f"benchmark --model {models['choice']} --data {data} {options}".split()) == 0
    masked, dense = json.loads(out.read_text())
    assert masked["texts"] == dense["texts"] == 4
    assert dense["flops"] < masked["flops"]
    assert masked["kept"][0] <= masked["tokens"]


BAD_REQUESTS = [
    ("span", "[1]", "questions.jsonl:1: a JSON list; expected an object"),
    ("span", "{", "questions.jsonl:1: not valid JSON"),
    ("span", without(SPAN, "context"), "questions.jsonl:1: context: missing"),
    ("span", {**SPAN, "context": " "}, "questions.jsonl:1: context: is empty"),
    ("span", {**SPAN, "question": 3}, "questions.jsonl:1: question: is a number (3)"),
    ("no null", {**SPAN, "context": "\u200b"}, "has no tokens"),
    ("span", {**SPAN, "context": "\ud83d the king"}, "questions.jsonl:1: context: is not valid Unicode"),
    ("choice", {**CHOICE, "options": ["a"]}, "questions.jsonl:1: options: has 1 items; expected 2 to 26"),
    ("candidates", {**CANDIDATES, "candidates": []}, "questions.jsonl:1: candidates: has 0 items"),
    ("multi_hop", {**MULTI_HOP, "paragraphs": {}}, "questions.jsonl:1: paragraphs: is an object"),
    ("multi_hop", {**MULTI_HOP, "paragraphs": [{"title": "x"}]}, "paragraphs[0]: sentences: missing"),
    ("multi_hop", {**MULTI_HOP, "paragraphs": ["x"]}, "questions.jsonl:1: paragraphs[0]: is a text"),
]


@pytest.mark.parametrize(("kind", "request_", "message"), BAD_REQUESTS)
def test_bad_requests(
    models: dict[str, Path], tmp_path: Path, capsys: Capture, kind: str, request_: Any, message: str
) -> None:
    lines = request_ if isinstance(request_, str) else [request_]
    predict(models[kind], tmp_path, lines, code=2)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("choice", without(CHOICE, "question")),
        ("candidates", {**CANDIDATES, "supports": ["", *CANDIDATES["supports"]]}),
        ("multi_hop", {**MULTI_HOP, "paragraphs": [{"title": "x", "sentences": ["", "It is."]}]}),
    ],
)
def test_what_published_data_leave_empty(
    models: dict[str, Path], tmp_path: Path, kind: str, request_: dict[str, Any]
) -> None:
    """And questions whose id is null have none."""
    answers = predict(models[kind], tmp_path, [{**request_, "id": None}, {**request_, "id": None}])
    assert [answer["id"] for answer in answers] == ["1", "2"]
    assert answers[0]["answer"] == answers[1]["answer"]


ANSWER_START = ("data", 1, "paragraphs", 0, "qas", 0, "answers", 0, "answer_start")
UNUSABLE = [
    ("span", ANSWER_START, 6, "answer_start", 3),
    ("span", ("data", 0, "paragraphs", 0, "qas", 0, "question"), "\u200b", "question", 3),
    ("segments", ("Data", 1, "Question"), "\u200b", "question", 1),
    ("candidates", (0, "query"), "x " * 80, "query: is too long", 1),
    ("candidates", (0, "candidates"), [*map(str, range(79)), "côte d'ivoire"], "candidates", 1),
    ("no null", (1, "qas", 0, "question"), "\u200b", "question", 2),
    ("choice", ("high/2.txt", "questions", 0), "x " * 80, "question: is too long", 3),
    ("multi_hop", (0, "question"), "\u200b", "question", 1),
]


@pytest.mark.parametrize("case", UNUSABLE)
def test_questions_without_inputs_are_bad_records(
    models: dict[str, Path], tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture, case: Any
) -> None:
    kind, field, value, name, left = case
    *_, sample, _ = KINDS[kind]
    document, (*path, last) = SAMPLES[sample].fresh(), field
    functools.reduce(lambda part, key: part[key], path, document)[last] = value
    arguments = evaluation(models[kind], tmp_path, sample, document)
    data = arguments[arguments.index("--data") + 1]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in (data, name, "--skip-bad-records"))
    assert not (tmp_path / "result.json").exists()
    assert main([*arguments, "--skip-bad-records"]) == 0
    assert all(part in caplog.text for part in (data, name))
    result, found = results(tmp_path)
    assert result["skipped_records"] == len(result["data"]["skipped"]) == 1
    assert len(found["answer"] if kind == "multi_hop" else found) == left


def test_training_leaves_out_what_cannot_become_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = SAMPLES["squad"].fresh()
    document["data"][0]["paragraphs"][0]["qas"][0]["question"] = "\u200b"
    SAMPLES["squad"].write(tmp_path / "train-v2.0.json", document)
    settings = ["data.name=squad", f"data.path={tmp_path}", "data.skip_bad_records=true"]
    data = Splits(load_config(QUICKSTART, [*settings, "model.max_length=64", "model.window_step=16"]))
    before = data.ids("train")
    examples = data.examples("train", qa_tokenizer())
    assert set(examples.ids) <= data.ids("train") == before - {"q1"}
    assert "question 'q1': question: has no tokens" in data.notes["train"]["skipped"][0]
    assert "train: 1 of 4 records skipped" in caplog.text


@pytest.mark.parametrize("split", ["train", "dev"])
def test_data_of_which_nothing_is_left(tmp_path: Path, split: str) -> None:
    document: Any = [{"header": {}}]
    if split == "train":  # has answers, but none that is found in its context
        document = SAMPLES["mrqa"].fresh()
        for context in document[1:]:
            for question in context["qas"]:
                question["detected_answers"] = []
    write_lines(tmp_path / f"{split}.jsonl", document)
    model = BackboneConfig(init="scratch", max_length=64)
    data = Splits(RunConfig(workdir="x", data=DataConfig(name="mrqa", path=str(tmp_path)), model=model))
    with pytest.raises(
        UserError, match=r"train: nothing is left.*3 questions left out|dev.jsonl: has no usable"
    ):
        data.examples(split, qa_tokenizer())


@pytest.mark.parametrize(
    ("name", "metrics", "shown"),
    [("triviaqa", {"f1": 0.6}, " 0.6% "), ("hotpotqa", {"f1": 0.6}, " 60.0% "), ("triviaqa", {}, " - ")],
)
def test_the_table_of_results(tmp_path: Path, name: str, metrics: dict[str, float], shown: str) -> None:
    """Official scorers count to 1 or to 100; without answers there is nothing to show."""
    model = BackboneConfig(init="scratch", max_length=64)
    config = RunConfig(workdir=str(tmp_path), data=DataConfig(name=name, path="x"), model=model)
    dense = {**metrics, "tokens": 9.0, "flops": 1e6}
    table = list(results_table(config, {"dense": dense, "stages": {}}))
    assert shown in next(line for line in table if line.startswith("dense"))


_COMPILED = ("segments", "candidates")  # the others take as long again, together more than is quick


@pytest.mark.parametrize(
    "kind",
    [*_COMPILED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in _COMPILED)],
)
def test_questions_are_compiled_ahead(
    models: dict[str, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Questions need nothing but the programs of `trbert compile`: the program refuses other inputs."""
    model = TRBert.from_pretrained(models[kind])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TRBert, "from_pretrained", lambda path: model)
    options = ["--batch-size", "2", "--backend", "masked"]
    assert main(["compile", "--model", str(models[kind]), *options]) == 0
    rows = {"choice": 8, "segments": 4, "candidates": 2}.get(kind, 2)
    named = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in named[:-1]] == [
        f"threshold, masked, {rows} x {width} tokens" for width in (32, 48, 64)
    ]
    before = dict(model.programs.compile_seconds)
    requests = [longer(kind), REQUESTS[kind]]
    assert len(answer_questions(model, requests, batch_size=2, backend="masked")) == 2
    assert model.programs.compile_seconds == before


def test_questions_are_read_as_they_are_answered(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trbert_jax.inference.questions.WINDOW", 2)
    model, taken = TRBert.from_pretrained(models["choice"]), []

    def source() -> Iterator[tuple[str, Any]]:
        for number in range(1, 8):
            taken.append(number)
            yield f"line {number}", {**CHOICE, "question": "who " * number}
        yield "line 8", {**CHOICE, "id": "1"}

    stream = model.answer_stream(source(), batch_size=2, backend="masked")
    assert not taken
    found = [next(stream)]
    assert taken == [1, 2, 3, 4]  # a window of two batches
    found += [next(stream) for _ in range(3)]
    assert [answer["id"] for answer in found] == ["1", "2", "3", "4"]
    requests = [request for _, request in itertools.islice(source(), 4)]
    assert found == answer_questions(model, requests, batch_size=2, backend="masked")
    assert [next(stream)["id"] for _ in range(3)] == ["5", "6", "7"]  # those before the bad one
    with pytest.raises(UserError, match="line 8: the id '1'"):
        next(stream)


def test_a_checkpoint_of_transformers_is_asked_like_squad(models: dict[str, Path], tmp_path: Path) -> None:
    theirs = shutil.copytree(models["no null"], tmp_path / "theirs")
    tiny_models.edit_json(theirs / "config.json", remove=("trbert",))
    model = TRBert.from_pretrained(theirs)
    assert model.config.inputs == InputConfig(data="squad")
    requests = [SPAN, longer("span")]
    answers = answer_questions(model, requests, batch_size=2)
    assert answers == answer_questions(TRBert.from_pretrained(models["no null"]), requests, batch_size=2)
    assert all(answer["answer"] in SPAN["context"] for answer in answers)


def test_a_model_of_texts_refuses_questions(models: dict[str, Path], tmp_path: Path) -> None:
    model = TRBert.from_pretrained(tiny_models.tiny_model(tmp_path / "model"))
    with pytest.raises(UserError, match=r"model: the model labels texts"):
        answer_questions(model, [SPAN])
    assert answer_questions(model, []) == []
    with pytest.raises(UserError, match=r"the model answers questions; ask it with"):
        TRBert.from_pretrained(models["span"]).predict(["a text"])


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("race", "model.window_step", 64),
        ("hotpotqa", "model.max_segments", 2),
        ("wikihop", "model.max_question_length", 9),
        ("squad", "data.choices", "shared"),
    ],
)
def test_settings_that_a_data_set_does_not_read(name: str, key: str, value: Any) -> None:
    config = load_config(QUICKSTART, [f"data.name={name}", "data.path=x", f"{key}={value}"])
    with pytest.raises(UserError, match=rf"{key} is .*, which {name} does not read"):
        Splits(config)
