"""Text that every machine has: the source code of Python's standard library.

Pieces of source text, comments and documentation included, labeled by the top-level module or
package they come from. Made for a first run without a download; not a benchmark, the texts depend
on the version of Python.
"""

from __future__ import annotations

import functools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from trbert_jax.datasets import text_files
from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.dataset import Dataset, Example
from trbert_jax.datasets.registry import DataSet, register_dataset, sample
from trbert_jax.errors import UserError

NUM_CLASSES = 12
CHUNKS_PER_CLASS = 320  # 1,920 texts to train on, 720 and 1,200 to choose settings and to report by
# Of 16 chunks in a row so many go to each split: dev and test get every part of a module.
_PATTERN = ("train",) * 8 + ("dev",) * 3 + ("test",) * 5
# Fills 96 tokens of a vocabulary that was trained on such text.
_WORDS_PER_CHUNK = 84
_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")  # where BERT's pre-tokenizer cuts
# Not with every installation of Python, or tables rather than text.
_SKIPPED_CLASSES = {
    "distutils", "encodings", "ensurepip", "html", "idlelib", "lib2to3",
    "pydoc_data", "tkinter", "turtle", "turtledemo",
}  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}


def read_stdlib(split: str, folder: str | Path | None = None) -> Dataset:
    """Reads one split of the standard library's source text.

    Args:
      split: `train` (8 of 16 chunks), `dev` (3) or `test` (5).
      folder: the library's folder; by default that of the running Python.

    Returns:
      `CHUNKS_PER_CLASS` chunks for each of `NUM_CLASSES` classes over all splits, no two of them alike
      or overlapping. An id is the file and the number of the chunk's first line.

    Raises:
      UserError: the folder holds less than that.
    """
    root = Path(folder).expanduser() if folder else Path(sysconfig.get_path("stdlib"))
    label_names, examples = _read_all(root)
    members = [e for i, e in enumerate(examples) if _PATTERN[i % CHUNKS_PER_CLASS % len(_PATTERN)] == split]
    return Dataset(tuple(members), label_names)


@functools.lru_cache(maxsize=1)
def _read_all(root: Path) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    chunks: dict[str, dict[str, str]] = {}  # class -> text -> id; a text that repeats counts once
    seen: set[str] = set()
    for name, path in _source_files(root):
        for line, text in _chunks(path):
            if text not in seen:
                seen.add(text)
                chunks.setdefault(name, {})[text] = f"{path.relative_to(root).as_posix()}:{line}"
    large = [name for name, texts in chunks.items() if len(texts) >= CHUNKS_PER_CLASS]
    if len(large) < NUM_CLASSES:
        raise UserError(
            f"{root}: {len(large)} modules of Python's standard library with enough source text; expected "
            f"at least {NUM_CLASSES}. Set data.path to the folder of a complete one (its files *.py)"
        )
    largest = sorted(large, key=lambda name: (-len(chunks[name]), name))[:NUM_CLASSES]
    label_names = tuple(sorted(largest))
    examples = []
    for label, name in enumerate(label_names):
        available = list(chunks[name].items())
        for i in range(CHUNKS_PER_CLASS):  # evenly spaced over the module
            text, example_id = available[i * len(available) // CHUNKS_PER_CLASS]
            examples.append(Example(example_id, text, label))
    return label_names, tuple(examples)


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


class _StandardLibrary(DataSet):
    def read_labels(self, path: str | Path | None, label_field: str = "label") -> tuple[str, ...]:
        return read_stdlib("train", path).label_names

    def read_split(
        self,
        path: str | Path | None,
        split: str,
        bad: BadRecords | None = None,
        *,
        limit: int | None = None,
        seed: int = 42,
        text_field: str = "text",
        label_field: str = "label",
    ) -> list[Example]:
        return sample(read_stdlib(split, path).examples, limit, seed, split)


register_dataset(
    _StandardLibrary(name="stdlib", task="classification", read=text_files.read, needs_path=False)
)
