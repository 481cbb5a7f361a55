"""One's own texts: each format, label and split as people have them, and what is refused."""

import gzip
import io
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.datasets.labels import class_index, class_name, class_names
from trbert_jax.datasets.own_texts import read_labeled
from trbert_jax.datasets.tables import Fields
from trbert_jax.errors import UserError

TEXT = find_dataset("text")
RECORDS = [{"id": 7, "Text": 'so "good",\na film', "label": "yes"}, {"id": 8, "Text": "dull", "label": "no"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = 'id,Text,label\r\n7,"so ""good"",\na film", yes \r\n\r\n8,dull,no\r\n'


def parquet(records: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stream)
    return stream.getvalue()


FILES: dict[str, str | bytes] = {
    "a.csv": CSV,
    "b.CSV": "\ufeff" + CSV.replace(",", ";").replace(";\na", ",\na"),  # from a spreadsheet
    "c.tsv": CSV.replace(",", "\t").replace("\t\na", ",\na"),
    "d.JSONL": LINES + "\n",
    "e.ndjson": LINES,
    "f.json": json.dumps(RECORDS, indent=1),
    "g.json": LINES,
    "h.json": json.dumps({key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]}),
    "i.parquet": parquet(RECORDS),
    "j.csv.gz": gzip.compress(CSV.encode()),
    "k.parquet.GZ": gzip.compress(parquet(RECORDS)),
}


@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path: Path, name: str) -> None:
    content = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    examples = TEXT.read_split(None, "test", train=str(tmp_path / name), test=str(tmp_path / name))
    expected = [('so "good",\na film', 1), ("dull", 0)]
    assert [(e.text, e.label) for e in examples] == expected
    assert [str(e.given_id) for e in examples] == ["7", "8"]
    assert TEXT.read_labels(None, train=str(tmp_path / name)) == ("no", "yes")


def write(path: Path, rows: list[tuple[Any, ...]], header: str = "text,label") -> str:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 2.0, "3", "4.0"], ("2", "3", "4", "10")),
        ([0.5, 1.0, 10], ("0.5", "1", "10")),
        (["b ", "a", "B"], ("B", "a", "b")),
        ([True, False], ("False", "True")),
        (["nan", "1"], ("1", "nan")),
    ],
)
def test_classes_have_names(values: list[Any], names: tuple[str, ...]) -> None:
    assert class_names(values) == names
    assert [names[class_index(value, names)] for value in values] == [class_name(value) for value in values]


@pytest.mark.parametrize(
    ("value", "labels", "first", "expected"),
    [
        ("good", ("bad", "good"), 0, 1),
        (1.0, ("bad", "good"), 0, 1),
        ("1.0", ("bad", "good"), 0, 1),
        ("1", ("bad", "good"), 1, 0),
        (1, ("1", "2"), 1, 0),  # a name wins
        ("true", ("False", "True"), 0, 1),
        (2, ("bad", "good"), 0, "from 0 to 1"),
        (0, ("bad", "good"), 1, "from 1 to 2"),
        (0, ("1", "2"), 1, "expected one of 1, 2"),  # no number of a class where names are numbers
        (True, ("bad", "good"), 0, "true or false"),
        (None, ("bad", "good"), 0, "missing"),
        (float("nan"), ("bad", "good"), 0, "missing"),
        (" ", ("bad", "good"), 0, "empty"),
        ([1], ("bad", "good"), 0, "a list"),
    ],
)
def test_a_label_is_a_class_or_refused(
    value: Any, labels: tuple[str, ...], first: int, expected: Any
) -> None:
    if isinstance(expected, int):
        assert class_index(value, labels, first) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            class_index(value, labels, first)


def test_dev_is_a_share_of_each_class(tmp_path: Path) -> None:
    rows = [(f"text {i}", "abbbbbbbbb"[i % 10]) for i in range(200)] + [("once", "c")] + [("same", "b")] * 9
    train = write(tmp_path / "t.csv", rows)
    for share, sizes in ((0.1, {"a": 2, "b": 18}), (0.5, {"a": 10, "b": 90})):
        options: Any = {"train": train, "dev_share": share}
        parts = {split: TEXT.read_split(None, split, **options) for split in ("train", "dev")}
        assert sorted(e.id for part in parts.values() for e in part) == sorted(
            f"t.csv:{i}" for i in range(2, 212)
        )
        texts = {split: {e.text for e in part} for split, part in parts.items()}
        assert not texts["train"] & texts["dev"]
        found = Counter("abc"[e.label] for e in parts["dev"] if e.text != "same")
        assert all(abs(found[name] - size) <= 1 for name, size in sizes.items())
        assert "once" in texts["train"]
        assert [e.id for e in parts["dev"]] == [e.id for e in TEXT.read_split(None, "dev", **options, seed=9)]


def test_a_folder_holds_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.csv", [("a", 0)])
    write(tmp_path / "train-00001-of-00002.csv", [("b", 1), ("c", 1)])
    (tmp_path / "validation").mkdir()
    write(tmp_path / "validation/1.csv", [("d", 1)])
    write(tmp_path / "test.CSV", [("e",)], "text")
    (tmp_path / "test_notes.txt").touch()
    found = {split: TEXT.read_split(tmp_path, split) for split in ("train", "dev", "test")}
    texts = {split: [(e.text, e.label) for e in part] for split, part in found.items()}
    assert texts == {"train": [("a", 0), ("b", 1), ("c", 1)], "dev": [("d", 1)], "test": [("e", -1)]}
    write(tmp_path / "test.tsv", [])
    with pytest.raises(UserError, match=r"has test\.CSV and test\.tsv; name .* data\.test"):
        TEXT.read_split(tmp_path, "test")


# Content, options, words of the message after the file's name.
MISTAKES: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "t.csv": [
        ("review,stars\na,1\n", {}, ":1: 'text' 'review', 'stars' text_field"),
        ("text,label\na\n", {}, ":2: 1 2 columns"),
        ("text,label\na,b,c\n", {}, ":2: 3 2 quotes"),
        ("text,label,text\na,b,c\n", {}, ":1: 'text' twice"),
        ("text,label\n,b\n", {}, "no usable record"),
        ("text,label\na,\n", {}, ":2: label missing"),
        ('text,label\n"a,1\nb,2\nc,3\n', {}, ":2: CSV"),
        ('text,label\n"a" b,1\n', {}, ":2: CSV"),
        ("text,label\n", {}, "no usable record"),
        ("", {}, "no usable record"),
        ("0,1\n0,2\n", {}, ":1: 'text' '0', '1'"),  # two numbers: which is the label?
        ("text,label\nb,1\na,2\n", {"labels": ("1", "3")}, ":3: label '2' 1, 3"),
        ("text,id\n" + "".join(f"t{i},{i}x\n" for i in range(99)), {"label_field": "id"}, "99 label_field"),
    ],
    "t.tsv": [('text\tlabel\n"a\t1\nb"\t2\n', {}, ":2: CSV")],
    "t.json": [("[1]", {}, ":1: number object"), ('{"data": []}', {}, ":1: text missing"), ("[", {}, "JSON")],
    "t.jsonl": [('{"text": "a", "label": 1}\n{"text": null}\n', {}, ":2: text null")],
    "t.parquet": [("PAR1", {}, "Parquet")],
    "t.xlsx": [("", {}, ".csv .parquet .gz")],
    "t.csv.gz": [("text", {}, "download")],
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in MISTAKES.items() for case in cases]
)
def test_mistakes(tmp_path: Path, name: str, case: tuple[str, dict[str, Any], str]) -> None:
    content, options, words = case
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        TEXT.read_split(None, "train", train=str(tmp_path / name), dev=str(tmp_path / name), **options)
    assert str(caught.value).startswith(f"{tmp_path / name}:")
    for word in words.split():
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("2,a film\n1,b\n", Fields()),  # as the Yelp reviews
        ("a film,2\nb,1\n", Fields()),
        ("2,x,a film\n1,y,b\n", Fields("3", label="1")),
        ("stars,review\n2,a film\n1,b\n", Fields("Review", label="stars")),
        ("text,label\na film,good\nb,bad\n", Fields("review", label="stars", or_default=("text", "label"))),
    ],
)
def test_columns_without_and_with_a_header(tmp_path: Path, content: str, fields: Fields) -> None:
    (tmp_path / "t.csv").write_text(content)
    names = ("1", "2") if "good" not in content else ("bad", "good")
    examples = read_labeled(tmp_path / "t.csv", names, BadRecords(), fields)
    assert [(e.text, e.label) for e in examples] == [("a film", 1), ("b", 0)]


def test_empty_texts_are_left_out_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "text,label\na,x\n,x\nb,y\n \t,\nc,x\nd,y\n"
    file = str(tmp_path / "t.csv")
    Path(file).write_text(rows)
    found = [e.text for split in ("train", "dev") for e in TEXT.read_split(None, split, train=file)]
    assert sorted(found) == ["a", "b", "c", "d"]
    assert TEXT.read_labels(None, train=file) == ("x", "y")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == f"{file}: left out 2 of 6 texts, empty: {file}:3, {file}:5"
    with pytest.raises(UserError, match=r"t\.csv:3: text: is empty"):  # evaluation leaves nothing out
        TEXT.read_file(file, labels=("x", "y"))


def test_bad_records_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(tmp_path / "t.csv", [("a", "x"), ("", "x"), ("b",), ("c", "y"), ("d", ""), ("e", "y")])
    bad = BadRecords(skip=True)
    examples = TEXT.read_split(None, "train", bad, train=train, dev=train)
    assert [e.text for e in examples] == ["a", "c", "e"]
    assert [str(error).split(": ")[0] for error in bad.skipped] == [f"{train}:{n}" for n in (3, 4, 6)]
    assert "3 of 6 records skipped" in caplog.messages[-1]


class Split(list[dict[str, Any]]):
    """A split of `datasets`."""

    features: dict[str, Any]

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None) -> None:
        super().__init__(rows)
        label = types.SimpleNamespace(names=names) if names else types.SimpleNamespace()
        self.features = {"sentence": types.SimpleNamespace(), "more": types.SimpleNamespace(), "kind": label}

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in names} for row in self]


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sentence": f"s{i}", "more": f"m{i}", "kind": i % 2} for i in range(6)]
    named = {"train": Split(rows, ["z", "a"]), "test": Split([{**rows[0], "kind": -1}], ["z", "a"])}
    found = {("a", None): named, ("b", "c"): {"train": Split(rows, None)}}
    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", lambda x, c, cache_dir: found[x, c], raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    options: Any = {"text_field": "sentence", "text_pair_field": "more", "label_field": "kind"}
    data = find_dataset("hf:a")
    assert data.read_labels(None, **options) == ("z", "a")
    parts = {split: data.read_split(None, split, **options) for split in ("train", "dev", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 4, "dev": 2, "test": 1}
    assert {(e.text, e.pair, e.label) for e in parts["train"] + parts["dev"]} == {
        (f"s{i}", f"m{i}", i % 2) for i in range(6)
    }
    assert parts["test"][0].label == -1
    assert find_dataset("hf:b:c").read_labels(None, **options) == ("0", "1")
    for name, key, words in (
        ("b:c", "text_field", "data.text_field: .* sentence"),
        ("x", "more", "hf:x cannot"),
    ):
        with pytest.raises(UserError, match=words):
            find_dataset(f"hf:{name}").read_split(None, "train", **{**options, key: "none"})


def test_quotes_of_a_tsv_file_without_quoting_belong_to_the_text(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('text\tlabel\n"so" he said\t1\nb "c\t0\n"d"\t0\n')
    examples = read_labeled(tmp_path / "t.tsv", ("0", "1"), BadRecords(), Fields())
    assert [(e.text, e.label) for e in examples] == [('"so" he said', 1), ('b "c', 0), ("d", 0)]
