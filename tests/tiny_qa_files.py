"""Small files of question answering data sets, each in its published format, to read and to spoil."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trbert_jax.datasets import DATASETS, BadRecords

MOUNTAIN = "Mont\u00a0Blanc rises to 4,808 m.\u2028The Élysée in  Paris is lower; 東京 is far."


def squad_document() -> Any:
    """Version 2.0: several answers, a repeated one, multi-byte text, a question without answer."""

    def answers(*texts: str) -> list[dict[str, Any]]:
        return [{"text": text, "answer_start": MOUNTAIN.index(text)} for text in texts]

    questions: list[dict[str, Any]] = [
        {"id": "q1", "question": "How high is it?", "answers": answers("4,808 m", "4,808", "4,808")},
        {"id": "q2", "question": "Which city is far?", "answers": answers("東京")},
        {"id": "q3", "question": "Who climbed it?", "answers": [], "plausible_answers": answers("Paris")},
    ]
    for question in questions:
        question["is_impossible"] = not question["answers"]
    other = {"id": "q4", "question": "What is here?", "answers": [{"text": "words", "answer_start": 5}]}
    first = {"title": "Mont_Blanc", "paragraphs": [{"context": MOUNTAIN, "qas": questions}]}
    second = {"title": "Other", "paragraphs": [{"context": "Some words.", "qas": [other]}]}
    return {"version": "v2.0", "data": [first, second]}


def mrqa_document() -> Any:
    """A header and two contexts; the first question has two answers, the second of them twice."""
    first, second, article = MOUNTAIN.index("Paris"), MOUNTAIN.index("東"), MOUNTAIN.index("The")
    paris = {"text": "Paris", "char_spans": [[first, first + 4]]}
    tokyo = {"text": "東京", "char_spans": [[second, second + 1], [second, second + 1]]}
    elysee = {"text": "the elysee", "char_spans": [[article, MOUNTAIN.index(" in")]]}
    found = {"text": "b c", "char_spans": [[2, 4]], "token_spans": [[1, 2]]}

    def question(text: str, *detected: dict[str, Any], **ids: str) -> dict[str, Any]:
        answers = [answer["text"] for answer in detected]
        return {**ids, "question": text, "answers": answers, "detected_answers": list(detected)}

    questions = [question("Where?", paris, tokyo, qid="n1", id="story#1"), question("What?", elysee, id="n2")]
    return [
        {"header": {"dataset": "NewsQA", "split": "dev"}},
        {"id": "", "context": MOUNTAIN, "qas": questions, "context_tokens": []},
        {"id": "", "context": "a b c", "qas": [question("Which?", found, qid="n3")]},
    ]


def race_document() -> Any:
    """Articles by file; one has few questions, one has none."""
    elodie = {
        "article": "Élodie reads.",
        "questions": ["Who reads?", "", "She _ ."],
        "options": [["Élodie", "Bo", "Cy", "Di"], ["a", "b", "c", "d"], ["reads", "x", "x", "y z"]],
        "answers": ["A", "D", "A"],
        "id": "high2.txt",
    }
    bo = {"questions": ["Who runs?"], "options": [["Al", "Bo", "Cy", "Di"]], "answers": ["B"]}
    none: Any = {"questions": [], "options": [], "answers": []}
    return {
        "high/2.txt": elodie,
        "high/10.txt": {"article": "No question.", **none},
        "middle/1.txt": {"article": "Bo runs.", **bo},
    }


def hotpotqa_document() -> Any:
    """A span, a yes and, in the last, an empty sentence that counts."""
    leon = ["Léon", ["Léon is a film.", " It is from 1994."]]
    nikita = ["Nikita", ["Nikita is older.", "", " It is from 1990."]]
    h1 = {"_id": "h1", "question": "When was the older film made?", "answer": "1990"}
    h1 |= {"type": "bridge", "level": "hard"}
    h2 = {"_id": "h2", "question": "Are both films?", "answer": "yes"}
    return [
        {**h1, "context": [leon, nikita], "supporting_facts": [["Nikita", 2], ["Léon", 1]]},
        {**h2, "context": [leon, nikita], "supporting_facts": [["Léon", 0]]},
    ]


def hotpotqa_graph_document() -> Any:
    """Two lines of training; the second has a third paragraph without support, and an empty sentence."""

    def node(name: str, context: str, spans: Any, sent_pos: Any, supp_label: Any) -> dict[str, Any]:
        fields = {"name": name, "context": context.split(), "spans": spans, "sent_pos": sent_pos}
        return {**fields, "supp_label": supp_label, "has_supp": any(supp_label)}

    film = node("Léon_(film)", "le ##on is a film", [[0, 1], [4, 4]], [[0, 2], [2, 5]], [1, 0])
    older = {**node("Nikita", "older", [], [[0, 1]], [1]), "has_supp": 1}
    other = node("Other", "no [SEP]", [], [[0, 2], [2, 2]], [0, 0])
    return [
        {"question": "Which film?", "answer": "Léon", "edge": [[0, 1]], "node": [film, older]},
        {"question": "Is it?", "answer": "yes", "edge": [], "node": [film, older, other]},
    ]


def hotpotqa_graph_dev_document() -> Any:
    """As the training lines, with ids, words and the words' numbers, without spans."""
    lines = hotpotqa_graph_document()
    for number, line in enumerate(lines):
        line["qid"] = f"g{number}"
        for node in line["node"]:
            for field in ("spans", "has_supp"):
                node.pop(field, None)
            node["doc_tokens"] = ["w"] * len(node["context"])
            node["tok_to_orig_index"] = [-1, *range(1, len(node["context"]))]
    return lines


DOCUMENTS = {
    "wikipedia/Lloyd_Webber.txt": "Lloyd Webber wrote\nSUNSET  BOULEVARD, that is, The Sunset Boulevard.\n",
    "wikipedia/Élysée.txt": "Rien. Le Sunset\u2019Boulevard?",
    "web/35/35_995.txt": "west sunset boulevard",
}


def triviaqa_document() -> Any:
    """Two questions with one answer each; the first has three documents."""
    answer = {
        "Aliases": ["Sunset Boulevard", "West Sunset Boulevard"],
        "NormalizedAliases": ["sunset boulevard", "west sunset boulevard"],
        "NormalizedValue": "sunset boulevard",
        "Value": "Sunset Boulevard",
        "Type": "WikipediaEntity",
    }
    lloyd = {"Filename": "Lloyd_Webber.txt"}
    first = {
        "QuestionId": "tc_33",
        "Question": "Which Lloyd Webber musical premiered in the US in 1993?",
        "Answer": answer,
        "EntityPages": [lloyd, {"Filename": "Élysée.txt"}],
        "SearchResults": [{"Filename": "35/35_995.txt", "Rank": 0}],
    }
    author = {**answer, "NormalizedAliases": ["lloyd webber"], "HumanAnswers": ["Webber, the"]}
    second = {"QuestionId": "tc_34", "Question": "Who wrote it?", "Answer": author, "EntityPages": [lloyd]}
    return {"Domain": "Wikipedia", "Data": [first, second]}


def triviaqa_list_document() -> Any:
    """Two contexts with a question each; the second has no span."""

    def context(text: str, id: str, question: str, aliases: list[str], *spans: list[int]) -> dict[str, Any]:
        found = [{"char_spans": [span]} for span in spans]
        answers = {"answers": {"Aliases": aliases}, "detected_answers": found}
        return {"context": text, "qas": [{"qid": id, "question": question, **answers}]}

    return [
        context("東京 is big; Tokyo is.", "t1", "Which city?", ["Tokyo", "東京"], [0, 1], [11, 15]),
        context("Nothing here.", "t2", "Which?", ["Kyoto"]),
    ]


def wikihop_document() -> Any:
    """Candidates of several words, the right one last; documents, one of them empty."""
    first = {"candidates": ["france", "united kingdom", "côte d'ivoire"], "answer": "côte d'ivoire"}
    supports = ["Élan vital is from Côte d'Ivoire.", ""]
    return [
        {"id": "WH_dev_0", "query": "country élan vital", **first, "supports": supports},
        {"id": "WH_dev_1", "query": "genre x", "candidates": ["y"], "supports": ["x is y"], "answer": "y"},
    ]


def write_json(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, document: Any) -> Path:
    """Writes JSON lines, gzip-compressed if the name ends in `.gz`."""
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in document).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_race(path: Path, document: Any) -> Path:
    for name, article in document.items():
        write_json(path / name, article)
    return path


def write_triviaqa(path: Path, document: Any) -> Path:
    """Writes the questions, and the evidence beside the folder of `path`, as in the archive."""
    for name, text in DOCUMENTS.items():
        evidence = path.parent.parent / "evidence" / name
        evidence.parent.mkdir(parents=True, exist_ok=True)
        evidence.write_text(text, encoding="utf-8")
    return write_json(path, document)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A good file in the format of a data set."""

    dataset: str
    document: Callable[[], Any]
    write: Callable[[Path, Any], Path]
    path: str

    def fresh(self) -> Any:
        """Returns the document, in which no two parts are the same object."""
        return json.loads(json.dumps(self.document()))

    def read(self, path: Path, bad: BadRecords | None = None) -> Any:
        return DATASETS[self.dataset].read_file(path, bad)


SAMPLES = {
    "squad": Sample("squad", squad_document, write_json, "dev-v2.0.json"),
    "mrqa": Sample("newsqa", mrqa_document, write_lines, "dev.jsonl"),
    "mrqa_gz": Sample("newsqa", mrqa_document, write_lines, "dev.jsonl.gz"),
    "race": Sample("race", race_document, write_race, "dev"),
    "triviaqa": Sample("triviaqa", triviaqa_document, write_triviaqa, "qa/wikipedia-dev.json"),
    "triviaqa_list": Sample("triviaqa", triviaqa_list_document, write_json, "dev.json"),
    "wikihop": Sample("wikihop", wikihop_document, write_json, "dev.json"),
}
for _name, _document, _write, _path in (
    # A question with each document by itself.
    ("triviaqa_web", lambda: {**triviaqa_document(), "Domain": "Web"}, write_triviaqa, "qa/web-dev.json"),
    ("hotpotqa", hotpotqa_document, write_json, "hotpot_dev_distractor_v1.json"),
    ("hotpotqa_fullwiki", hotpotqa_document, write_json, "hotpot_dev_fullwiki_v1.json"),
    ("hotpotqa_graph", hotpotqa_graph_document, write_lines, "hotpot_train_graph.json"),
    ("hotpotqa_graph_dev", hotpotqa_graph_dev_document, write_lines, "rerank_dev_tok.json"),
):
    SAMPLES[_name] = Sample(_name.removesuffix("_dev"), _document, _write, _path)


def read_sample(name: str, folder: Path, document: Any = None, bad: BadRecords | None = None) -> Any:
    """Writes a sample, or a document in its format, and reads it."""
    sample = SAMPLES[name]
    path = sample.write(folder / sample.path, sample.fresh() if document is None else document)
    return sample.read(path, bad)
