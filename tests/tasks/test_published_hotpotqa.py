"""HotpotQA in the authors' formats (distractor, fullwiki) and in the graph format, from files to metrics.

Each of the three paragraphs of a question becomes `[unused1] title [unused2] text`. With
a question of 3 word pieces the first begins at token 5, the second at 25, the third at 36, and 48 is [SEP].
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_published import CAFE, Published, one_hot, pairs
from tiny_qa_files import write_json, write_lines

from trbert_jax.tasks.examples import Examples

TITLES = ("東京 Tower", "Other", "Third one")
SENTENCES: tuple[list[str], ...] = (
    ["🎉 Łódź c .", " d e Łódź f .", "", " Łódź g ."],
    ["Łódź h .", f" {CAFE} i ."],
    ["j k l .", " m n o ."],
)
ROW = (
    "[CLS] where is it [SEP] "
    "[unused1] 東 京 tower [unused2] 🎉 ło ##dz c . d e ło ##dz f . ło ##dz g . "
    "[unused1] other [unused2] ło ##dz h . naive cafe i . "
    "[unused1] third one [unused2] j k l . m n o . [SEP]"
)
# First and last token of each sentence; the empty one is none.
PLACES = {("東京 Tower", 0): (10, 14), ("東京 Tower", 1): (15, 20), ("東京 Tower", 3): (21, 24)}
PLACES |= {("Other", 0): (28, 31), ("Other", 1): (32, 35)}
PLACES |= {("Third one", 0): (40, 43), ("Third one", 1): (44, 47)}
# The answer of the first is in two supporting sentences, and in two that support nothing: one beside
# them, one in another paragraph.
ANSWERS = {"city": "Łódź", "cafe": CAFE, "yes": "yes", "no": "no"}
FACTS: dict[str, list[list[Any]]] = {
    "city": [["東京 Tower", 1], ["東京 Tower", 3], ["Third one", 0]],
    "cafe": [["東京 Tower", 0], ["Other", 1]],
    "yes": [["Other", 0], ["Third one", 1]],
    "no": [["東京 Tower", 0], ["Other", 0]],
}


def question(name: str, answer: str, facts: list[list[Any]]) -> dict[str, Any]:
    context = [[title, some] for title, some in zip(TITLES, SENTENCES, strict=True)]
    asked = {"_id": name, "question": "where is it", "answer": answer, "type": "bridge", "level": "hard"}
    return {**asked, "context": context, "supporting_facts": facts}


def distractor(folder: Path, max_length: int) -> Published:
    """Four questions, and in training one whose answer is only where nothing supports it."""
    questions = [question(name, ANSWERS[name], FACTS[name]) for name in ANSWERS]
    lost = question("lost", "h", FACTS["city"])
    write_json(folder / "hotpot_train_v1.1.json", [*questions, lost])
    write_json(folder / "hotpot_dev_distractor_v1.json", questions)
    return Published("hotpotqa", folder, max_length=max_length)


def perfect(
    data: Published, found: Examples, ends: list[tuple[int, int]] | None = None
) -> dict[str, np.ndarray]:
    """Logits of a model that is sure of the targets, or of other starts and ends."""
    facts = found.targets["sentence_labels"]
    sentence = np.stack([-facts, facts], axis=-1).astype(np.float32)
    span = data.sure_of(pairs(found) if ends is None else ends)
    return {"span": span, "kind": one_hot(found.targets["kind"], 3), "sentence": sentence}


def targets(data: Published, found: Examples, i: int) -> tuple[list[str], list[str], list[str]]:
    row = data.tokenizer.convert_ids_to_tokens(found.row(i).tolist())
    ends = zip(found.targets["starts"][i], found.targets["ends"][i], strict=True)
    supporting = found.targets["sentences"][i][found.targets["sentence_labels"][i] == 1]
    answers = [" ".join(row[a : b + 1]) for a, b in ends if a > 0]
    return sorted(row), answers, sorted(" ".join(row[a : b + 1]) for a, b in supporting)


def test_dev_inputs_and_their_score(tmp_path: Path) -> None:
    """All occurrences in supporting sentences, yes and no as kinds, sentences by their place."""
    data = distractor(tmp_path, 64)
    found = data.inputs("dev")
    assert data.rows("dev") == [ROW] * 4
    assert found.ids == list(ANSWERS)
    assert pairs(found) == [(17, 18), (32, 33), (0, 0), (0, 0)]
    assert found.targets["starts"][:, 1:3].tolist() == [[21, -1], *[[-1, -1]] * 3]
    assert found.targets["ends"][:, 1:3].tolist() == [[22, -1], *[[-1, -1]] * 3]
    assert found.targets["kind"].tolist() == [0, 0, 1, 2]
    for i, name in enumerate(ANSWERS):
        assert found.targets["sentences"][i, :8].tolist() == [*map(list, PLACES.values()), [-1, -1]]
        is_fact = [int(list(sentence) in FACTS[name]) for sentence in PLACES]
        assert found.targets["sentence_labels"][i, :8].tolist() == [*is_fact, -1]
    assert data.counts("dev") == {"num_examples": 4, "num_rows": 4}
    metrics, files = data.score("dev", perfect(data, found))
    assert files["predictions.json"] == {"answer": ANSWERS, "sp": FACTS}
    assert len(metrics) == 12
    assert set(metrics.values()) == {1}


def test_what_does_not_fit_is_cut_and_costs(tmp_path: Path) -> None:
    """Of 27 tokens for paragraphs the first takes 20, the second gives its title and first sentence."""
    data = distractor(tmp_path, 33)
    found = data.inputs("dev")
    assert data.rows("dev") == [" ".join([*ROW.split()[:32], "[SEP]"])] * 4
    assert pairs(found) == [(17, 18), (0, 0), (0, 0), (0, 0)]
    assert found.targets["sentences"][0, :5].tolist() == [*map(list, list(PLACES.values())[:4]), [-1, -1]]
    counts = {"num_examples": 4, "num_rows": 4, "num_truncated": 4, "num_without_answer": 1}
    assert data.counts("dev") == counts
    metrics, files = data.score("dev", perfect(data, found))
    answers = files["predictions.json"]["answer"]
    assert answers == {**ANSWERS, "cafe": answers["cafe"]}
    held = list(map(list, PLACES))[:4]
    assert files["predictions.json"]["sp"] == {
        name: [fact for fact in facts if fact in held] for name, facts in FACTS.items()
    }
    # One answer of four is lost; of the facts 2 of 3, 1 of 2, 1 of 2 and 2 of 2 are there.
    assert (metrics["em"], metrics["f1"], metrics["sp_em"], metrics["sp_prec"]) == (0.75, 0.75, 0.25, 1)
    assert metrics["sp_recall"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2 + 1) / 4)


def test_training_draws_the_order_and_keeps_the_answers(tmp_path: Path) -> None:
    data = distractor(tmp_path, 64)
    assert data.counts("train") == {"num_examples": 5, "num_rows": 4, "num_dropped": 1}
    texts = {fact: " ".join(ROW.split()[a : b + 1]) for fact, (a, b) in PLACES.items()}
    orders = set()
    for epoch in range(4):
        found = data.splits.resample(data.inputs("train"), epoch)
        assert found.ids == list(ANSWERS)
        for i, name in enumerate(ANSWERS):
            orders.add(tuple(found.row(i).tolist()))
            answers = {"city": ["ło ##dz"] * 2, "cafe": ["naive cafe"]}.get(name, [])
            facts = sorted(texts[title, k] for title, k in FACTS[name])
            assert targets(data, found, i) == (sorted(ROW.split()), answers, facts)
            assert (found.targets["sentence_labels"][i] >= 0).sum() == 7
    assert len(orders) > 1


def test_fullwiki_counts_a_supporting_paragraph_that_was_not_retrieved(tmp_path: Path) -> None:
    facts = [["東京 Tower", 1], ["Not there", 0]]
    write_json(tmp_path / "hotpot_train_v1.1.json", [question("city", "Łódź", FACTS["city"])])
    write_json(tmp_path / "hotpot_dev_fullwiki_v1.json", [question("city", "Łódź", facts)])
    data = Published("hotpotqa_fullwiki", tmp_path, max_length=64)
    found = data.inputs("dev")
    assert data.rows("dev") == [ROW]
    assert pairs(found) == [(17, 18)]
    assert found.targets["sentence_labels"][0, :8].tolist() == [0, 1, 0, 0, 0, 0, 0, -1]
    metrics, files = data.score("dev", perfect(data, found))
    assert files["predictions.json"] == {"answer": {"city": "Łódź"}, "sp": {"city": facts[:1]}}
    assert (metrics["em"], metrics["f1"], metrics["sp_em"], metrics["joint_em"]) == (1, 1, 0, 0)
    assert (metrics["sp_prec"], metrics["sp_recall"]) == (1, 0.5)
    assert metrics["sp_f1"] == metrics["joint_f1"] == pytest.approx(2 / 3)


def node(title: str, training: bool) -> dict[str, Any]:
    """A paragraph in word pieces; the facts are those of `city`."""
    number = TITLES.index(title)
    kept = [PLACES.get((title, k)) for k in range(len(SENTENCES[number]))]
    first = next(place for place in kept if place)[0]
    last = max(place for place in kept if place)[1]
    ends, places = 0, []
    for place in kept:
        start, ends = (ends, ends) if place is None else (place[0] - first, place[1] + 1 - first)
        places.append([start, ends])
    context = ROW.split()[first : last + 1]
    found: dict[str, Any] = {
        "name": title.replace(" ", "_"),
        "context": context,
        "sent_pos": places,
        "supp_label": [int([title, k] in FACTS["city"]) for k in range(len(kept))],
    }
    if training:
        spans = [[7, 8], [11, 12]] if number == 0 else []  # the last piece belongs to the answer
        return {**found, "spans": spans, "has_supp": any(found["supp_label"])}
    numbers = np.cumsum([not piece.startswith("##") for piece in context]) - 1
    words = "".join(SENTENCES[number]).split()
    return {**found, "doc_tokens": words, "tok_to_orig_index": numbers.tolist()}


def graph(folder: Path) -> Published:
    asked = {"question": "where is it", "edge": []}
    gold_first = ("東京 Tower", "Third one", "Other")
    train = [node(title, training=True) for title in gold_first]
    dev = [node(title, training=False) for title in TITLES]
    kinds = [{"answer": "Łódź"}, {"answer": "yes"}, {"answer": "no"}]
    write_lines(folder / "hotpot_train_graph.json", [asked | {"node": train} | kind for kind in kinds])
    write_lines(
        folder / "rerank_dev_tok.json",
        [asked | {"node": dev, "qid": f"g{k}"} | kind for k, kind in enumerate(kinds)],
    )
    return Published("hotpotqa_graph", folder, max_length=64)


def test_graph_training(tmp_path: Path) -> None:
    data = graph(tmp_path)
    found = data.inputs("train")
    assert found.ids == [f"hotpot_train_graph.json:{k}" for k in (1, 2, 3)]
    assert found.targets["kind"].tolist() == [0, 1, 2]
    facts = ["d e ło ##dz f .", "j k l .", "ło ##dz g ."]
    assert targets(data, found, 0) == (sorted(ROW.split()), ["ło ##dz"] * 2, facts)
    assert data.counts("train") == {"num_examples": 3, "num_rows": 3}


def test_graph_dev_and_its_score(tmp_path: Path) -> None:
    """The answer is cut out of the words of the file, whose places dev does not say."""
    data = graph(tmp_path)
    found = data.inputs("dev")
    assert data.rows("dev") == [ROW] * 3
    assert found.targets["sentences"][0, :8].tolist() == [*map(list, PLACES.values()), [-1, -1]]
    metrics, files = data.score("dev", perfect(data, found, [(17, 18), (0, 0), (0, 0)]))
    assert files["predictions.json"]["answer"] == {"g0": "Łódź", "g1": "yes", "g2": "no"}
    titles = [[title.replace(" ", "_"), k] for title, k in FACTS["city"]]
    assert files["predictions.json"]["sp"] == {f"g{k}": titles for k in range(3)}
    assert set(metrics.values()) == {1}
