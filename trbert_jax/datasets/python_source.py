"""Reads text that every machine has, for a first run without a download: Python's standard library.

Chunks of source text, comments and documentation included, are labeled by the top-level module or package
they come from. It is no benchmark: the texts depend on the version of Python.
"""

import functools
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

from trbert_jax.datasets import text_files
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.datasets.registry import DataSet, Options, PathLike, register_dataset, sample
from trbert_jax.errors import UserError

NUM_CLASSES = 12
CHUNKS_PER_CLASS = 320  # in all: 1,920 texts for train, 720 for dev, 1,200 for test
# The split of 16 chunks in a row: dev and test get every part of a module.
_PATTERN = ("train",) * 8 + ("dev",) * 3 + ("test",) * 5
_WORDS_PER_CHUNK = 84  # fills 96 tokens of a vocabulary that was trained on such text
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")  # where BERT's pre-tokenizer cuts
# Not with every installation of Python, or tables rather than text.
_SKIPPED_CLASSES = {
    "distutils", "encodings", "ensurepip", "html", "idlelib", "lib2to3",
    "pydoc_data", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}


class _StandardLibrary(DataSet):
    """Has chunks that differ and do not overlap. An id is the file and the number of the first line."""

    def read_labels(
        self, path: PathLike, bad: BadRecords | None = None, **options: Unpack[Options]
    ) -> tuple[str, ...]:
        return _read_all(path)[0]

    def load(self, path: PathLike, split: str, bad: BadRecords, options: Options) -> list[Any]:
        _, examples = _read_all(path)
        parts = [_PATTERN[i % CHUNKS_PER_CLASS % len(_PATTERN)] for i in range(len(examples))]
        members = [e for e, part in zip(examples, parts, strict=True) if part == split]
        return sample(members, split, options)


_stdlib = _StandardLibrary(name="stdlib", task="classification", read=text_files.read, needs_path=False)
register_dataset(_stdlib)


@functools.lru_cache(maxsize=1)
def _read_all(path: PathLike) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    root = Path(path or sysconfig.get_path("stdlib")).expanduser()
    chunks = defaultdict[str, list[tuple[str, str]]](list)  # ids and texts by class
    seen = set[str]()
    for name, file in _source_files(root):
        for line, text in _chunks(file):
            if text not in seen:
                seen.add(text)
                chunks[name].append((f"{file.relative_to(root).as_posix()}:{line}", text))
    large = [name for name, found in chunks.items() if len(found) >= CHUNKS_PER_CLASS]
    if len(large) < NUM_CLASSES:
        problem = f"{len(large)} modules of Python's standard library with enough source text"
        advice = f"at least {NUM_CLASSES}; set data.path to the folder of a complete one (its files *.py)"
        raise UserError(f"{root}: {problem}; expected {advice}")
    largest = sorted(large, key=lambda name: (-len(chunks[name]), name))[:NUM_CLASSES]
    examples = []
    for label, name in enumerate(sorted(largest)):
        for i in range(CHUNKS_PER_CLASS):  # evenly spaced over the module
            example_id, text = chunks[name][i * len(chunks[name]) // CHUNKS_PER_CLASS]
            examples.append(Example(example_id, text, label))
    return tuple(sorted(largest)), tuple(examples)


def _source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields top-level module and file, in the same order everywhere."""
    for top in sorted(root.iterdir()) if root.is_dir() else ():
        name = top.stem if top.suffix == ".py" else top.name
        if not name.isidentifier() or name.startswith("_") or name in _SKIPPED_CLASSES | _SKIPPED_FOLDERS:
            continue
        files = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
        for path in files:
            if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
                yield name, path


def _chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Yields whole lines of about `_WORDS_PER_CHUNK` words, with the number of the first line."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError):  # a file in another encoding is no loss
        return
    collected: list[str] = []
    words, first = 0, 1
    for number, line in enumerate(lines, 1):
        count = len(_WORD.findall(line))
        if collected and words + count > _WORDS_PER_CHUNK:
            # A short chunk comes before a very long line; both are left out.
            if _WORDS_PER_CHUNK // 2 < words <= _WORDS_PER_CHUNK:
                yield first, "\n".join(collected)
            collected, words, first = [], 0, number
        collected.append(line)
        words += count
