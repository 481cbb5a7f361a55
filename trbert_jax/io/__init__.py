"""Read and write files, lock folders, and place the compilation cache. Outputs are opened by `outputs.py`."""

import contextlib
import hashlib
import json
import os
import platform
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trbert_jax.errors import UserError
from trbert_jax.io.outputs import atomic_directory as atomic_directory
from trbert_jax.io.outputs import atomic_file as atomic_file
from trbert_jax.io.outputs import check_outputs as check_outputs
from trbert_jax.io.outputs import explain_writing
from trbert_jax.io.outputs import make_directory as make_directory


def find_path(path: str | Path) -> Path:
    """Returns a path with `~` expanded and each name in the Unicode form in which the file system has it.

    A Mac may have stored a name decomposed (`e` and an accent) that a text has composed, or the reverse. A
    path that does not exist is returned as it is. Raises `UserError` for the `~` of an unknown user.
    """
    try:
        wanted = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such user; for a folder of that name write ./{path}") from error
    if str(wanted).isascii() or os.path.lexists(wanted):
        return wanted
    found = Path(wanted.anchor)
    for name in wanted.relative_to(wanted.anchor).parts:
        forms = (found / form for form in (name, *(unicodedata.normalize(x, name) for x in ("NFC", "NFD"))))
        found = next(filter(os.path.lexists, forms), found / name)
    return found


@contextlib.contextmanager
def only_process(directory: str | Path) -> Iterator[None]:
    """Locks a directory until the block ends. Raises `UserError` if another process has locked it."""
    import filelock

    path = Path(directory) / ".lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        with explain_writing(path):
            lock.acquire()
            path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
    except filelock.Timeout as error:
        holder = read_text(path).strip() or "unknown"
        advice = "wait for its end or stop it, or choose another directory"
        raise UserError(f"{directory}: another process works in it ({holder}); {advice}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.write_text("", encoding="utf-8")
        lock.release()


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file. Raises `UserError` if it is missing, unreadable or malformed."""
    try:
        return parse_json(read_text(path).removeprefix("\ufeff"))  # a byte order mark
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """Parses JSON. Raises `ValueError` with a message for users if it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, endless brackets
        raise ValueError(f"not valid JSON ({str(error).replace(': line 1 column', ' at column')})") from error


def check_unicode(text: str) -> None:
    """Raises `ValueError` if a text has half of a surrogate pair, which JSON allows and Unicode does not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode (half a surrogate at character {error.start})") from error


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file. Raises `UserError` if it is missing or unreadable."""
    try:
        with readable(path):
            return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8 first") from error


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turns errors of opening a file for reading into `UserError`s that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory, a file was expected") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error


class YamlKey(str):
    """A key that knows where it was written: `origin` is `FILE:LINE`, or `command line`.

    `comment` is what follows a plain value on its line, from the `#` on.
    """

    origin, comment = "command line", ""


class _YamlLoader(yaml.SafeLoader):
    """Reads plain text as null, bool, int or float like YAML 1.2's core schema, and keys as `YamlKey`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - overrides the class variable of PyYAML
    source: str | None = None
    text = ""  # that is parsed

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            problem = "tags, anchors and aliases are not supported, remove them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        result: dict[YamlKey, Any] = {}
        for name, value in node.value:
            key = YamlKey(name.value if isinstance(name.value, str) else "")
            if self.source:
                key.origin = f"{self.source}:{name.start_mark.line + 1}"
            if not key:
                raise UserError(f"{key.origin}: a key must be text")
            for first in (k for k in result if k == key):
                raise UserError(f"{key.origin}: {key}: given twice (first in {first.origin}); keep one")
            if isinstance(value, yaml.ScalarNode) and value.style is None:
                key.comment = self.rest_of_line(value)
            result[key] = self.construct_object(value, deep=True)
        return result

    def rest_of_line(self, node: yaml.Node) -> str:
        """Returns the comment behind a node, from the `#` on."""
        rest = (self.text[node.end_mark.index :].splitlines() or [""])[0].strip()
        return rest if rest.startswith("#") else ""


for _kind, _pattern in {
    "null": "null|Null|NULL|~|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), None)
# 010 is 10, not 8.
_YamlLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str, source: str | None = None) -> Any:
    """Parses YAML as strictly as `config` describes; its keys become `YamlKey`.

    Raises `UserError` for other text; the message names `source` (None: the command line) and the line.
    """
    try:
        loader = _YamlLoader(text)
        loader.source, loader.text = source, text
        node = loader.get_single_node()
        if source is None and isinstance(node, yaml.ScalarNode) and loader.rest_of_line(node):
            return text.strip()  # no one writes comments on a command line: ` #` is part of a path
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of too many digits
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{source}:{mark.line + 1}" if mark and source else source or YamlKey.origin
        problem = problem or getattr(error, "reason", None) or "cannot be read"
        raise UserError(f"{place}: not valid YAML ({problem})") from error


def hash_file(path: Path) -> dict[str, Any]:
    """Returns the size and hash of a file, `bytes` and `blake2b`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": stream.tell(), "blake2b": digest.hexdigest()}


CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable_compilation_cache() -> None:
    """Makes JAX, not yet imported, keep compiled programs in ~/.cache, or where the environment says."""
    if CACHE_VARIABLE in os.environ:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "trbert_jax" / "xla" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter: no home
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ[CACHE_VARIABLE] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def compilation_cache() -> str | None:
    """Returns the folder of compiled programs, None if they are not kept."""
    return os.environ.get(CACHE_VARIABLE) or None


def _processor() -> str:
    """Names the kind of processor. Machine code for one may crash another that shares the home folder."""
    features = set[str]()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    digest = hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
