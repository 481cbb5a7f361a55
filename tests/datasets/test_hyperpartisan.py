import random
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from trbert_jax.datasets import DATASETS
from trbert_jax.datasets.hyperpartisan import split_hyperpartisan
from trbert_jax.errors import UserError

ARTICLES = "articles-training-byarticle-20181122.xml"
TRUTH = "ground-truth-training-byarticle-20181122.xml"
# The proportions of the published set, 407 to 238, by a tenth.
LABELS = [1, 0, 0, 1, 0, 0, 1, 0] * 8 + [0]  # 41 of class 0, 24 of class 1
TEXTS = [f"Title {i} & more  Some quoted text & a link\u2028of {i}." for i in range(len(LABELS))]


def write_original(folder: Path) -> Path:
    path = folder / "original_data.txt"
    lines = [f"{i:07d} {label} {TEXTS[i]}\n" for i, label in enumerate(LABELS)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_xml(folder: Path) -> Path:
    articles = [
        f'<article id="{i:07d}" published-at="2017-09-10" title={quoteattr(f"Title {i} & more")}>\n'
        f'<p>Some <q>quoted</q> te<b>xt</b> &amp; a <a href="" type="internal">link</a></p><p>of<br/>{i}.</p>'
        "</article>"
        for i in range(len(LABELS))
    ]
    truth = [
        f'<article id="{i:07d}" hyperpartisan="{"true" if label else "false"}" url="http://x.org/{i}"/>'
        for i, label in enumerate(LABELS)
    ]
    for name, lines in ((ARTICLES, articles), (TRUTH, truth)):
        content = "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', "<articles>", *lines, "</articles>"])
        (folder / name).write_text(content, encoding="utf-8")
    return folder / ARTICLES


def test_the_published_split(tmp_path: Path) -> None:
    # As published: one generator with seed 42 shuffles class 0, then class 1; a tenth of class 0
    # is taken from the end of both, the last block for test, the one before for dev.
    random.seed(42)
    expected: dict[str, list[tuple[str, int]]] = {"train": [], "dev": [], "test": []}
    for label in (0, 1):
        rows = [(text, k) for text, k in zip(TEXTS, LABELS, strict=True) if k == label]
        random.shuffle(rows)
        expected["train"] += rows[:-8]
        expected["dev"] += rows[-8:-4]
        expected["test"] += rows[-4:]

    def check(source: Path, *, collapsed: bool) -> None:
        output = tmp_path / "new" / source.name
        assert split_hyperpartisan(source, output) == {"train": 65 - 16, "dev": 8, "test": 8}
        for split, rows in expected.items():
            found = [(e.text, e.label) for e in DATASETS["hyperpartisan"].read_split(output, split)]
            assert found == [(" ".join(text.split()) if collapsed else text, k) for text, k in rows]

    check(write_xml(tmp_path), collapsed=True)
    check(tmp_path, collapsed=True)
    check(write_original(tmp_path), collapsed=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("0000000 1 fine\n0000001 2 text\n", ":2: '0000001 2 text'"),
        ("0000000 1\n", ":1: id label text"),
        ("0000000 1  \n", ":1: text empty"),
        ("", "few 0 not hyperpartisan"),
        ("".join(f"{i} {int(i < 2)} text\n" for i in range(12)), "few 10 not, 2 hyperpartisan"),
    ],
)
def test_mistakes_in_text(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "original_data.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        split_hyperpartisan(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:")
    assert all(word.strip(",") in str(caught.value) for word in words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (ARTICLES, "</article>", "", f"{ARTICLES}:.*XML"),
        (TRUTH, "</articles>", "", f"{TRUTH}:.*XML"),
        (TRUTH, '"true"', '"yes"', f"{TRUTH}: article 0000000: hyperpartisan: .*'yes'"),
        (TRUTH, 'id="0000001"', 'id="x"', f"{ARTICLES}: article 0000001: .*{TRUTH}"),
        (ARTICLES, 'id="0000064"', 'name="x"', f"{ARTICLES}: .*id"),
        (TRUTH, "</articles>", '<article id="x" hyperpartisan="true"/></articles>', f"x: .*{ARTICLES}"),
    ],
)
def test_mistakes_in_xml(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    path = write_xml(tmp_path)
    content = (tmp_path / name).read_text(encoding="utf-8")
    assert old in content
    (tmp_path / name).write_text(content.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        split_hyperpartisan(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path: Path) -> None:
    def raises(source: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            split_hyperpartisan(source, tmp_path / "out")

    raises(tmp_path / "nowhere", "nowhere: .*original_data.txt")
    raises(tmp_path, f"{tmp_path}: .*original_data.txt")
    path = write_xml(tmp_path)
    raises(tmp_path / TRUTH, f"{TRUTH}: .*articles-")
    (tmp_path / TRUTH).unlink()
    raises(path, f"{TRUTH}: no such file")
    (tmp_path / "articles-other.xml").touch()
    raises(tmp_path, f"{tmp_path}: .*articles-other.xml")
