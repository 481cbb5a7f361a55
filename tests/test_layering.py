"""The package's floors: who may import whom, what an import may cost, and how large it may become."""

from __future__ import annotations

import ast
import configparser
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import trbert_jax

PACKAGE = Path(trbert_jax.__file__).parent
ROOT = PACKAGE.parent

# The parts of the package (a module or a folder) from below. A part may import those of lower floors, and
# those to the left of it on its own floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "io"),
    ("parallel", "reduction", "datasets", "pages"),
    ("model", "modeling"),  # the second: former names
    ("config",),
    ("tasks",),
    ("inference",),
    ("serving", "training"),
    ("cli", "__main__"),
)
ORDER = [part for floor in FLOORS for part in floor]
# Parts that may import less or more than their floor says.
BELOW = {"errors", "io"}
EXCEPTIONS = {"parallel": BELOW, "reduction": BELOW, "datasets": BELOW, "pages": BELOW, "__main__": {"cli"}}
WITHOUT_JAX = {*BELOW, "datasets", "pages", "config", "cli"}
WITHOUT_JAX_MODULES = {
    "trbert_jax.reduction.rules",
    "trbert_jax.model.backbones",
    "trbert_jax.model.engines",
}
ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
# Slow to import, or optional: imported where they are used, never with the module.
LAZY = {
    "tensorflow_datasets",
    "grain",
    "array_record",
    "torch",
    "matplotlib",
    "transformers",
    "pyarrow",
    "datasets",
    "onnx",
    "spox",
    "onnxruntime",
    "openvino",
    "jinja2",
    "fastapi",
    "prometheus_client",
    "starlette",
    "uvicorn",
}
EXTRAS = ("torch", "datasets", "onnxruntime", "openvino", "serve")
# A module of which every line needs such a library: imported where it is used.
ON_DEMAND = {
    "trbert_jax.model.onnx_graph",
    "trbert_jax.serving.server",
    "trbert_jax.serving.service",
}


def part_of(module: str) -> str:
    """`trbert_jax.datasets.registry` -> `datasets`."""
    return module.split(".")[1]


PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
MODULES = list(PATHS)


def source_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Full names of what a module imports anywhere, and whether that happens as the module is loaded."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool]]:
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_load = False
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"  # a module of a package, or something in a module
                yield (name if name in MODULES else str(node.module)), at_load
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load)

    yield from walk(source_of(module), True)


def test_no_circles() -> None:
    graph = {module: {name for name, at_load in imports(module) if at_load} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    part = part_of(module)
    assert part in ORDER, f"{part} is new: put it on a floor"
    allowed = EXCEPTIONS.get(part, set(ORDER[: ORDER.index(part)]))
    used = {part_of(name) for name, _ in imports(module) if name.startswith("trbert_jax.")} - {part}
    assert used <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_outside_imports(module: str) -> None:
    loaded = {name for name, at_load in imports(module) if at_load}
    lazy = {name for name in loaded if name in ON_DEMAND or name.split(".")[0] in LAZY}
    assert module in ON_DEMAND or not lazy, "import it inside the function that needs it"
    if part_of(module) in WITHOUT_JAX:
        anywhere = {name.split(".")[0] for name, _ in imports(module)}
        assert not anywhere & ARRAY_LIBRARIES


def test_parts_without_jax_do_not_load_it_by_a_detour() -> None:
    names = [module for module in MODULES if part_of(module) in WITHOUT_JAX or module in WITHOUT_JAX_MODULES]
    slow = ARRAY_LIBRARIES | LAZY
    for imported, heavy in ((", ".join(names), slow), ("trbert_jax", slow | {"tokenizers", "numpy"})):
        code = f"import sys, {imported}; print(*(sys.modules.keys() & {heavy!r}))"
        assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "\n"


def lines(folder: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


def test_sizes() -> None:
    """The house stays small: before a part is added, something may go."""
    entries = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len(entries) <= 16
    assert len(FLOORS) <= 8
    assert len(list(PACKAGE.rglob("*.py"))) <= 126
    assert lines(PACKAGE) <= 24_523
    assert lines(ROOT / "tests") <= 17_164


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_are_plain_english(module: str) -> None:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(n) or "" for n in ast.walk(source_of(module)) if isinstance(n, nodes)]
    bad = re.compile(r"\AWhat |\bso many\b|\bas it should be\b|\bis told\b")
    assert [doc for doc in docs if bad.search(doc)] == []


def test_dependencies_are_those_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")

    def names(requirements: str) -> set[str]:
        lines = (line for line in requirements.splitlines() if line.strip() and not line.startswith("#"))
        return {re.split(r"[\[<>=!~; ]", line.strip())[0].lower() for line in lines}

    required = names(setup["options"]["install_requires"])
    extras = {name: names(setup["options.extras_require"][name]) for name in EXTRAS}
    optional = {name.replace("-", "_") for name in set[str]().union(*extras.values())}
    distributions = metadata.packages_distributions()
    imported = {name.split(".")[0] for module in MODULES for name, _ in imports(module)}
    outside = imported - sys.stdlib_module_names - {"trbert_jax", *optional}
    used = {name.lower().replace("_", "-") for module in outside for name in distributions[module]}
    assert outside <= distributions.keys()
    # Dependencies of jax, flax and the like, so not worth a line of their own.
    assert used - required <= {"ml-dtypes", "jaxlib", "etils", "pydantic-core"}
    # tensorflow-datasets imports importlib_resources to prepare a data set, and does not declare it.
    assert required - used == {"importlib-resources"}, "declared, but nothing imports it"
    assert all(name in needed for name, needed in extras.items() if name != "serve")
    assert optional <= imported
