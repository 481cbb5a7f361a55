"""Builds the documentation as a site with Sphinx: `make docs`. The source folder is that of the repository.

docs/index.md lists the pages: its headings and links become the navigation. The reference pages are written
by reference.py beside this file before each build.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from reference import commands_page, python_page, settings_page

import trbert_jax

project, author, copyright = "trbert_jax", "the authors of trbert_jax", "the authors of trbert_jax"
version = release = trbert_jax.__version__
html_title = f"trbert_jax {release}"

root_doc = "docs/index"
include_patterns = ["docs/**.md", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"

PAGES = {"commands": commands_page, "settings": settings_page, "python": python_page}

myst_heading_anchors = 6  # named as GitHub names them
default_role = "code"  # docstrings quote names with single backticks
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
suppress_warnings = ["myst.header"]  # a page of the repository may start below the first level


def write_reference(app: Sphinx) -> None:
    """Writes docs/reference/*.md."""
    (DOCS / "reference").mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (DOCS / f"reference/{name}.md").write_text(page(), encoding="utf-8")


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Appends a table of contents for each heading of docs/index.md, with the links below it."""
    if name != root_doc:
        return
    sections = re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]
    trees = {text.partition("\n")[0]: re.findall(r"\[(.+)\]\(([\w./]+)\.md\)", text) for text in sections}
    trees["Reference"] = [(name.title(), f"reference/{name}") for name in PAGES] + trees["Reference"]
    for caption, links in trees.items():
        pages = [f"{title} <{page}>" for title, page in links]
        source[0] += "\n".join(
            ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
        )


def add_start(app: Sphinx, error: Exception | None) -> None:
    """Sends readers of the site's root to its first page."""
    if error is None and app.builder.format == "html":
        forward = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (Path(app.outdir) / "index.html").write_text(f"<!doctype html><title>{project}</title>{forward}\n")


def setup(app: Sphinx) -> None:
    """Connects the functions above; Sphinx calls it."""
    app.connect("builder-inited", write_reference)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_start)
