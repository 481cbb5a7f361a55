"""Readers of the published formats of question answering and multiple choice, and which reads what.

Every reader is a function `read(path, bad)`: a file (RACE: a folder), and what to do about bad
records, to a list of records of `trbert_jax.datasets.records` in the order of the source. It raises
`UserError` with file, record and field. docs/data.md says where the data sets are published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from trbert_jax.datasets import hotpotqa, hotpotqa_graph, mrqa, race, squad, triviaqa, wikihop
from trbert_jax.datasets.bad_records import BadRecord, BadRecords
from trbert_jax.datasets.dataset import SPLITS, Announce
from trbert_jax.datasets.hotpotqa_graph import GraphQuestion
from trbert_jax.datasets.records import CandidateQuestion, ChoiceQuestion, MultiHopQuestion, SpanQuestion
from trbert_jax.errors import MissingSplitError, UserError

__all__ = ["QA_FORMATS", "BadRecord", "BadRecords", "QaFormat", "QaRecord", "find_split", "read_split"]

QaRecord = SpanQuestion | ChoiceQuestion | MultiHopQuestion | CandidateQuestion | GraphQuestion
Reader = Callable[[Path, BadRecords], Sequence[QaRecord]]


@dataclasses.dataclass(frozen=True)
class QaFormat:
    """Which files a data set has, and what reads them.

    Attributes:
      reader: `read(path, bad)`.
      files: for each split the names its file (RACE: folder) may have, in order of preference,
        relative to the folder of the data set.
      test_is_public: whether a test set with answers is published. Where none is, the dev set serves
        as test, unless the folder has a test set of the user's own.
    """

    reader: Reader
    files: Mapping[str, tuple[str, ...]]
    test_is_public: bool = False


def _each_split(*names: str) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({split: tuple(n.format(split=split) for n in names) for split in SPLITS})


def _splits(
    train: tuple[str, ...], dev: tuple[str, ...], test: tuple[str, ...]
) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({"train": train, "dev": dev, "test": test})


def _mrqa(name: str) -> QaFormat:
    own, published = "{split}.jsonl", f"{{split}}/{name}.jsonl"
    return QaFormat(mrqa.read, _each_split(own, f"{own}.gz", published, f"{published}.gz"))


def _triviaqa(part: str) -> QaFormat:
    return QaFormat(triviaqa.read, _each_split(f"qa/{part}-{{split}}.json", "{split}.json"))


_HOTPOT_TRAIN = ("hotpot_train_v1.1.json", "train.json")

QA_FORMATS: Mapping[str, QaFormat] = MappingProxyType(
    {
        "squad": QaFormat(squad.read, _each_split("{split}-v2.0.json", "{split}-v1.1.json")),
        "newsqa": _mrqa("NewsQA"),
        "naturalqa": _mrqa("NaturalQuestionsShort"),
        "race": QaFormat(race.read, _each_split("{split}"), test_is_public=True),
        "race_high": QaFormat(race.read_high, _each_split("{split}"), test_is_public=True),
        "race_middle": QaFormat(race.read_middle, _each_split("{split}"), test_is_public=True),
        "hotpotqa": QaFormat(
            hotpotqa.read,
            _splits(_HOTPOT_TRAIN, ("hotpot_dev_distractor_v1.json", "dev.json"), ("test.json",)),
        ),
        "hotpotqa_fullwiki": QaFormat(
            hotpotqa.read_fullwiki,
            _splits(_HOTPOT_TRAIN, ("hotpot_dev_fullwiki_v1.json", "dev.json"), ("test.json",)),
        ),
        "hotpotqa_graph": QaFormat(
            hotpotqa_graph.read,
            _splits(("hotpot_train_graph.json",), ("rerank_dev_tok.json",), ("test.json",)),
        ),
        "triviaqa": _triviaqa("wikipedia"),
        "triviaqa_web": _triviaqa("web"),
        "wikihop": QaFormat(
            wikihop.read, _splits(("train.json",), ("dev.json", "dev_sort.json"), ("test.json",))
        ),
    }
)


def read_split(
    name: str, folder: Path, split: str, bad: BadRecords, announce: Announce = print
) -> Sequence[QaRecord]:
    """Reads a split of a data set and announces what was left out.

    Args:
      name: a key of `QA_FORMATS`.
      folder: of the data set.
      split: `train`, `dev` or `test`.
      bad: what to do about bad records.
      announce: called with a line of text where dev serves as test, or records were skipped.

    Raises:
      UserError: see `find_split` and the readers.
    """
    path = find_split(name, folder, split, announce)
    before = len(bad.skipped)
    records = QA_FORMATS[name].reader(path, bad)
    if len(bad.skipped) > before:
        announce(f"{path}: {bad.summary(len(records), before)}")
    return records


def find_split(name: str, folder: Path, split: str, announce: Announce = print) -> Path:
    """The file (RACE: folder) of a split.

    Args:
      name, folder, split, announce: see `read_split`.

    Raises:
      UserError: an unknown name or split, no such folder, no file for the split.
    """
    if name not in QA_FORMATS:
        raise UserError(f"{name!r} is no question answering data set; expected {', '.join(QA_FORMATS)}")
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    form = QA_FORMATS[name]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that holds {' or '.join(form.files[split])}")
    found = _first(folder, form.files[split])
    if found is None and split == "test" and not form.test_is_public:
        found = _first(folder, form.files["dev"])
        if found is not None:
            announce(f"{name}: no test set with answers is published; {found.name} serves as test")
    if found is None:
        expected = " or ".join(form.files[split])
        raise MissingSplitError(f"{folder}: nothing to read for {split} of {name}; expected {expected} in it")
    return found


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)
