"""Read and write files, log to stderr, and place the compilation cache.

Outputs appear whole or not at all: they are written under a temporary name and then renamed. A process killed
in the middle leaves at most a `*.partial-*` file or folder beside the target. Errors of the operating system
that a user can fix (no permission, disk full) become `UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from trbert_jax.errors import UserError


@contextlib.contextmanager
def _explain(target: Path) -> Iterator[None]:
    """Turns errors of writing into `UserError`s that name the target."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{target}: no permission to write there; choose another output path or change its rights"
        ) from error
    except (NotADirectoryError, FileExistsError, IsADirectoryError) as error:
        raise UserError(f"{target}: cannot be written, {error.strerror} ({error.filename})") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"{target}: cannot be written, {error.strerror}") from error


def make_directory(path: str | Path) -> Path:
    """Creates a directory and its parents. Raises `UserError` if that is not allowed."""
    path = Path(path)
    with _explain(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(path: str | Path) -> None:
    """Raises `UserError` if a file cannot be written; for results that take long to compute."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory, a file was expected")
    folder = Path(path).absolute().parent
    while not os.path.exists(folder):
        folder = folder.parent
    with _explain(Path(path)):
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; renames it to `path` if the block ends without an error."""
    path = Path(path)
    make_directory(path.parent)
    encoding = None if "b" in mode else "utf-8"
    with _explain(path):
        handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.partial-", dir=path.parent)
        try:
            os.close(handle)
            with open(temporary, mode, encoding=encoding) as stream:
                yield stream
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory; it replaces `path` if the block ends without an error."""
    path = Path(path)
    make_directory(path.parent)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, a directory was expected; choose another output path")
    with _explain(path):
        temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-old-", dir=path.parent))
                os.replace(path, old / "replaced")
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def only_process(directory: str | Path) -> Iterator[None]:
    """Locks a directory against other processes, until the block or this process ends.

    Raises:
      UserError: another process holds the lock (the message names it), or the lock file cannot be written.
    """
    import filelock

    path = Path(directory) / ".lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        with _explain(path):
            lock.acquire()
    except filelock.Timeout as error:
        holder = read_text(path).strip() or "unknown"
        raise UserError(
            f"{directory}: another process works in this directory ({holder}); wait for its end or stop it, "
            "or choose another directory"
        ) from error
    try:
        with _explain(path):
            path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
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
        return parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """Parses JSON. Raises `ValueError` with a message for users if it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"not valid JSON ({error.msg} at {place})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ValueError(f"not valid JSON ({error})") from error


def check_unicode(text: str) -> None:
    """Raises `ValueError` if a text has half of a surrogate pair, which JSON allows and Unicode does not."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"is not valid Unicode (half of a surrogate pair at character {error.start})"
        ) from error


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 text file. Raises `UserError` if it is missing or unreadable."""
    with readable(path):
        try:
            return Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 (byte {error.start}); convert the file to UTF-8 first"
            ) from error


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


class YamlKey(str):
    """A key that knows where it was written: `origin` is `FILE:LINE`, or `command line`."""

    origin = "command line"


class _YamlLoader(yaml.SafeLoader):
    """Reads plain text as null, bool, int or float like YAML 1.2's core schema, and keys as `YamlKey`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - overrides the class variable of PyYAML
    source: str | None = None

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            problem = "tags, anchors and aliases are not supported, remove them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for name, value in node.value:
            key = YamlKey(name.value) if isinstance(name.value, str) else YamlKey("")
            if self.source:
                key.origin = f"{self.source}:{name.start_mark.line + 1}"
            if not key:
                raise UserError(f"{key.origin}: a key must be text")
            if key in result:
                first = next(k for k in result if k == key)
                raise UserError(f"{key.origin}: {key}: given twice (first in {first.origin}); keep one")
            result[key] = self.construct_object(value, deep=True)
        return result


_TAG = "tag:yaml.org,2002:"
for _kind, _pattern, _first in (
    ("null", "null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _YamlLoader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
_YamlLoader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))  # 010 is 10, not 8


def parse_yaml(text: str, source: str | None = None) -> Any:
    """Parses strict YAML, whose keys become `YamlKey`.

    Strict: `3e-5` is a number, `no` and `2024-01-01` are text; a key given twice is an error, as are tags,
    anchors and aliases.

    Args:
      text: the YAML.
      source: name of the file; None for text of the command line.

    Raises:
      UserError: the text is not strict YAML. The message names the line.
    """
    try:
        loader = _YamlLoader(text)
        loader.source = source
        return loader.get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of too many digits
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"{source}:{mark.line + 1}" if mark and source else source or "command line"
        problem = problem or getattr(error, "reason", None) or "cannot be read"
        raise UserError(f"{place}: not valid YAML ({problem})") from error


def hash_file(path: Path) -> dict[str, Any]:
    """Returns the size and hash of a file, `bytes` and `blake2b`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        return {"bytes": stream.tell(), "blake2b": digest.hexdigest()}


# Logging and compilation cache --------------------------------------------------------------------


class _StderrHandler(logging.Handler):
    """Writes each message once to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if message not in self._shown:
            self._shown.add(message)
            sys.stderr.write(message + "\n")


def setup_logging() -> None:
    """Shows the package's messages, INFO and above, on stderr. A message that repeats is shown once."""
    logger = logging.getLogger(__package__)
    logger.handlers = [h for h in logger.handlers if not isinstance(h, _StderrHandler)] + [_StderrHandler()]
    logger.setLevel(logging.INFO)
    root = logging.getLogger()
    if not root.handlers:  # else absl, which orbax uses, adds one that shows our messages again
        others = logging.StreamHandler()
        others.addFilter(lambda record: not record.name.startswith(logger.name))
        root.addHandler(others)


CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable_compilation_cache() -> None:
    """Makes JAX keep compiled programs in `~/.cache/trbert_jax/xla`, unless the environment names a folder.

    Call it before JAX is imported. Without a writable folder, JAX keeps nothing.
    """
    if CACHE_VARIABLE in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = cache.expanduser() / "trbert_jax" / "xla" / _processor()
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
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(features).encode()).hexdigest()[:12]}"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
