"""Reads TriviaQA: as published (questions and evidence documents), or as a list like that of SQuAD.

Published at https://nlp.cs.washington.edu/triviaqa/ as `triviaqa-rc.tar.gz`: questions in `qa/web-*.json` and
`qa/wikipedia-*.json`, `{"Data": [{"QuestionId", "Question", "Answer": {"Aliases", "NormalizedAliases"},
"EntityPages": [{"Filename"}], "SearchResults": [{"Filename"}]}]}`, documents in `evidence/wikipedia` and
`evidence/web`. Each pair of a question and a document becomes a record, and the answer is searched in the
document. The official scorer judges these pairs; with `"Domain": "Wikipedia"`, a question has one answer.

The list is `[{"context", "qas": [{"qid", "question", "answers": {"Aliases"}, "detected_answers":
[{"char_spans": [[first, last]]}]}]}]`, where the last character belongs to the answer.
"""

import dataclasses
import itertools
import re
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import Span, SpanQuestion, trim
from trbert_jax.datasets.span_files import detected_spans, id_field, known_or_withheld, read_context, register
from trbert_jax.errors import UserError
from trbert_jax.io import find_path, read_text

MAX_WORDS = 800  # of a document, the default of the authors' own conversion to the format of SQuAD


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[SpanQuestion]:
    """Yields the questions of either format; an object at the top is the published one, a list the other."""
    document = reading.load_json(path)
    if isinstance(document, list):
        yield from known_or_withheld(_listed_questions(document, path, bad), bad)
        return
    evidence = _find_evidence(path)
    with reading.record(str(path)):
        questions = reading.items(document, "Data")
    with_answer = reading.any_given(questions, "Answer")
    one_answer = document.get("Domain") == "Wikipedia"
    for i, item in enumerate(questions):
        place = f"{path}: Data[{i}]"
        with bad.record(place, item):
            question_id, question = reading.identifier(item, "QuestionId"), reading.text(item, "Question")
            answers = accepted_answers(item, "Answer", "NormalizedAliases") if with_answer else ()
            for field, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web")):
                for k, page in enumerate(reading.items(item, field) if field in item else []):
                    where = f"{place}.{field}[{k}]"
                    with bad.record(where, item):
                        name = reading.text(page, "Filename")
                        text = _read_evidence(name, evidence / folder)
                        made = make_question(question_id, question, answers, name, text, where)
                        yield dataclasses.replace(made, scored_as=question_id) if one_answer else made


def make_question(
    question_id: str, question: str, answers: tuple[str, ...], name: str, document: str, where: str
) -> SpanQuestion:
    """Returns the record `QUESTION_ID--NAME` of a question and the document in the file `name`.

    The context is the first `MAX_WORDS` words of the document, with all that is between them.
    """
    words = itertools.islice(re.finditer(r"\S+", document), MAX_WORDS)
    context = document[: max((word.end() for word in words), default=0)]
    spans = find_aliases(context, answers)
    return SpanQuestion(f"{question_id}--{name}", question, context, spans, answers, False, where)


def accepted_answers(item: Any, key: str, aliases: str) -> tuple[str, ...]:
    """Returns what the official scorer compares with: `aliases` of the answer `key`, and `HumanAnswers`."""
    answer = reading.field(item, key)
    with reading.within(key):
        # The normalization drops signs (the band "!!!"), so an alias may be empty.
        accepted = reading.texts(answer, aliases, may_be_empty=True)
        if reading.has(answer, "HumanAnswers"):
            accepted += reading.texts(answer, "HumanAnswers", may_be_empty=True)
        if not accepted:
            raise ValueError(f"{aliases}: is empty; expected at least one alias")
    return tuple(trim(text) for text in accepted)


def _read_evidence(name: str, folder: Path) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"Filename: is {name!r}; expected a file inside {folder}")
    try:
        document = read_text(find_path(folder / name)).removeprefix("\ufeff")  # a byte order mark
    except (UserError, OSError, ValueError) as error:  # the last two for names that no file can have
        raise ValueError(f"Filename: the evidence cannot be read ({error}); expected a text file") from error
    if not document.strip():
        raise ValueError(f"Filename: the evidence {folder / name} is empty; expected a text")
    return document


def _find_evidence(path: Path) -> Path:
    """Returns the evidence folder of the published archive, which has `path` in its folder `qa`."""
    folders = [folder / "evidence" for folder in (path.absolute().parent.parent, path.absolute().parent)]
    for folder in filter(Path.is_dir, folders):
        return folder
    expected = " or ".join(map(str, folders))
    raise UserError(f"{path}: no evidence in {expected}; unpack triviaqa-rc.tar.gz as a whole")


def _listed_questions(document: Sequence[Any], path: Path, bad: BadRecords) -> Iterator[SpanQuestion]:
    for i, item in enumerate(document):
        with bad.record(f"{path}: [{i}]"):
            yield from read_context(item, f"{path}: [{i}].", bad, _listed_question)


def _listed_question(item: Any, context: str, where: str) -> SpanQuestion:
    question_id, question = reading.identifier(item, id_field(item)), reading.text(item, "question")
    withheld = not reading.any_given([item], "answers")
    answers = () if withheld else accepted_answers(item, "answers", "Aliases")
    spans = () if withheld else detected_spans(item, context, answers)
    return SpanQuestion(question_id, question, context, spans, answers, False, where)


_ARTICLES = frozenset(("a", "an", "the"))
# The official normalization reads ASCII punctuation and these four quotes as spaces.
_PUNCTUATION = string.punctuation + "‘’´`"
_TO_SPACE = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
# A run of letters, digits and accents, or any other sign but those and white space.
_WORD = re.compile(rf"(?:[^\W_]|[\u0300-\u036f])+|[^\s{re.escape(_PUNCTUATION)}]")


def normalize(answer: str) -> str:
    """Returns lower case without punctuation and articles, words one space apart; `U.S.A.` becomes `u s`."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_TO_SPACE)).split())


def find_aliases(context: str, aliases: Sequence[str]) -> tuple[Span, ...]:
    """Returns all places of the context that have an alias as whole words, in order.

    Ignores case, punctuation, articles and white space like the official scorer, which accepts the text of
    each span. Spans may overlap: `Sunset Boulevard` is part of `West Sunset Boulevard`. An alias of nothing
    but punctuation and articles is skipped; it would match everywhere.
    """
    by_first_word: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for alias in aliases:
        words = tuple(word for word, _, _ in _words(alias))
        if words:
            by_first_word[words[0]].add(words)
    in_context = _words(context)
    plain = [word for word, _, _ in in_context]
    places = set()
    for i, first in enumerate(plain):
        for words in by_first_word.get(first, ()):
            last = i + len(words) - 1
            if tuple(plain[i : last + 1]) == words:
                places.add((in_context[i][1], in_context[last][2]))
    # `_WORD` splits at a few signs that the normalization keeps: AC–DC is not AC DC to it.
    accepted = set(map(normalize, aliases))
    return tuple(Span(*place) for place in sorted(places) if normalize(context[slice(*place)]) in accepted)


def _words(document: str) -> list[tuple[str, int, int]]:
    """Returns lower-case words without articles, each with its first character and the one after it."""
    matches = ((match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(document))
    return [word for word in matches if word[0] not in _ARTICLES]


_FORMAT = '{"Data": [...]} with folder evidence, or [{"context": ..., "qas": [...]}]'
for _name, _part in (("triviaqa", "wikipedia"), ("triviaqa_web", "web")):
    register(_name, "triviaqa", read, _FORMAT, f"qa/{_part}-{{split}}.json", "{split}.json")
