"""SQuAD 2.0, NewsQA and NaturalQuestions from files as published to windows, answers and metrics.

Inputs are 24 tokens long. A question of 3 word pieces leaves room for 18 of the context, and windows that
begin 6 apart hold pieces 0-17, 6-23, 12-29, 18-35 and 24-39 of a context of 40.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny_published import CAFE, Published, pairs, pieces, spelled, words
from tiny_qa_files import write_json, write_lines

SETTINGS: dict[str, Any] = {"max_length": 24, "window_step": 6, "max_question_length": 3}
WINDOWS = [(0, 17), (6, 23), (12, 29), (18, 35), (24, 39)]
BEGIN = 5  # of the context in a row: [CLS], three pieces of the question, [SEP]
NONE = (0, 0)  # [CLS]
# 東 and 京 are pieces 0 and 1, the sign beyond 16 bits is 2, the answer 20 and 21, the last word 39.
LONG = f"東京 🎉 {words(3, 19)} {CAFE} {words(22, 39)}"
TOO_LONG = words(22, 39) + " end"  # 19 pieces, one more than a window has room for


def squad_question(id: str, question: str, context: str, *texts: str) -> dict[str, Any]:
    answers = [{"text": text, "answer_start": context.index(text)} for text in texts]
    return {"id": id, "question": question, "answers": answers}


def squad_file(training: bool) -> dict[str, Any]:
    """Four questions of a long context, one of a short one, and in training two that are hard to keep."""
    long = [
        squad_question("late", "where is it", LONG, CAFE, "cafe\u0301", CAFE) | {"is_impossible": False},
        squad_question("early", "where is it", LONG, "東京"),
        squad_question("edge", "where is it", LONG, "w17 w18"),
        squad_question("none", "who was there", LONG) | {"is_impossible": True},
    ]
    city = ("city", "which is it", "🎉 🎉 Łódź is here", "Łódź")
    hard = [("whole", "what is it", LONG + " end", TOO_LONG), ("lost", "what is it", "a \u200b b", "\u200b")]
    asked = [city, *(hard if training else ())]
    paragraphs = [{"context": LONG, "qas": long}]
    paragraphs += [{"context": some[2], "qas": [squad_question(*some)]} for some in asked]
    return {"version": "v2.0", "data": [{"title": "A_title", "paragraphs": paragraphs}]}


@pytest.fixture
def squad(tmp_path: Path) -> Published:
    write_json(tmp_path / "train-v2.0.json", squad_file(training=True))
    write_json(tmp_path / "dev-v2.0.json", squad_file(training=False))
    return Published("squad", tmp_path, **SETTINGS)


def test_squad_windows_and_targets(squad: Published) -> None:
    """Only windows that hold the whole answer point at it, the others and impossible questions at [CLS]."""
    found = squad.inputs("dev")
    assert found.ids == ["late"] * 5 + ["early"] * 5 + ["edge"] * 5 + ["none"] * 5 + ["city"]
    assert squad.rows("dev")[:5] == [
        f"[CLS] where is it [SEP] {pieces(spelled(LONG, *window))} [SEP]" for window in WINDOWS
    ]
    assert squad.rows("dev")[20] == "[CLS] which is it [SEP] 🎉 🎉 ło ##dz is here [SEP]"
    late = [NONE, (19, 20), (13, 14), (7, 8), NONE]  # 20 - 6 + 5, 20 - 12 + 5, 20 - 18 + 5
    early = [(5, 6), NONE, NONE, NONE, NONE]
    edge = [NONE, (16, 17), (10, 11), NONE, NONE]  # the first window ends, the fourth begins inside of it
    assert pairs(found) == [*late, *early, *edge, *[NONE] * 5, (7, 8)]
    for row, (first, _) in enumerate(WINDOWS[1:4], 1):
        start, end = (token - BEGIN + first for token in late[row])
        assert spelled(LONG, start, end) == CAFE
        assert found.layout.text(row, *late[row]) == CAFE
    # Without the answer are 2 windows of `late`, 4 of `early`, 3 of `edge`.
    assert squad.counts("dev") == {"num_examples": 5, "num_rows": 21, "num_without_answer": 9}


def test_squad_training(squad: Published) -> None:
    """5 windows of `whole` point at [CLS]; of `lost`, a space without width, the tokenizer keeps nothing."""
    counts = {"num_examples": 7, "num_rows": 26, "num_without_answer": 14, "num_dropped": 1}
    assert squad.counts("train") == counts
    assert set(squad.inputs("train").ids) == {"late", "early", "edge", "none", "city", "whole"}
    assert pairs(squad.inputs("train"))[21:] == [NONE] * 5


def test_squad_a_perfect_model_scores_100(squad: Published) -> None:
    metrics, files = squad.score("dev", squad.sure_of(pairs(squad.inputs("dev"))))
    texts = {"late": CAFE, "early": "東京", "edge": "w17 w18", "none": "", "city": "Łódź"}
    assert files["predictions.json"] == texts
    assert metrics["total"] == 5
    for name in ("exact", "f1", "HasAns_exact", "NoAns_exact", "best_exact", "best_f1"):
        assert metrics[name] == 100
    assert files["null_odds.json"] == {name: -20 if text else 20 for name, text in texts.items()}


# A paragraph mark is piece 0, the answer 20 and 21, and again 28 and 29, the other mark 30.
STORY = f"[PAR] 東京 🎉 {words(4, 19)} Łódź {words(22, 27)} Łódź [DOC] {words(31, 39)}"


def mrqa_question(id: str, question: str, context: str, text: str) -> dict[str, Any]:
    """With every place of the answer, its last character included."""
    starts = [i for i in range(len(context)) if context.startswith(text, i)]
    detected = {"text": text, "char_spans": [[start, start + len(text) - 1] for start in starts]}
    return {"qid": id, "question": question, "answers": [text], "detected_answers": [detected]}


def mrqa_file(training: bool) -> list[dict[str, Any]]:
    """Two questions of a long context, one of a short one, and in training one too long for any window."""
    twice = mrqa_question("twice", "where is it", STORY, "Łódź") | {"answers": ["Lodz", "Łódź"]}
    early = mrqa_question("early", "where is it then", STORY, "東京")  # a piece too long
    cafe = ("cafe", "what is it", f"🎉 see the {CAFE} .", CAFE)
    asked = [cafe, *([("whole", "what is it", LONG + " end", TOO_LONG)] if training else ())]
    lines: list[dict[str, Any]] = [{"header": {}}, {"context": STORY, "qas": [twice, early]}]
    return lines + [{"context": some[2], "qas": [mrqa_question(*some)]} for some in asked]


FILES = ["newsqa {}.jsonl", "newsqa {}/NewsQA.jsonl.gz", "naturalqa {}.jsonl.gz"]


@pytest.fixture(params=[*FILES, "naturalqa {}/NaturalQuestionsShort.jsonl"])
def mrqa(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    name, file = request.param.split()
    for split in ("train", "dev"):
        path = tmp_path / file.format(split)
        path.parent.mkdir(exist_ok=True)
        write_lines(path, mrqa_file(training=split == "train"))
    return Published(name, tmp_path, **SETTINGS)


TWICE = [NONE, (19, 20), (13, 14), (7, 8), NONE]  # the last window holds the second place alone


def test_mrqa_windows_targets_and_score(mrqa: Published) -> None:
    """Of several places the first is the target; on dev all windows stay."""
    found = mrqa.inputs("dev")
    assert found.ids == ["twice"] * 5 + ["early"] * 5 + ["cafe"]
    rows = [f"[CLS] where is it [SEP] {pieces(spelled(STORY, *window))} [SEP]" for window in WINDOWS]
    assert mrqa.rows("dev") == [*rows, *rows, "[CLS] what is it [SEP] 🎉 see the naive cafe . [SEP]"]
    assert "[SEP] [unused1] 東 京 🎉 w4 " in rows[0]
    assert " ło ##dz [unused3] w31 " in rows[4]
    assert pairs(found) == [*TWICE, (6, 7), *[NONE] * 4, (8, 9)]
    # Without the answer are 2 windows of `twice` and 4 of `early`.
    counts = {"num_examples": 3, "num_rows": 11, "num_questions_cut": 1, "num_without_answer": 6}
    assert mrqa.counts("dev") == counts
    metrics, files = mrqa.score("dev", mrqa.sure_of(pairs(found)))
    assert files["predictions.json"] == {"twice": "Łódź", "early": "東京", "cafe": CAFE}
    assert metrics == {"exact_match": 100, "f1": 100}


def test_mrqa_training_leaves_out_windows_without_the_answer(mrqa: Published) -> None:
    found = mrqa.inputs("train")
    assert found.ids == ["twice"] * 3 + ["early", "cafe"]
    assert mrqa.rows("train") == [mrqa.rows("dev")[k] for k in (1, 2, 3, 5, 10)]
    assert pairs(found) == [*TWICE[1:4], (6, 7), (8, 9)]
    counts = {"num_examples": 4, "num_rows": 5, "num_questions_cut": 1, "num_discarded": 6, "num_dropped": 1}
    assert mrqa.counts("train") == counts


@pytest.mark.parametrize(
    ("name", "max_length", "place", "expected"),
    [  # 378 and 506 pieces of 700 fit; windows begin 128 apart, until one reaches the end
        ("squad", 384, 450, [NONE, (327, 328), (199, 200), (71, 72)]),
        ("newsqa", 512, 600, [NONE, (477, 478), (349, 350)]),
    ],
)
def test_the_published_lengths(
    tmp_path: Path, name: str, max_length: int, place: int, expected: list[tuple[int, int]]
) -> None:
    """With the settings of the data set left as they are, too, the answer is outside the first window."""
    context = f"{words(0, place - 1)} Łódź {words(place + 2, 699)}"
    make = squad_question if name == "squad" else mrqa_question
    paragraph = {"context": context, "qas": [make("q", "where is it", context, "Łódź")]}
    for split in ("train", "dev"):
        if name == "squad":
            write_json(tmp_path / f"{split}-v2.0.json", {"data": [{"paragraphs": [paragraph]}]})
        else:
            write_lines(tmp_path / f"{split}.jsonl.gz", [{"header": {}}, paragraph])
    data = Published(name, tmp_path, max_length=max_length)
    assert pairs(data.inputs("dev")) == expected
    assert pairs(data.inputs("train")) == (expected if name == "squad" else expected[1:])
    metrics, files = data.score("dev", data.sure_of(expected))
    assert files["predictions.json"] == {"q": "Łódź"}
    assert metrics["f1"] == 100
