"""TriviaQA from files as published, and in the manner of SQuAD, to segments, answers and metrics.

Inputs are 24 tokens long, two a document. A question of 3 word pieces leaves room for 18 of the document in
each: segments hold pieces 0-17 and 18-35, what follows is cut.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny_published import CAFE, Published, pairs, pieces, spelled, words
from tiny_qa_files import write_json

NONE = (0, 0)  # [CLS]
# Mentions are pieces 20 and 21, 26, and, behind the second segment, 38 and 39.
LONG = f"東京 🎉 {words(3, 19)} Łódź {words(22, 25)} LODZ {words(27, 37)} Łódź"
BEHIND = f"{words(0, 57)} Łódź"
DOCUMENTS = {
    "wikipedia/Łódź.txt": LONG,
    "web/35/35_1.txt": words(0, 9),  # no mention at all
    "web/35/35_2.txt": BEHIND,
    "wikipedia/Café.txt": f"🎉 See the Naïve  {CAFE.split()[1]}.",  # two spaces
}


def trivia_file(domain: str) -> dict[str, Any]:
    city = {"Aliases": ["Łódź", "Lodz"], "NormalizedAliases": ["łódź", "lodz"], "Value": "Łódź"}
    cafe = {"Aliases": [CAFE], "NormalizedAliases": ["bistro", CAFE], "Value": CAFE}
    first: dict[str, Any] = {"QuestionId": "tc_1", "Question": "where is it", "Answer": city}
    first["EntityPages"] = [{"Filename": "Łódź.txt"}]
    first["SearchResults"] = [{"Filename": "35/35_1.txt"}, {"Filename": "35/35_2.txt"}]
    second: dict[str, Any] = {"QuestionId": "tc_2", "Question": "what is it", "Answer": cafe}
    second |= {"EntityPages": [{"Filename": "Café.txt"}], "SearchResults": []}
    return {"Data": [first, second], "Domain": domain, "Version": 1.0}


@pytest.fixture(params=["wikipedia", "web"])
def trivia(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    for name, text in DOCUMENTS.items():
        path = tmp_path / "evidence" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for split in ("train", "dev"):
        write_json(tmp_path / f"qa/{request.param}-{split}.json", trivia_file(request.param.capitalize()))
    name = "triviaqa" if request.param == "wikipedia" else "triviaqa_web"
    return Published(name, tmp_path, max_length=24, max_segments=2)


IDS = ["tc_1--Łódź.txt", "tc_1--35/35_1.txt", "tc_1--35/35_2.txt", "tc_2--Café.txt"]
# Of both segments of the first document, the one of the second, both of the third, the one of the last.
FIRST_PLACES = [(-1, -1), (7, 8), NONE, NONE, NONE, (8, 9)]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_published_segments_targets_and_counts(trivia: Published, split: str) -> None:
    """Every mention is a target; where a document has none in its segments, they point at [CLS]."""
    found = trivia.inputs(split)
    assert found.ids == IDS
    assert found.first_row is not None
    assert found.first_row.tolist() == [0, 2, 3, 5, 6]
    assert trivia.rows(split) == [
        f"[CLS] where is it [SEP] {pieces(spelled(LONG, 0, 17))} [SEP]",
        f"[CLS] where is it [SEP] {pieces(spelled(LONG, 18, 35))} [SEP]",
        f"[CLS] where is it [SEP] {words(0, 9)} [SEP]",
        f"[CLS] where is it [SEP] {words(0, 17)} [SEP]",
        f"[CLS] where is it [SEP] {words(18, 35)} [SEP]",
        "[CLS] what is it [SEP] 🎉 see the naive cafe . [SEP]",
    ]
    assert found.row_targets["starts"][1].tolist() == [7, 13]  # 20 - 18 + 5, 26 - 18 + 5
    assert found.row_targets["ends"][1].tolist() == [8, 13]
    assert (found.row_targets["starts"][[0, 2, 3, 4, 5], 1] == -1).all()
    assert pairs(found) == FIRST_PLACES
    # The first and third document are cut; only of the third is the mention lost, to both segments.
    counts = {"num_examples": 4, "num_rows": 6, "num_truncated": 2, "num_without_answer": 2}
    assert trivia.counts(split) == counts


def test_published_a_perfect_model(trivia: Published) -> None:
    """Of Wikipedia the best document answers; of the web two of four documents show no answer."""
    logits = trivia.sure_of(FIRST_PLACES)
    logits[0] = 0  # the question has its mention in another row
    metrics, files = trivia.score("dev", logits)
    cafe = f"Naïve  {CAFE.split()[1]}"  # as written
    if trivia.splits.task.inputs.data == "triviaqa":
        assert files["predictions.json"] == {"tc_1": "Łódź", "tc_2": cafe}
        assert (metrics["exact_match"], metrics["f1"]) == (100, 100)
        assert metrics["denominator"] == metrics["common"] == metrics["pred_len"] == 2
    else:
        assert list(files["predictions.json"]) == IDS
        assert [files["predictions.json"][IDS[k]] for k in (0, 3)] == ["Łódź", cafe]
        assert (metrics["exact_match"], metrics["f1"]) == (50, 50)
        assert metrics["denominator"] == metrics["common"] == metrics["pred_len"] == 4


def test_a_document_is_800_words_and_one_segment_as_published(tmp_path: Path) -> None:
    """A mention at word 790, of two pieces, is the only target: the one at word 805 is not read."""
    document = tmp_path / "evidence/wikipedia/Łódź.txt"
    document.parent.mkdir(parents=True)
    document.write_text(f"{words(0, 789)} Łódź {words(791, 804)} Łódź", encoding="utf-8")
    published = trivia_file("Wikipedia")
    del published["Data"][1], published["Data"][0]["SearchResults"]
    for split in ("train", "dev"):
        write_json(tmp_path / f"qa/wikipedia-{split}.json", published)
    data = Published("triviaqa", tmp_path, max_length=1024)
    found = data.inputs("dev")
    assert found.row_targets["starts"].tolist() == [[795]]
    assert found.row_targets["ends"].tolist() == [[796]]
    assert data.rows("dev") == [f"[CLS] where is it [SEP] {words(0, 789)} ło ##dz {words(791, 799)} [SEP]"]
    assert data.counts("dev") == {"num_examples": 1, "num_rows": 1}
    metrics, files = data.score("dev", data.sure_of([(795, 796)]))
    assert files["predictions.json"] == {"tc_1": "Łódź"}
    assert metrics["exact_match"] == 100
