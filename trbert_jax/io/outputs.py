"""Write outputs: files and folders that appear whole or not at all, and never in place of an input.

An output is written under a temporary name and then renamed. A process killed in the middle by SIGKILL leaves
at most a `*.partial-*` file or folder beside it. Links are followed, modes and owners kept; a pipe or device
is written to. Errors of the operating system (no permission, disk full) become `UserError`.
"""

import codecs
import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from trbert_jax.errors import UserError


@contextlib.contextmanager
def explain_writing(target: str | Path) -> Iterator[None]:
    """Turns errors of writing into `UserError`s that name the target."""
    try:
        yield
    except BrokenPipeError:  # the reader has left: for an output as for standard output
        raise
    except PermissionError as error:
        raise UserError(f"{target}: no permission to write there; choose another path") from error
    except OSError as error:
        if error.errno is None:
            raise
        blocking = isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError)
        place = f" ({error.filename})" if blocking else ""
        raise UserError(f"{target}: cannot be written, {error.strerror}{place}") from error


def make_directory(path: str | Path) -> Path:
    """Creates a directory and its parents, through links too. Raises `UserError` if that is not allowed."""
    with explain_writing(path):
        os.makedirs(os.path.realpath(path), exist_ok=True)
    return Path(path)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


# Writes what an encoding lacks, or a byte of a file name that is not UTF-8 (half a surrogate), as JSON does,
# so that JSON keeps its value.
ESCAPE = "trbert_escape"
codecs.register_error(ESCAPE, _escape)

# Outputs ------------------------------------------------------------------------------------------

_MODEL_FILE = re.compile(
    r"((\w+_)?config|vocab|\w+_map|added_tokens|tokenizer|.*\.index)\.json|(vocab|merges)\.txt"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|model)"
)


def check_outputs(
    outputs: Iterable[str | Path | None] = (),
    inputs: Iterable[str | Path | None] = (),
    models: Iterable[str | Path | None] = (),
    folders: Iterable[str | Path | None] = (),
) -> None:
    """Raises `UserError` if an output cannot be written or would destroy an input, before long work.

    Args:
      outputs: files to be written; None is left out, here and below. Each must differ from the others, from
        standard output, and from all inputs, standard input included.
      inputs: files, and folders of data: an output may be a new file in a folder, not one that it holds.
      models: folders of models, in which no output may have the name of a model's file.
      folders: folders to be replaced, which may hold no input.
    """
    data, trained = ([Path(os.path.expanduser(x)) for x in given if x] for given in (inputs, models))
    sources = [*data, *trained]
    trained += [folder / "model" for folder in trained]  # of a work directory
    read: dict[Any, str] = {_identity(path): str(path) for path in sources}
    read.pop(None, None)
    elsewhere = "choose another path for the output"
    if looped := read.get(_identity(1)):
        raise UserError(f"{looped}: is read while standard output is written to it; {elsewhere}")
    read[_identity(0)], written = "standard input", {_identity(1): "standard output"}
    for path in (Path(x) for x in outputs if x):
        _check_output(path)
        identity, real = _identity(path), Path(os.path.realpath(path))
        if identity is not None and identity in read:
            raise UserError(f"{path}: is read by this command ({read[identity]}); {elsewhere}")
        for folder in trained:
            files = [x for x in folder.iterdir() if _MODEL_FILE.fullmatch(x.name)] if folder.is_dir() else []
            inside = real.parent == Path(os.path.realpath(folder)) and _MODEL_FILE.fullmatch(real.name)
            if inside or identity in map(_identity, files):
                raise UserError(f"{path}: is a file of the model {folder}; {elsewhere}")
        for folder in data:
            if folder.is_dir() and path.is_file() and real.is_relative_to(os.path.realpath(folder)):
                raise UserError(f"{path}: is a file of {folder}, which this command reads; {elsewhere}")
        if identity is not None and _descriptor(path) is None:
            if identity in written:
                other = written[identity]
                raise UserError(f"{path}: is named for two outputs ({other}); give each a file of its own")
            written[identity] = str(path)
    for target in (Path(x) for x in folders if x):
        for source in sources:
            if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
                raise UserError(f"{target}: would replace {source}, which this command reads; {elsewhere}")


def _identity(path: str | Path | int) -> Any:
    """Returns equal values for names of one file, pipe or folder; None for a device, which many may share."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None if isinstance(path, int) else os.path.realpath(path)
    if isinstance(path, int) and not stat.S_ISREG(found.st_mode):
        return None
    shared = not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISFIFO(found.st_mode))
    return None if shared else (found.st_dev, found.st_ino)


def _check_output(path: Path) -> None:
    """Raises `UserError` unless a file can be written."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory, a file was expected")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UserError(f"{path}: cannot be written, the link leads back to itself")
    if target.is_block_device():
        raise UserError(f"{path}: is a disk, a file was expected")
    if os.path.exists(target) or _descriptor(path) is not None:
        if not os.access(path, os.W_OK):
            raise UserError(f"{path}: no permission to write there; choose another path")
        return
    folder = next(parent for parent in target.parents if os.path.exists(parent))
    if not os.path.isdir(folder):
        raise UserError(f"{path}: cannot be written, {folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: no permission to write there; choose another path")


def is_stream(path: str | Path) -> bool:
    """Returns whether an output is a pipe, a device or an open file (`/dev/stdout`, `/dev/fd/63`)."""
    return _descriptor(Path(path)) is not None or (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    )


def _descriptor(path: Path) -> int | None:
    """Returns the number of the open file that a path of Linux stands for, None for other paths."""
    for _ in range(40):  # links, at most
        folder = os.path.realpath(path.parent)
        if path.name.isdecimal() and re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder):
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens an output: a temporary file, which replaces `path` if the block ends without an error.

    Follows links, keeps the mode and owner of a file that it replaces, and writes straight into a pipe, a
    device or an open file.
    """
    if os.path.basename(path) in ("", ".", ".."):
        raise UserError(f"{str(path)!r}: names a directory, a file was expected")
    path = Path(path)
    options: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "errors": ESCAPE}
    with explain_writing(path):
        _check_output(path)
        if is_stream(path):
            number = _descriptor(path)
            file = os.open(path, os.O_WRONLY) if number is None else os.dup(number)
            with open(file, mode, **options) as stream:
                yield stream
            return
        target = Path(os.path.realpath(path))
        temporary = _temporary(target)
        try:
            with open(temporary, mode, **options) as stream:
                _keep_rights(target, temporary)
                yield stream
            _replace_file(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _temporary(path: Path) -> Path:
    """Returns a name beside `path`; in the folder of temporary files if only `path` itself may be written."""
    folder = make_directory(path.parent)
    if path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        folder = Path(tempfile.gettempdir())
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # a name has at most 255 bytes
    return folder / f"{stem}.partial-{uuid.uuid4().hex[:8]}"


def _keep_rights(old: Path, new: Path) -> None:
    """Gives a file or folder the owner and mode of the one that it will replace, if there is one."""
    with contextlib.suppress(OSError):
        found = old.stat()
        with contextlib.suppress(OSError, AttributeError):  # the latter: Windows
            os.chown(new, found.st_uid, found.st_gid)
        os.chmod(new, stat.S_IMODE(found.st_mode))


_NOT_REPLACED = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM}  # a mount point, a folder of others


def _replace_file(temporary: Path, target: Path) -> None:
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in _NOT_REPLACED or not target.is_file():
            raise
        shutil.copyfile(temporary, target)
        temporary.unlink()


def contents(directory: Path) -> list[Path]:
    """Returns the files and folders of a directory, sorted, without that of each file system's root."""
    return sorted(path for path in directory.iterdir() if path.name != "lost+found")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory; it replaces `path` if the block ends without an error.

    Follows links, and keeps the mode and owner of what it replaces. A directory that cannot be replaced, such
    as a mount point, gets the new contents file by file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"{path}: is a file, a directory was expected; choose another output path")
    with explain_writing(path):
        if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
            raise PermissionError
        fixed = os.path.ismount(target) or (target.is_dir() and not os.access(target.parent, os.W_OK))
        temporary = _temporary(target / target.name if fixed else target)
        old = _temporary(target)
        try:
            temporary.mkdir()
            _keep_rights(target, temporary)
            yield temporary
            for new in temporary.rglob("*"):
                _keep_rights(target / new.relative_to(temporary), new)
            try:
                if target.exists() and not fixed:
                    os.replace(target, old)
            except OSError as error:
                if error.errno not in _NOT_REPLACED:
                    raise
                fixed = True
            if fixed:
                _refill(target, temporary)
            else:
                os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _refill(target: Path, temporary: Path) -> None:
    """Puts the contents of a directory in the place of those of another."""
    if temporary.parent != target:
        inside = _temporary(target / target.name)
        try:
            shutil.copytree(temporary, inside)
            _refill(target, inside)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
        shutil.rmtree(temporary)
        return
    new = contents(temporary)
    for path in contents(target):
        if path.is_dir() and not path.is_symlink():
            if path != temporary:
                shutil.rmtree(path)
        elif path.name not in {other.name for other in new}:
            path.unlink()
    for path in new:
        os.replace(path, target / path.name)
    temporary.rmdir()
