"""Splits Hyperpartisan News Detection into train, dev and test files, and registers them.

The by-article part of SemEval-2019 task 4 comes as one set of 645 articles. Publications split it
themselves; this is the published TR-BERT split (docs/data.md, "Hyperpartisan").
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from trbert_jax.datasets import reading, text_files
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file, check_outputs, find_path, readable

LABELS = ("not hyperpartisan", "hyperpartisan")
_TEXT_FILE = "original_data.txt"
_ARTICLES, _GROUND_TRUTH = "articles-", "ground-truth-"
_SPLIT_FIRST = "split it first: trbert split-hyperpartisan --input {found} --output DIR"
_HINTS = ((_TEXT_FILE, _SPLIT_FIRST), (f"{_ARTICLES}*.xml", _SPLIT_FIRST))
# HTML elements that may begin or end within a word; all others, such as <p>, <li> and <br>, separate words.
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|mark|q|s|samp|small|span|strike|"
    "strong|sub|sup|time|tt|u|var|wbr",
    re.IGNORECASE,
)

text_files.register("hyperpartisan", "jsonl", LABELS, hints=_HINTS)


def split_hyperpartisan(input_path: str | Path, output_dir: str | Path) -> dict[str, int]:
    """Writes `train.jsonl`, `dev.jsonl` and `test.jsonl`; returns the number of articles by split.

    Args:
      input_path: `original_data.txt` (a line: id, label, text), an `articles-*.xml` with its
        `ground-truth-*.xml` beside it, or a folder that holds one of these.
      output_dir: folder for the three files; existing ones are replaced.

    Raises `UserError` for a missing or malformed file (with its line), or too few articles.
    """
    path = _find_source(Path(input_path).expanduser())
    read = _read_xml if path.suffix == ".xml" else _read_original_data
    folder = find_path(output_dir)
    check_outputs([folder / f"{name}.jsonl" for name in ("train", "dev", "test")], inputs=[path])
    splits = _divide(list(read(path)), path)
    for name, part in splits.items():
        with atomic_file(folder / f"{name}.jsonl") as stream:
            for example in part:
                line = {"text": example.text, "label": example.label}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return {name: len(part) for name, part in splits.items()}


def _divide(examples: list[Example], source: Path) -> dict[str, list[Example]]:
    """Returns the published split: seed 42, each class shuffled, its last tenths for dev and test.

    A tenth of class 0 is taken from both classes, and the classes follow each other. Both are oddities of
    the published split, kept so that results can be compared.
    """
    classes = [[e for e in examples if e.label == label] for label in range(len(LABELS))]
    size = int(len(classes[0]) / 10 + 0.5)
    if size == 0 or min(map(len, classes)) <= 2 * size:
        counts = ", ".join(f"{len(c)} {name}" for c, name in zip(classes, LABELS, strict=True))
        expected = "at least 5 not hyperpartisan, and hyperpartisan ones more than a fifth of that"
        raise UserError(f"{source}: too few articles to split ({counts}); expected {expected}")
    rng = random.Random(42)
    for members in classes:
        rng.shuffle(members)
    parts = {"train": slice(-2 * size), "dev": slice(-2 * size, -size), "test": slice(-size, None)}
    return {name: [e for members in classes for e in members[part]] for name, part in parts.items()}


def _read_original_data(path: Path) -> Iterator[Example]:
    """Yields the articles of lines of id, label (0 or 1) and text, separated by single spaces."""
    for number, line in reading.read_lines(path):
        if line.strip():
            with reading.record(f"{path}:{number}"):
                fields = line.removesuffix("\n").removesuffix("\r").split(" ", 2)
                if len(fields) != 3 or fields[1] not in ("0", "1"):
                    raise ValueError(f"expected `id label text`, label 0 or 1, got {line[:60].rstrip()!r}")
                item = {"text": fields[2], "label": int(fields[1])}
                yield text_files.make_example(fields[0], item, LABELS)


def _read_xml(articles_path: Path) -> Iterator[Example]:
    """Yields the articles of the two published files: title and body, white space collapsed."""
    truth_path = articles_path.with_name(_GROUND_TRUTH + articles_path.name.removeprefix(_ARTICLES))
    labels = {}
    for article_id, article in _articles(truth_path):
        with reading.record(f"{truth_path}: article {article_id}"):
            labels[article_id] = reading.one_of(article.attrib, "hyperpartisan", ("false", "true"))
    for article_id, article in _articles(articles_path):
        with reading.record(f"{articles_path}: article {article_id}"):
            if article_id not in labels:
                raise ValueError(f"not in {truth_path}; the two files do not belong together")
            words = f"{article.get('title', '')} {''.join(_pieces(article))}".split()
            item = {"text": " ".join(words), "label": labels.pop(article_id)}
            yield text_files.make_example(article_id, item, LABELS)
    if labels:
        raise UserError(f"{truth_path}: article {next(iter(labels))}: not in {articles_path}")


def _pieces(element: ElementTree.Element) -> Iterator[str]:
    """Yields the texts of an element, spaces around those that HTML shows on lines of their own."""
    space = "" if _INLINE.fullmatch(str(element.tag)) else " "
    yield space + (element.text or "")
    for child in element:
        yield from _pieces(child)
        yield child.tail or ""
    yield space


def _articles(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    try:
        with readable(path), path.open("rb") as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag == "article":
                    if "id" not in element.attrib:
                        raise UserError(f"{path}: an article without an id")
                    yield element.attrib["id"], element
                    element.clear()  # the by-publisher files do not fit into memory
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: not valid XML ({error})") from error


def _find_source(path: Path) -> Path:
    """Returns the file to split: `path` itself, or the one in a folder."""
    in_folder = list(path.glob(_TEXT_FILE)) or sorted(path.glob(f"{_ARTICLES}*.xml"))
    found = [path] if path.is_file() else in_folder
    if len(found) != 1 or (found[0].suffix == ".xml" and not found[0].name.startswith(_ARTICLES)):
        names = ", ".join(file.name for file in found) or "nothing to split"
        expected = f"one {_TEXT_FILE}, or one {_ARTICLES}NAME.xml with {_GROUND_TRUTH}NAME.xml"
        raise UserError(f"{path}: found {names}; expected {expected}")
    return found[0]
