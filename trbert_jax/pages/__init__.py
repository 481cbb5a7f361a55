"""Render pages of HTML that contain all they need: they open from a file, without a server or a network."""

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from trbert_jax.io.outputs import atomic_file


class Page:
    """A page; a notebook shows it below the cell.

    Attributes:
      html: the document.
      data: the JSON value that it was drawn from.
    """

    def __init__(self, template: str, data: Any, **values: Any) -> None:
        """Fills in a template of this folder; it escapes `values`, and reads `data` as JSON."""
        self.data = data
        self.html = _render(template, data, values)

    def save(self, path: str | Path) -> None:
        """Writes the document, atomically. Raises UserError if that fails."""
        with atomic_file(path) as stream:
            stream.write(self.html)

    def _repr_html_(self) -> str:
        # A frame of its own: neither side's styles and names reach the other.
        frame = 'style="width:100%;height:680px;border:1px solid #999" title="trbert"'
        return f'<iframe {frame} srcdoc="{html.escape(self.html)}"></iframe>'


def _render(template: str, data: Any, values: dict[str, Any]) -> str:
    import jinja2

    folder = resources.files(__name__)

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # No text can end the element that holds it.
    dumped = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    dumped = dumped.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return environment.get_template(template).render(read=read, data=dumped, **values)
