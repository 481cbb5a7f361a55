"""Every kind of question through the stages: eight examples are learned."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

pytestmark = pytest.mark.slow
NUM = 8
# Learns a comparison of words within a hundred updates; a narrower one takes many more.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1}
PLACES = ("paris", "london", "madrid", "rome", "berlin", "vienna", "lisbon", "dublin")
ANIMALS = ("cat", "dog", "owl", "fox", "bee", "ant", "cow", "hen")
# Number, id, question, place, animal.
FACTS = [(i, f"q{i}", f"what lives in {PLACES[i]} ?", PLACES[i], ANIMALS[i]) for i in range(NUM)]
ONE = "in {} there lives an old {} near the river"
TWO = "in {0} there lives an old {1} and near the river another {1} sleeps all day"


def write(path: Path, value: Any, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in value) if lines else json.dumps(value)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def squad(folder: Path) -> None:
    """Which animal lives in a place; two questions have no answer."""
    paragraphs = []
    for i, name, question, place, animal in FACTS:
        context = ONE.format(place, animal)
        answers = [{"text": animal, "answer_start": context.index(animal)}] if i < 6 else []
        qa = {"id": name, "question": question, "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": context, "qas": [qa]})
    for split in ("train", "dev"):
        document = {"version": "v2.0", "data": [{"title": "animals", "paragraphs": paragraphs}]}
        write(folder / f"{split}-v2.0.json", document)


def mrqa(folder: Path) -> None:
    lines: list[dict[str, Any]] = [{"header": {"dataset": "animals"}}]
    for _, key, question, place, animal in FACTS:
        text = ONE.format(place, animal)
        start = text.index(animal)
        answer = {"text": animal, "char_spans": [[start, start + len(animal) - 1]]}
        qa = {"qid": key, "question": question, "detected_answers": [answer], "answers": [animal]}
        lines.append({"context": text, "qas": [qa]})
    for split in ("train", "dev"):
        write(folder / f"{split}.jsonl.gz", lines, lines=True)


def race(folder: Path) -> None:
    for i, _, question, place, animal in FACTS:
        options = [ANIMALS[(i + k) % NUM] for k in range(4)]
        right = i % 4
        options[0], options[right] = options[right], options[0]
        record = {"article": ONE.format(place, animal), "questions": [question], "options": [options]}
        record |= {"answers": ["ABCD"[options.index(animal)]], "id": f"high{i}.txt"}
        for split in ("train", "dev", "test"):
            write(folder / split / ("high" if i % 2 else "middle") / f"{i}.txt", record)


def triviaqa(folder: Path) -> None:
    """Questions that name their documents, which lie beside them; the places of answers are searched for."""
    questions = []
    for _, key, question, place, animal in FACTS:
        document = folder / "evidence" / "wikipedia" / f"{place}.txt"
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(TWO.format(place, animal), encoding="utf-8")
        answer = {"Value": animal, "Aliases": [animal], "NormalizedAliases": [animal]}
        record = {"QuestionId": key, "Question": question, "Answer": answer}
        questions.append({**record, "EntityPages": [{"Filename": f"{place}.txt"}]})
    for split in ("train", "dev"):
        write(folder / "qa" / f"wikipedia-{split}.json", {"Domain": "Wikipedia", "Data": questions})


def wikihop(folder: Path) -> None:
    records = []
    for i, key, _, place, animal in FACTS:
        candidates = [ANIMALS[(i + k) % NUM] for k in range(3)]
        candidates = candidates[i % 3 :] + candidates[: i % 3]
        supports = [f"in {place} there lives an old {animal}", "the river is long"]
        record = {"id": key, "query": f"lives {place}", "candidates": candidates}
        records.append({**record, "supports": supports, "answer": animal})
    for split in ("train", "dev"):
        write(folder / f"{split}.json", records)


def hotpotqa(folder: Path) -> None:
    records = []
    for i, key, question, place, animal in FACTS:
        context = [
            [place, [f"in {place} there lives an old {animal}.", " the river is long."]],
            [animal, ["animals sleep all day.", f" the {animal} is old."]],
        ]
        record = {"_id": key, "question": question, "type": "bridge", "level": "easy", "context": context}
        answer = ("yes", "no")[i % 2] if i >= 6 else animal
        records.append({**record, "answer": answer, "supporting_facts": [[place, 0], [animal, 1]]})
    for name in ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"):
        write(folder / name, records)


# data set: writer, settings of data and of the model
CASES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any], dict[str, Any]]] = {
    "squad": ("squad", squad, {}, {"selector_match": True}),
    "naturalqa, DistilBERT": ("naturalqa", mrqa, {}, {"scratch": {"model_type": "distilbert"}}),
    "race pairs": ("race", race, {"choices": "pairs"}, {}),
    "race shared": ("race", race, {"choices": "shared"}, {}),
    "triviaqa segments": ("triviaqa", triviaqa, {}, {"max_segments": 3, "max_length": 20}),
    "wikihop": ("wikihop", wikihop, {}, {"max_segments": 2}),
    "hotpotqa": ("hotpotqa", hotpotqa, {}, {"max_length": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_eight_examples_are_learned(case: str, tmp_path: Path) -> None:
    name, write_files, data, model = CASES[case]
    (tmp_path / "data").mkdir()
    write_files(tmp_path / "data")
    # Packed training steps are compared with masked ones elsewhere; these compile faster.
    steps = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 1e-3, "backend": "masked"}
    steps |= {"dropout": False, "save_steps": 1000, "eval_steps": 1000}
    scratch = {**tiny_runs.SCRATCH, **WIDE, "num_layers": 4 if case == "squad" else 2}
    scratch |= model.get("scratch", {})
    config = tiny_runs.write_config(
        tmp_path,
        stages=[stage for stage in tiny_runs.STAGES if stage != "init" or case == "squad"],
        data={"name": name, "path": str(tmp_path / "data"), **data},
        model={"max_length": 48, **model, "scratch": scratch},
        finetune={**steps, "epochs": 100},
        init={**steps, "epochs": 2},
        policy={**steps, "epochs": 60, "alpha": 0.01, "num_samples": 4},
        joint={**steps, "epochs": 120, "alpha": 0.01, "num_samples": 4},
        evaluate={"baselines": [], "thresholds": []},
    )
    results = tiny_runs.train(config)
    metric = {"race": "accuracy", "wikihop": "accuracy", "hotpotqa": "joint_f1"}.get(name.split("_")[0], "f1")
    scale = 100 if name in ("squad", "naturalqa", "triviaqa") else 1
    assert results["dense"][metric] >= 0.9 * scale
    assert results["reduced"][metric] >= 0.9 * scale
    assert results["reduced"]["flops_speedup"] > 1
    if case == "squad":  # both models' null thresholds are tuned, here on the questions that are reported
        dense, reduced = results["dense"], results["reduced"]
        for found, tuned in ((dense, dense["null_threshold"]), (reduced, results["null_threshold"])):
            assert tuned["value"] == found["best_f1_thresh"]
            assert tuned["f1"] == pytest.approx(found["best_f1"])
            assert tuned["questions_in_common"] == NUM
