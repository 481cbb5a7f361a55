"""A saved model on a file of labeled texts: the numbers, the baselines, one line an example."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs

from trbert_jax import TRBert
from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.inference import frontier
from trbert_jax.inference.class_report import class_table, plot_confusion
from trbert_jax.inference.evaluate import evaluate_file
from trbert_jax.model.config import InputConfig
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.reduction import flops
from trbert_jax.tasks.scorers import class_scores

NUM = 21
RECORDS = list(tiny_runs.records(NUM, seed=7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the same texts as a .jsonl (labels from 0) and a .csv (labels from 1)."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_models.tiny_model(folder / "model")
    lines = (json.dumps(record) + "\n" for record in RECORDS)
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = (f"{record['label'] + 1},{record['text']}\n" for record in RECORDS)
    (folder / "data.csv").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """Through the command line."""
    out, files = folder / "result.json", f"--model {folder}/model --data {folder}/data.jsonl"
    options = f"--batch-size 8 --baselines --json {out} --predictions {folder}/predictions.jsonl"
    assert main(f"evaluate {files} {options}".split()) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_numbers_follow_from_the_predictions(folder: Path, result: dict[str, Any]) -> None:
    lines = tiny_runs.read_lines(folder / "predictions.jsonl")
    assert len(lines) == result["examples"] == NUM
    lengths = [line["num_tokens"] for line in lines]
    kept = [[len(stage) for stage in line["kept"]] for line in lines]
    shape = flops.EncoderShape.of(tiny_models.BERT)
    dense = flops.dense_flops(shape, lengths).mean()
    reduced = flops.reduced_flops(shape, lengths, kept).mean()
    assert result["flops"] == pytest.approx(reduced)
    assert result["flops_exact"] == pytest.approx(flops.exact_flops(shape, lengths, kept).mean())
    assert result["flops_speedup"] == pytest.approx(dense / reduced)
    assert result["flops_speedup"] > 1
    assert result["kept"] == pytest.approx(np.mean(kept, axis=0).tolist())
    assert result["tokens"] == pytest.approx(np.mean(lengths))
    assert result["accuracy"] == np.mean([line["prediction"] == line["label"] for line in lines])
    assert result["examples_per_second"] > 0
    assert (result["rule"], result["backend"], result["batch_size"]) == ("threshold", "packed", 8)
    assert set(result["baselines"]) == {"random", "first_k"}
    for baseline in result["baselines"].values():
        for name in ("examples", "tokens", "kept", "flops", "flops_exact", "flops_speedup"):
            assert baseline[name] == result[name]


def test_classes_and_confusions(
    folder: Path, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tiny_runs.read_lines(folder / "predictions.jsonl")
    pairs = Counter((line["label"], line["prediction"]) for line in lines)
    names = ("negative", "positive")
    assert result["confusion_matrix"] == [[pairs[label, other] for other in names] for label in names]
    assert result["macro_f1"] == pytest.approx(np.mean([result["classes"][name]["f1"] for name in names]))
    command = f"evaluate --model {folder}/model --data {folder}/data.jsonl --batch-size 8"
    assert main([*command.split(), "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert re.search(r"positive +0\.\d+ +0\.\d+ +0\.\d+ +10\n", table), table
    assert re.search(rf"negative +{pairs['negative', 'negative']} +{pairs['negative', 'positive']}\n", table)


def test_a_report_of_many_odd_names(tmp_path: Path) -> None:
    names = ["$x$", "\u540d\n\t", "a" * 50, "", *map(str, range(70))]
    truth = np.arange(len(names))
    metrics, details = class_scores(np.where(truth == 2, 0, truth), truth, names)
    table = "\n".join(class_table(metrics | details))
    assert f"most frequent confusions\n        1  {'a' * 23}… predicted as $x$" in table
    plot_confusion({"dense": metrics | details, "reduced": metrics | details}, tmp_path / "x.png")
    few = class_scores([0, 1, 2, 3], [0, 1, 2, 2], names[:4])
    plot_confusion({"dense": few[0] | few[1]}, tmp_path / "x.png")


def test_lower_threshold_keeps_more(folder: Path, result: dict[str, Any], tmp_path: Path) -> None:
    files = f"--model {folder}/model --data {folder}/data.jsonl --json {tmp_path}/new/out.json"
    assert main(f"evaluate {files} --batch-size 8 --threshold 0.4".split()) == 0
    more = json.loads((tmp_path / "new/out.json").read_text(encoding="utf-8"))
    assert more["threshold"] == 0.4
    assert main(f"evaluate {files} --batch-size 8 --threshold 0.4,0.5".split()) == 0
    split = json.loads((tmp_path / "new/out.json").read_text(encoding="utf-8"))
    assert split["threshold"] == [0.4, 0.5]
    assert split["kept"][0] == more["kept"][0] > split["kept"][1]
    assert more["flops"] > result["flops"]
    assert more["kept"][0] > result["kept"][0]


def test_lines_are_what_predict_says(folder: Path, result: dict[str, Any]) -> None:
    lines = tiny_runs.read_lines(folder / "predictions.jsonl")
    model = TRBert.from_pretrained(folder / "model")
    predictions = model.predict([record["text"] for record in RECORDS])
    assert [line["id"] for line in lines] == [f"data.jsonl:{number}" for number in range(1, NUM + 1)]
    for line, prediction, record in zip(lines, predictions, RECORDS, strict=True):
        assert line["label"] == model.config.labels[record["label"]]
        assert line["prediction"] == prediction.label
        assert line["kept"] == [stage.tolist() for stage in prediction.kept]
        assert line["num_tokens"] == prediction.num_tokens
        assert list(line["scores"]) == list(model.config.labels)
        np.testing.assert_allclose(list(line["scores"].values()), prediction.scores, atol=1e-5)
    assert {line["prediction"] for line in lines} == set(model.config.labels)


def test_labels_of_a_csv_file_begin_with_1(folder: Path, result: dict[str, Any]) -> None:
    other = evaluate_file(folder / "model", folder / "data.csv", batch_size=NUM + 10)
    same = result.keys() - {"batch_size", "examples_per_second", "baselines"}
    assert [other[name] for name in same] == [result[name] for name in same]


def test_dense(folder: Path, result: dict[str, Any], tmp_path: Path) -> None:
    """If asked for, and of a model without selectors."""
    dense = evaluate_file(folder / "model", folder / "data.jsonl", rule="dense", baselines=("random",))
    assert dense["rule"] == "dense"
    assert not dense.keys() & {"kept", "flops_speedup", "baselines"}
    assert dense["flops"] == pytest.approx(result["flops"] * result["flops_speedup"])
    model = TRBert.from_pretrained(folder / "model")
    save_pretrained(tmp_path, model.config, model.params, model.tokenizer, exclude=("selectors",))
    assert evaluate_file(tmp_path, folder / "data.jsonl")["rule"] == "dense"


def test_calibrated_points_are_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By evaluate and predict, from a folder that is otherwise as before; --frontier stores nothing."""
    monkeypatch.setattr(frontier, "SPEEDUPS", (1.5,))
    model, data = shutil.copytree(folder / "model", tmp_path / "model"), f"--data {folder}/data.jsonl"
    out, picture = tmp_path / "out.json", tmp_path / "x.png"
    before = (model / "config.json").read_text()
    assert main(f"evaluate --frontier --model {model} {data} --json {out}".split()) == 0
    assert (model / "config.json").read_text() == before
    command = (
        f"calibrate --model {model} {data} --speedups 1.8,50 --points-lost 100 --json {out} --plot {picture}"
    )
    assert main(command.split()) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "operating point 50x: left out" in capsys.readouterr().err
    found = json.loads(out.read_text(encoding="utf-8"))
    stored = json.loads((model / "config.json").read_text())
    points = stored["trbert"].pop("operating_points")
    assert stored == json.loads(before)
    assert points == found["operating_points"]
    assert list(points) == ["1.8x", "within_100"]
    rows = {row["target"]: row for row in found["frontier"]}
    assert list(rows) == [1.5, 1.8]
    assert main(f"evaluate --model {model} {data} --operating-point 1.8x --json {out}".split()) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["flops_speedup"] == pytest.approx(points["1.8x"]["speedup"]) == pytest.approx(1.8, rel=0.05)
    assert result["threshold"] == points["1.8x"]["thresholds"] == rows[1.8]["threshold"]
    assert result["accuracy"] == rows[1.8]["accuracy"] == points["1.8x"]["value"]
    loaded, texts = TRBert.from_pretrained(model), [record["text"] for record in RECORDS]
    predictions = loaded.predict(texts, operating_point="1.8x")
    assert [np.mean([len(p.kept[i]) for p in predictions]) for i in (0, 1)] == pytest.approx(result["kept"])
    loaded.save_pretrained(tmp_path / "copy")
    assert TRBert.from_pretrained(tmp_path / "copy").config == loaded.config
    capsys.readouterr()
    assert main(f"predict --model {model} --operating-point 3x good".split()) == 2
    assert "'3x' is unknown; the model has 1.8x, within_100" in capsys.readouterr().err


def test_pairs_are_evaluated_and_predicted_alike(tmp_path: Path) -> None:
    """By the fields of the training data, which the model keeps."""
    inputs = InputConfig(text_field="a", text_pair_field="b", label_field="c")
    config = dataclasses.replace(tiny_models.BERT, inputs=inputs)
    tiny_models.tiny_model(tmp_path / "model", config)
    model = TRBert.from_pretrained(tmp_path / "model")
    assert model.config.inputs == inputs
    pairs = [(a["text"], b["text"]) for a, b in zip(RECORDS[:10], RECORDS[10:20], strict=True)]
    lines = [json.dumps({"a": a, "b": b, "c": "positive", "id": i}) for i, (a, b) in enumerate(pairs)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    evaluate_file(tmp_path / "model", tmp_path / "t.jsonl", predictions=tmp_path / "p.jsonl")
    predictions, tokenizer = model.predict(pairs), model.require_tokenizer()
    for number, line in enumerate(tiny_runs.read_lines(tmp_path / "p.jsonl")):
        prediction = predictions[number]
        expected = tokenizer(*pairs[number], truncation=True, max_length=config.max_length)["input_ids"]
        assert prediction.input_ids.tolist() == expected
        assert (line["id"], line["prediction"], line["kept"]) == (
            number,
            prediction.label,
            [stage.tolist() for stage in prediction.kept],
        )
        np.testing.assert_allclose(list(line["scores"].values()), prediction.scores, atol=1e-5)
    with pytest.raises(UserError, match=r"texts\[0\] is a str; expected a pair"):
        model.predict(["a film"])
