"""Hyperpartisan News Detection: from the published articles to train, dev and test files.

The by-article part of SemEval-2019 task 4 comes as one set of 645 articles. Everybody who reports
results on it splits it; this is the published TR-BERT split (docs/data.md, "Hyperpartisan").
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from trbert_jax.datasets.dataset import Example, make_example
from trbert_jax.datasets.text_files import read_lines
from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file

LABEL_NAMES = ("not hyperpartisan", "hyperpartisan")
_LABELS = {"false": 0, "true": 1}
_SEED = 42
_TEXT_FILE = "original_data.txt"
_ARTICLES, _GROUND_TRUTH = "articles-", "ground-truth-"


def split_hyperpartisan(input_path: str | Path, output_dir: str | Path) -> dict[str, int]:
    """Writes `train.jsonl`, `dev.jsonl` and `test.jsonl`.

    Args:
      input_path: `original_data.txt` (a line: id, label, text), an `articles-*.xml` with its
        `ground-truth-*.xml` beside it, or a folder that holds one of these.
      output_dir: folder for the three files; existing ones are replaced.

    Returns:
      Number of articles by split.

    Raises:
      UserError: a missing or malformed file (with its line), too few articles, no permission.
    """
    path = _find_source(Path(input_path).expanduser())
    examples = read_xml(path) if path.suffix == ".xml" else read_original_data(path)
    splits = divide(examples, str(path))
    for name, part in splits.items():
        with atomic_file(Path(output_dir).expanduser() / f"{name}.jsonl") as stream:
            for example in part:
                record = {"text": example.text, "label": example.label}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {name: len(part) for name, part in splits.items()}


def divide(examples: list[Example], source: str) -> dict[str, list[Example]]:
    """The published split: 42 as seed, each class shuffled, its last tenths for dev and test.

    A tenth of class 0 is taken from both classes, and the classes follow each other; both are
    oddities of the published split, kept so that results can be compared.

    Raises:
      UserError: a class is too small to be divided.
    """
    classes = [[e for e in examples if e.label == label] for label in range(len(LABEL_NAMES))]
    size = int(len(classes[0]) / 10 + 0.5)
    if size == 0 or min(map(len, classes)) <= 2 * size:
        counts = ", ".join(f"{len(c)} {name}" for c, name in zip(classes, LABEL_NAMES, strict=True))
        raise UserError(
            f"{source}: too few articles to split ({counts}); expected at least 5 not hyperpartisan, and "
            "hyperpartisan ones more than a fifth of that"
        )
    rng = random.Random(_SEED)
    for members in classes:
        rng.shuffle(members)
    return {
        "train": [e for members in classes for e in members[: -2 * size]],
        "dev": [e for members in classes for e in members[-2 * size : -size]],
        "test": [e for members in classes for e in members[-size:]],
    }


def read_original_data(path: Path) -> list[Example]:
    """Reads lines of id, label (0 or 1) and text with single spaces between them."""
    examples = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where, fields = f"{path}:{number}", line.removesuffix("\n").removesuffix("\r").split(" ", 2)
        if len(fields) != 3 or fields[1] not in ("0", "1"):
            raise UserError(f"{where}: expected `id label text`, label 0 or 1, got {line[:60].rstrip()!r}")
        examples.append(make_example(where, fields[0], fields[2], int(fields[1]), LABEL_NAMES))
    return examples


def read_xml(articles_path: Path) -> list[Example]:
    """Reads the two published files; a text is the article's title and body, white space collapsed.

    Args:
      articles_path: the `articles-*.xml`; the `ground-truth-*.xml` of the same name lies beside it.

    Raises:
      UserError: a file is missing or malformed, or an article is not in both.
    """
    truth_path = articles_path.with_name(_GROUND_TRUTH + articles_path.name.removeprefix(_ARTICLES))
    labels = {}
    for article_id, article in _articles(truth_path):
        value = article.get("hyperpartisan")
        if value not in _LABELS:
            raise UserError(
                f"{truth_path}: article {article_id}: hyperpartisan={value!r}; expected true or false"
            )
        labels[article_id] = _LABELS[value]
    examples = []
    for article_id, article in _articles(articles_path):
        where = f"{articles_path}: article {article_id}"
        if article_id not in labels:
            raise UserError(f"{where}: not in {truth_path}; the two files do not belong together")
        text = " ".join(f"{article.get('title', '')} {''.join(article.itertext())}".split())
        examples.append(make_example(where, article_id, text, labels.pop(article_id), LABEL_NAMES))
    if labels:
        raise UserError(f"{truth_path}: article {next(iter(labels))}: not in {articles_path}")
    return examples


def _articles(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    try:
        with path.open("rb") as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag == "article":
                    article_id = element.get("id")
                    if article_id is None:
                        raise UserError(f"{path}: an article without an id")
                    yield article_id, element
                    element.clear()  # the by-publisher files do not fit into memory
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: not valid XML ({error})") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; the articles and the ground truth are both needed") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error


def _find_source(path: Path) -> Path:
    expected = f"expected {_TEXT_FILE}, or {_ARTICLES}NAME.xml and {_GROUND_TRUTH}NAME.xml"
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {expected}")
    if path.is_dir():
        if (path / _TEXT_FILE).exists():
            return path / _TEXT_FILE
        found = sorted(path.glob(f"{_ARTICLES}*.xml"))
        if not found:
            raise UserError(f"{path}: nothing to split; {expected}")
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{path}: holds {names}; give one of them as the input")
        return found[0]
    if path.suffix == ".xml" and not path.name.startswith(_ARTICLES):
        raise UserError(f"{path}: give the file whose name begins with {_ARTICLES}; {expected}")
    return path
