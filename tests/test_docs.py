"""The documentation: links, paths, commands, citations in the code, and tables that repeat a registry."""

import argparse
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import tiny_models
import yaml

from trbert_jax.cli import COMMANDS, parse_arguments
from trbert_jax.config import STAGES, BackboneConfig, DataConfig, RunConfig, load_config
from trbert_jax.datasets import DATASETS, dataset_names
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.reduction.rules import RULES
from trbert_jax.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = sorted(
    p
    for folder, suffix in (("trbert_jax", "py"), ("tests", "py"), ("configs", "yaml"))
    for p in (ROOT / folder).rglob(f"*.{suffix}")
    if p != Path(__file__)
)
# docs/PAGE.md, "Heading": the heading may stand on the next line, of a docstring or a comment.
CITATION = re.compile(r"""docs/([\w-]+\.md),[\s#]+(["'])(.+?)\2""", re.DOTALL)

WORDS = {"true": True, "false": False, "null": None, "–": "–"}  # in tables of settings; – is no such key


def text_of(page: Path) -> str:
    """A page without its code blocks, in which `#` is no heading and brackets are no link."""
    return re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    return [h.strip() for h in re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings(page)}


def test_cited_headings_exist() -> None:
    texts = {source: source.read_text(encoding="utf-8") for source in SOURCES}
    for name in re.findall(r"docs/([\w-]+\.md)", "".join(texts.values())):
        assert (ROOT / "docs" / name).is_file(), name
    cited = [
        (source, match[1], re.sub(r"\s+#?\s*", " ", match[3]))
        for source, text in texts.items()
        for match in CITATION.finditer(text)
    ]
    assert len(cited) > 10
    assert [found for found in cited if found[2] not in headings(ROOT / "docs" / found[1])] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)", text_of(page)):
        if re.match(r"[a-z]+:", target):  # http:, mailto:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), target
    for path in re.findall(r"`((?:trbert_jax|configs|tests)/[^`\s]*)`", text_of(page)):
        # A test may be named as pytest names it, FILE::TEST.
        assert list(ROOT.glob(path.partition("::")[0].rstrip("/"))), path
    assert len(set(headings(page))) == len(headings(page))  # else a link or citation is ambiguous
    if page.name == "README.md":
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_commands_of_the_pages_are_accepted() -> None:
    """In code blocks; a command with continued lines is one line."""
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```\w*\n(.*?)^```", texts, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith("trbert ")]
    assert len(commands) > 10
    for command in commands:
        parse_arguments(shlex.split(command, comments=True)[1:])  # exits if an option is unknown


def blocks(language: str) -> dict[str, list[str]]:
    """The blocks of code of each page; CONTRIBUTING.md has a test of its own."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES if page.name != "CONTRIBUTING.md"}
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return {name: found for name, text in texts.items() if (found := pattern.findall(text))}


def test_python_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.tiny_model(Path("runs/quickstart/model"))
    folders = [f"aclImdb/{split}/{name}" for split in ("train", "test") for name in ("neg", "pos")]
    folders += [f"20news-bydate-{split}/group{i:02}" for split in ("train", "test") for i in range(20)]
    for folder in map(Path, folders):
        folder.mkdir(parents=True)
        (folder / "1").write_text("a café", encoding="latin-1" if "20news" in str(folder) else "utf-8")
    found = blocks("python")
    assert set(found) == {"README.md", "data.md", "show.md"}
    for code in (code for page in found.values() for code in page):
        exec(code, {"__name__": "__main__"})
    assert Path("page.html").exists()
    for name, count in (("imdb", 2), ("20news", 20)):
        examples = DATASETS[name].read_split(f"data/{name}", "test")
        assert [(e.text, e.label) for e in examples] == [("a café", label) for label in range(count)]


def test_settings_of_the_pages_are_accepted(tmp_path: Path) -> None:
    """A block may leave out what every run needs."""
    needed = {"workdir": "w", "data": {"name": "imdb", "path": "x"}, "model": {"init": "scratch"}}
    for page, codes in blocks("yaml").items():
        for code in codes:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump({**needed, **yaml.safe_load(code)}))
            assert load_config(tmp_path / "c.yaml").workdir, page
    assert all(json.loads(code) for codes in blocks("json").values() for code in codes)


def table(page: str, header: str) -> list[list[str]]:
    """Cells of the first table of a page whose header begins so."""
    text = text_of(ROOT / page)
    lines = re.findall(rf"^\| {re.escape(header)} \|.*?(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines() if line][2:]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_tables_list_what_is_registered() -> None:
    data = [name for row in table("docs/data.md", "`data.name` | Task") for name in code(row[0])]
    assert sorted(data) == sorted(dataset_names())
    assert [code(row[0])[0] for row in table("README.md", "stage")] == list(STAGES)
    assert [row[0] for row in table("docs/method.md", "stage")] == list(STAGES)
    assert sorted(code(row[0])[0] for row in table("docs/method.md", "rule")) == sorted(RULES)
    backbones = {code(row[0])[0]: code(row[1]) for row in table("docs/method.md", "`model_type`")}
    assert backbones == {name: list(backbone.aliases) for name, backbone in BACKBONES.items()}
    for header in ("task | hard loss", "data | task"):
        tasks = {name for row in table("docs/method.md", header) for cell in row[:2] for name in code(cell)}
        assert tasks >= set(TASKS)
    requests = {code(row[0])[0]: row[1] for row in table("docs/question_answering.md", "task | request")}
    fields = {name: list(json.loads(code(request)[0])) for name, request in requests.items()}
    assert fields == {name: list(task.shortest_request) for name, task in TASKS.items()}


# Registers the examples of CONTRIBUTING.md, one for each table, in a process of its own.
EXAMPLES = """
import re
from trbert_jax.datasets import DATASETS
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.reduction.rules import RULES
from trbert_jax.tasks import TASKS
from trbert_jax.training.stages import STAGES

examples = re.findall(r"^```python\\n(.*?)^```", open("CONTRIBUTING.md").read(), re.MULTILINE | re.DOTALL)
for registry, example in zip([RULES, STAGES, BACKBONES, DATASETS, TASKS], examples, strict=True):
    before = len(registry)
    exec(example, {"__name__": "__main__"})
    assert len(registry) == before + 1
"""


def test_examples_of_contributing_register_their_part() -> None:
    subprocess.run([sys.executable, "-c", EXAMPLES], cwd=ROOT, check=True)  # imports the package beside it


def test_hyper_parameters_are_the_defaults() -> None:
    """The table of docs/method.md agrees with the schema, cell by cell."""
    defaults = RunConfig(workdir="x", data=DataConfig(name="stdlib"), model=BackboneConfig(init="scratch"))
    stages, compared = ("finetune", "init", "policy", "joint"), 0
    for cells in table("docs/method.md", "key"):
        key = re.findall(r"`(\w+)`", cells[0])[0]
        for stage, cell in zip(stages, cells[1:], strict=True):
            default = getattr(getattr(defaults, stage), key, "–")
            written = float(cell) if cell[0].isdigit() else WORDS[cell]
            assert written == default, f"{stage}.{key}"
            compared += 1
    assert compared > 30


def test_published_values_are_those_of_the_configs() -> None:
    rows = table("docs/method.md", "data | N")
    assert len(rows) == 11
    for _, length, examples, rate, epochs, warmup, guide, *alphas, name, _ in rows:
        config = load_config(ROOT / f"configs/{code(name)[0]}.yaml")
        finetune, policy, joint = config.finetune, config.policy, config.joint
        assert config.model.max_length == int(length)
        assert (policy.guide_rate, policy.alpha, joint.alpha) == tuple(map(float, (guide, *alphas)))
        for stage, place in ((finetune, 0), (policy, -1), (joint, -1)):
            assert stage.batch_size * stage.accumulation_steps == int(examples)
            assert stage.learning_rate == float(rate)
            assert stage.epochs == int(epochs.split(", ")[place])
            warm = str(stage.warmup_steps or f"{stage.warmup_fraction:g}")
            assert warm == warmup.replace(",000 updates", "000").split(", ")[place]


def test_reference_names_everything() -> None:
    """`make docs` fails on what Sphinx cannot resolve; here, that each command and setting is explained."""
    page = reference.commands_page()
    assert re.findall(r"^## trbert (.+)$", page, re.MULTILINE) == list(COMMANDS)
    for _, options in COMMANDS.values():
        shown = [name for name, settings in options if settings["help"] is not argparse.SUPPRESS]
        assert [
            name for name in shown if not re.search(rf"^\| `{name}[ `].* \| \S", page, re.MULTILINE)
        ] == []
    rows = re.findall(r"^\| `([\w.]+)` \|(.+)\|(.+)\|(.+)\|$", reference.settings_page(), re.MULTILINE)
    settings = {name: meaning.strip() for name, *_, meaning in rows}
    assert len(settings) == len(rows) > 120
    assert [name for name, meaning in settings.items() if not meaning] == []
    assert settings["joint.batch_size"] == settings["finetune.batch_size"] != ""
    found = [pydoc.locate(f"trbert_jax.{name}") for names in reference.PYTHON.values() for name in names]
    assert all(found)


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs examples/first_steps.ipynb as a user does, with a tiny model in the place of the quickstart's."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    tiny_models.tiny_model(tmp_path / "runs/quickstart/model")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/first_steps.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == []  # of nobody's machine
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("text/html" in output.get("data", {}) for output in outputs)  # of `model.show`
    assert float(re.findall(r"[\d.e-]+", outputs[-1]["data"]["text/plain"])[-1]) < 1e-5
