"""Pages of kept tokens: their numbers are those of predict, and a browser shows them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
from test_questions import SPAN, longer, model_config
from tiny_browser import SCREENS, accessible_tab, browser, opened, violations
from tiny_qa import qa_tokenizer

from trbert_jax import TRBert, answer_questions
from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import save_pretrained

TEXTS = ["the plot was dull and the film was not good .", "a very   bright film !", "goods"]
ATTACK = '</script><script>document.title = "broken"</script> the film <img src=x onerror="alert(1)"> & good'
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(tiny_models.BERT, operating_points=(tiny_models.POINT,))
    return tiny_models.tiny_model(tmp_path_factory.mktemp("show") / "reviews" / "model", config)


@pytest.fixture(scope="module")
def model(folder: Path) -> TRBert:
    return TRBert.from_pretrained(folder)


def test_the_numbers_are_those_of_predict(model: TRBert) -> None:
    page = model.show(TEXTS, repeats=1)
    data = json.loads(embedded(page.html))
    assert data == page.data
    assert (data["model"], data["points"]) == ("reviews", [1, 2])
    assert [setting["name"] for setting in data["settings"] if setting["name"]] == ["2x"]
    assert data["settings"][data["start"]]["thresholds"] == [0.5, 0.5]
    speedups = [setting["speedup"] for setting in data["settings"]]
    assert len(speedups) == 18
    assert speedups == sorted(speedups)
    dense = model.predict(TEXTS, rule="dense")
    for k, setting in enumerate(data["settings"]):
        thresholds = setting["thresholds"]
        for text, item, full, p in zip(
            TEXTS, data["inputs"], dense, model.predict(TEXTS, threshold=tuple(thresholds)), strict=True
        ):
            (row,) = item["rows"]
            assert item["reduced"][k] == {"answer": p.label, "score": pytest.approx(p.scores.max(), abs=1e-4)}
            assert item["dense"]["answer"] == full.label
            assert item["ms"]["reduced"][k] > 0
            assert row["tokens"] == p.tokens
            assert row["texts"] == [text]
            left = np.array([int(x) for x in row["settings"][k]["left"]])
            for stage, kept in enumerate(p.kept):
                np.testing.assert_array_equal(np.flatnonzero(left > stage), kept)
            # A token stays where its probability reaches the threshold; [CLS] always does.
            (later,) = row["settings"][k]["p"]
            for i in range(1, len(left)):
                assert row["tokens"][i].removeprefix("##") in (
                    "[SEP]",
                    "[UNK]",
                    text[slice(*row["at"][i][1:])],
                )
                for stage, p_stage in enumerate((row["p"][i], later[i])):
                    if left[i] >= stage and abs(p_stage - 100 * thresholds[stage]) > 1:
                        assert (left[i] > stage) == (p_stage > 100 * thresholds[stage])
            assert (later.count(None), row["p"][0]) == (int((left == 0).sum()), 100)


def test_deleted_tokens_are_gone(model: TRBert) -> None:
    """The first point has the dense answers, the last those of texts without 70 % of their words."""
    curve = model.show(TEXTS, repeats=0).data["corpus"]["deletion"]
    dense = model.predict(TEXTS, rule="dense")
    whole = np.mean([p.scores.max() for p in dense])
    assert [curve[name][0] for name in ("kept", "dropped", "random")] == [pytest.approx(whole, abs=1e-4)] * 3
    (text,) = ["good film dull bad"]  # four words, one piece each
    (full,), (now,) = (model.predict([text], rule=rule) for rule in ("dense", "threshold"))
    page = model.show([text], repeats=0).data["corpus"]
    passed = np.bincount(np.concatenate(now.kept), minlength=6)[1:5]
    assert len({*passed}) > 1
    for name, first in (("kept", passed.max()), ("dropped", passed.min())):
        found = page["deletion"][name][page["deletion"]["shares"].index(0.3)]  # one word of four
        rests = [" ".join(np.delete(text.split(), i)) for i in np.flatnonzero(passed == first)]
        possible = [p.scores[full.label_id] for p in model.predict(rests, rule="dense")]
        assert min(abs(x - found) for x in possible) < 1e-4


def test_a_notebook_shows_the_page_in_a_frame(model: TRBert) -> None:
    page = model.show(TEXTS, operating_point="2x", repeats=0)
    assert page.data["settings"][page.data["start"]]["name"] == "2x"
    assert page.data["inputs"][0]["ms"] is None
    assert page._repr_html_().startswith("<iframe ")
    assert "<script" not in page._repr_html_()


def test_answers_to_questions(tmp_path: Path) -> None:
    config = model_config("span")
    save_pretrained(tmp_path / "squad", config, tiny_models.tiny_params(config), qa_tokenizer())
    model = TRBert.from_pretrained(tmp_path / "squad")
    questions = [SPAN, {**longer("span"), "id": "long"}]
    page = model.show(questions, repeats=0)
    found = answer_questions(model, questions)
    for question, item, answer in zip(questions, page.data["inputs"], found, strict=True):
        now = item["reduced"][page.data["start"]]
        assert now["answer"] == answer["answer"]
        assert now.get("start") == answer.get("start")
        assert sum(len(row["tokens"]) for row in item["rows"]) == answer["num_tokens"]
        for row in item["rows"]:
            asked, context = row["texts"]
            assert asked == question["question"]
            assert question["context"][row["begin"] :].startswith(context)
            for token, (segment, a, b) in zip(row["tokens"], row["at"], strict=True):
                if segment >= 0 and token != "[UNK]":
                    assert row["texts"][segment][a:b].lower() == token.removeprefix("##")
    assert len(page.data["inputs"][1]["rows"]) > 1


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["show", "--model", str(folder)]
    data, output = tmp_path / "test.jsonl", tmp_path / "page.html"
    data.write_text("".join(json.dumps(x) + "\n" for x in tiny_runs.records(40, seed=7)), encoding="utf-8")
    assert main([*command, "--data", str(data), "--repeats", "0", "--output", str(output)]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    page = json.loads(embedded(output.read_text(encoding="utf-8")))
    assert (len(page["inputs"]), len(page["corpus"]["inputs"])) == (20, 40)
    changed = [x["dense"] != x["reduced"] for x in page["corpus"]["inputs"]]
    assert 0 < sum(changed) < 40
    assert all(x["shown"] is not None for x in np.array(page["corpus"]["inputs"])[changed][:20])
    with data.open("a", encoding="utf-8") as stream:
        stream.write('{"txt": 1}\n')
    again = [*command, "--data", str(data), "--repeats", "0", "--output", str(tmp_path / "again.html")]
    assert main(again) == 2
    assert "leave such records out with --skip-bad-records" in capsys.readouterr().err
    assert not (tmp_path / "again.html").exists()
    assert main([*again, "--skip-bad-records"]) == 0
    capsys.readouterr()
    assert main([*command, "the film was good"]) == 0  # without a terminal: dropped tokens as blanks
    line, text, _ = capsys.readouterr().out.split("\n", 2)
    p = TRBert.from_pretrained(folder).predict(["the film was good"])[0]
    kept = [
        word if i + 1 in p.kept[-1] else "_" * len(word)
        for i, word in enumerate(["the", "film", "was", "good"])
    ]
    assert line.startswith(str(p.label))
    assert text == " ".join(kept)
    for arguments, reason in (
        ([], "one of TEXT and --data"),
        (["--data", str(data)], "--data needs --output"),
        (["a", "--data", str(data), "--output", str(output)], "one of TEXT and --data"),
        (["a", "--operating-point", "9x"], "operating point '9x' is unknown; the model has 2x"),
        (["", "--output", str(output)], "has no tokens"),
    ):
        assert main([*command, *arguments]) == 2
        assert reason in capsys.readouterr().err


def test_other_models_are_refused(tmp_path: Path) -> None:
    config = model_config("choice")
    save_pretrained(tmp_path / "race", config, tiny_models.tiny_params(config), qa_tokenizer())
    with pytest.raises(UserError, match="a page shows texts, and questions answered with a span"):
        TRBert.from_pretrained(tmp_path / "race").show([])


def embedded(html: str) -> str:
    """The data of a page."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_a_page_needs_no_network(model: TRBert) -> None:
    html = model.show([ATTACK], repeats=0).html
    outside = re.sub(r'"http://www\.w3\.org/2000/svg"', "", html)
    assert not re.search(r"https?://|<link|@import|<img|src=(?!x)", outside.replace(embedded(html), ""))
    assert "</script><script>document" not in html
    assert len(html) < 10**6


# In a browser ----------------------------------------------------------------------------------------


@pytest.mark.browser
def test_slider_tabs_keys_and_escaping(browser: Any, model: TRBert, tmp_path: Path) -> None:
    page, errors = model.show([ATTACK, *TEXTS], repeats=1), list[str]()
    tab = opened(browser, page, tmp_path / "page.html", errors)
    assert tab.title() == "Tokens that reviews keeps"
    assert tab.inner_text("#rows").strip() == ATTACK
    assert tab.locator("#rows img").count() == 0
    # The slider moves tokens, FLOPs and answer together.
    tab.select_option("#input", "1")
    tab.focus("#threshold")
    for key, k in (("Home", 0), ("End", 17), ("ArrowLeft", 16)):
        tab.keyboard.press(key)
        item = page.data["inputs"][1]
        left = item["rows"][0]["settings"][k]["left"]
        places = [segment for segment, *_ in item["rows"][0]["at"]]
        words = sum(x == "2" and place >= 0 for x, place in zip(left, places, strict=True))
        assert tab.locator("#rows .kept").count() == words
        assert f"{left.count('2')} of {len(left)}" in tab.inner_text("#facts")
        assert f"{item['speedup'][k]:.2f}×" in tab.inner_text("#facts")
        assert item["reduced"][k]["answer"] in tab.inner_text("#facts")
    tab.click("#points button")
    assert tab.get_attribute("#points button", "aria-pressed") == "true"
    assert "0.30 and 0.60" in tab.inner_text("#facts")
    # Keys: the tokens of a text, and the tabs.
    tab.focus("#rows .text")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#token").startswith("the: ")
    tab.keyboard.press("ArrowRight")
    assert re.match(
        r"plot: .*keep probability \d+ %, threshold 30 %, rank \d+ of 13", tab.inner_text("#token")
    )
    tab.click("#units button:has-text('sentences')")
    assert tab.locator("#rows .t").count() == 1
    tab.focus("#tab-text")
    tab.keyboard.press("ArrowRight")
    assert tab.is_visible("#panel-corpus")
    assert not tab.is_visible("#panel-text")
    assert tab.locator("#panel-corpus .curve").count() == 3
    tab.keyboard.press("ArrowRight")
    assert "Other answer than the dense model" in tab.inner_text("#panel-errors")
    tab.click("#tab-text")
    for name in ("svg", "json"):
        with tab.expect_download() as download:
            tab.click(f"#save-{name}")
        content = Path(download.value.path()).read_text(encoding="utf-8")
        assert content.startswith("<svg") if name == "svg" else json.loads(content) == page.data
    assert errors == []


@pytest.mark.browser
@SCREENS
def test_everyone_can_read_it(browser: Any, model: TRBert, tmp_path: Path, scheme: str, width: int) -> None:
    page = model.show([*TEXTS, ATTACK], repeats=1)
    tab = accessible_tab(browser, page, tmp_path / "page.html", scheme, width)
    for name in ("text", "corpus", "errors"):
        tab.click(f"#tab-{name}")
        assert violations(tab) == []
