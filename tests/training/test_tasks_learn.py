"""Every data set of questions, in its published format, through all stages: eight examples are learnt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import tiny_runs

pytestmark = pytest.mark.slow
NUM = 8
# Learns a comparison of words within a hundred updates; a narrower one takes many more.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1}
PLACES = ("paris", "london", "madrid", "rome", "berlin", "vienna", "lisbon", "dublin")
ANIMALS = ("cat", "dog", "owl", "fox", "bee", "ant", "cow", "hen")


def squad(folder: Path) -> None:
    """Which animal lives in a place; two questions have no answer."""
    paragraphs = []
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        context = f"in {place} there lives an old {animal} near the river"
        answers = [{"text": animal, "answer_start": context.index(animal)}] if i < 6 else []
        question = {"id": f"q{i}", "question": f"what lives in {place} ?", "answers": answers}
        paragraphs.append({"context": context, "qas": [{**question, "is_impossible": not answers}]})
    document = {"version": "v2.0", "data": [{"title": "animals", "paragraphs": paragraphs}]}
    for split in ("train", "dev"):
        (folder / f"{split}-v2.0.json").write_text(json.dumps(document), encoding="utf-8")


def mrqa(folder: Path, name: str = "{}.jsonl") -> None:
    lines: list[Any] = [{"header": {"dataset": "animals"}}]
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        context = f"in {place} there lives an old {animal} near the river"
        start = context.index(animal)
        spans = [{"text": animal, "char_spans": [[start, start + len(animal) - 1]]}]
        question = {"qid": f"q{i}", "question": f"what lives in {place} ?", "answers": [animal]}
        lines.append({"context": context, "qas": [{**question, "detected_answers": spans}]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for split in ("train", "dev"):
        path = folder / name.format(split)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def mrqa_compressed(folder: Path) -> None:
    """As published."""
    mrqa(folder, "{}.jsonl.gz")


def race(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
            options = [ANIMALS[(i + k) % NUM] for k in range(4)]
            right = i % 4
            options[0], options[right] = options[right], options[0]
            record = {
                "article": f"in {place} there lives an old {animal} near the river",
                "questions": [f"what lives in {place} ?"],
                "options": [options],
                "answers": ["ABCD"[options.index(animal)]],
                "id": f"high{i}.txt",
            }
            path = folder / split / ("high" if i % 2 else "middle") / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record), encoding="utf-8")


def triviaqa(folder: Path) -> None:
    records = []
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        context = f"in {place} there lives an old {animal} and near the river another {animal} sleeps all day"
        first, second = context.index(animal), context.rindex(animal)
        spans = [[s, s + len(animal) - 1] for s in (first, second)]
        question = {
            "qid": f"q{i}",
            "question": f"what lives in {place} ?",
            "detected_answers": [{"text": animal, "char_spans": spans}],
            "answers": {"Aliases": [animal]},
        }
        records.append({"context": context, "qas": [question]})
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")


def triviaqa_published(folder: Path) -> None:
    """Questions that name their documents, which lie beside them; the places of answers are searched for."""
    questions = []
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        text = f"in {place} there lives an old {animal} and near the river another {animal} sleeps all day"
        document = folder / "evidence" / "wikipedia" / f"{place}.txt"
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(text, encoding="utf-8")
        answer = {"Value": animal, "Aliases": [animal], "NormalizedAliases": [animal]}
        question = {"QuestionId": f"q{i}", "Question": f"what lives in {place} ?", "Answer": answer}
        questions.append({**question, "EntityPages": [{"Filename": f"{place}.txt"}]})
    (folder / "qa").mkdir()
    for split in ("train", "dev"):
        published = {"Domain": "Wikipedia", "Data": questions}
        (folder / "qa" / f"wikipedia-{split}.json").write_text(json.dumps(published), encoding="utf-8")


def wikihop(folder: Path) -> None:
    records = []
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        candidates = [ANIMALS[(i + k) % NUM] for k in range(3)]
        candidates = candidates[i % 3 :] + candidates[: i % 3]
        supports = [f"in {place} there lives an old {animal}", "the river is long"]
        records.append(
            {
                "id": f"q{i}",
                "query": f"lives {place}",
                "candidates": candidates,
                "supports": supports,
                "answer": animal,
            }
        )
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")


def hotpotqa(folder: Path) -> None:
    records = []
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        answer = ("yes", "no")[i % 2] if i >= 6 else animal
        records.append(
            {
                "_id": f"q{i}",
                "question": f"what lives in {place} ?",
                "answer": answer,
                "type": "bridge",
                "level": "easy",
                "supporting_facts": [[place, 0], [animal, 1]],
                "context": [
                    [place, [f"in {place} there lives an old {animal}.", " the river is long."]],
                    [animal, ["animals sleep all day.", f" the {animal} is old."]],
                ],
            }
        )
    for name in ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"):
        (folder / name).write_text(json.dumps(records), encoding="utf-8")


def hotpotqa_graph(folder: Path) -> None:
    """Paragraphs that a tokenizer, which the model must have too, has divided; two answers are yes or no."""
    train, dev, texts = [], [], list[str]()
    for i, (place, animal) in enumerate(zip(PLACES, ANIMALS, strict=True)):
        paragraphs = {
            place: f"in {place} there lives an old {animal} the river is long".split(),
            animal: f"animals sleep all day the {animal} is old".split(),
        }
        nodes = []
        for (name, words), sentences, supporting in zip(
            paragraphs.items(), ([[0, 7], [7, 11]], [[0, 4], [4, 8]]), ([1, 0], [0, 1]), strict=True
        ):
            at = [[t, t] for t, word in enumerate(words) if word == animal] if i < 6 else []
            node = {"name": name, "context": words, "sent_pos": sentences, "supp_label": supporting}
            nodes.append(({**node, "spans": at, "has_supp": True}, {**node, "doc_tokens": words}))
        question = {
            "question": f"what lives in {place} ?",
            "answer": animal if i < 6 else ("yes", "no")[i % 2],
        }
        texts += [f"what lives in {place} ?", *map(" ".join, paragraphs.values())]
        train.append({**question, "edge": [], "node": [node for node, _ in nodes]})
        judged = [{**node, "tok_to_orig_index": [*range(len(node["context"]))]} for _, node in nodes]
        dev.append({**question, "qid": f"q{i}", "edge": [], "node": judged})
    for file, lines in (("hotpot_train_graph.json", train), ("rerank_dev_tok.json", dev)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / file).write_text(text, encoding="utf-8")
    tiny_published.word_tokenizer(texts).save_pretrained(folder / "tokenizer")


# data set: writer, settings of data and of the model
CASES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], dict[str, Any]]] = {
    "squad": ("squad", squad, {}, {}),
    "newsqa": ("newsqa", mrqa, {}, {}),
    "naturalqa, DistilBERT": ("naturalqa", mrqa_compressed, {}, {"scratch": {"model_type": "distilbert"}}),
    "race pairs": ("race", race, {"choices": "pairs"}, {}),
    "race independent": ("race", race, {"choices": "independent"}, {}),
    "race shared": ("race", race, {"choices": "shared"}, {}),
    "triviaqa": ("triviaqa", triviaqa_published, {}, {}),
    "triviaqa segments": ("triviaqa", triviaqa, {}, {"max_segments": 3, "max_length": 20}),
    "wikihop": ("wikihop", wikihop, {}, {"max_segments": 2}),
    "hotpotqa": ("hotpotqa", hotpotqa, {}, {"max_length": 64}),
    "hotpotqa graph": ("hotpotqa_graph", hotpotqa_graph, {}, {"max_length": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_eight_examples_are_learnt(case: str, tmp_path: Path) -> None:
    name, write, data, model = CASES[case]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    if (tmp_path / "data" / "tokenizer").exists():
        model = {**model, "tokenizer": str(tmp_path / "data" / "tokenizer")}
    # Packed training steps are compared with masked ones elsewhere; these compile faster.
    steps = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 1e-3, "backend": "masked"}
    steps |= {"dropout": False, "save_steps": 1000, "eval_steps": 1000}
    config = tiny_runs.write_config(
        tmp_path,
        data={"name": name, "path": str(tmp_path / "data"), **data},
        model={
            "init": "scratch",
            "max_length": 48,
            **model,
            "scratch": {
                **tiny_runs.SCRATCH,
                **WIDE,
                "num_layers": 4 if case == "squad" else 2,
                **model.get("scratch", {}),
            },
        },
        finetune={**steps, "epochs": 100},
        init={**steps, "epochs": 2},
        policy={**steps, "epochs": 60, "alpha": 0.01, "num_samples": 4},
        joint={**steps, "epochs": 120, "alpha": 0.01, "num_samples": 4},
        evaluate={"baselines": [], "thresholds": []},
    )
    results = tiny_runs.train(config)
    metric = {"race": "accuracy", "wikihop": "accuracy", "hotpotqa": "joint_f1"}.get(name.split("_")[0], "f1")
    scale = 100 if name in ("squad", "newsqa", "naturalqa", "triviaqa") else 1
    assert results["dense"][metric] >= 0.9 * scale
    assert results["reduced"][metric] >= 0.9 * scale
    assert results["reduced"]["flops_speedup"] > 1
    if case == "squad":  # both models' null thresholds are tuned, here on the questions that are reported
        for found, tuned in (
            (results["dense"], results["dense"]["null_threshold"]),
            (results["reduced"], results["null_threshold"]),
        ):
            assert tuned["value"] == found["best_f1_thresh"]
            assert tuned["f1"] == pytest.approx(found["best_f1"])
            assert tuned["questions_in_common"] == NUM
