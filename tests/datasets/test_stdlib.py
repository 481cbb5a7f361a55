import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from trbert_jax.datasets import DATASETS, python_source
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError

STDLIB = DATASETS["stdlib"]
SIXTEENTHS = {"train": 8, "dev": 3, "test": 5}


def everything(folder: Path | None = None) -> list[Example]:
    return [example for split in SIXTEENTHS for example in STDLIB.read_split(folder, split)]


def test_classes_are_balanced() -> None:
    names = STDLIB.read_labels(None)
    assert len(names) == len(set(names)) == python_source.NUM_CLASSES
    for split, share in SIXTEENTHS.items():
        counts = Counter(e.label for e in STDLIB.read_split(None, split))
        assert counts == dict.fromkeys(range(len(names)), share * python_source.CHUNKS_PER_CLASS // 16)


def test_no_chunk_overlaps_or_repeats_another() -> None:
    root, names, examples = Path(sysconfig.get_path("stdlib")), STDLIB.read_labels(None), everything()
    assert len({e.text for e in examples}) == len(examples)
    taken = set[tuple[str, int]]()
    for example in examples:
        file, _, line = example.id.rpartition(":")
        lines = range(int(line) - 1, int(line) + example.text.count("\n"))
        source = (root / file).read_bytes().decode().split("\n")
        assert example.text.split("\n") == [source[i] for i in lines]
        assert Path(file).parts[0].removesuffix(".py") == names[example.label]
        assert taken.isdisjoint((file, i) for i in lines)
        taken.update((file, i) for i in lines)


def write_library(root: Path, names: list[str], lines: int = 4000) -> None:
    for name in names:
        path = root / name if name.endswith(".py") else root / name / "part.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name.replace('/', '')} = {i} + x ({i})\n" for i in range(lines)))


def test_which_files_count(tmp_path: Path) -> None:
    modules = [f"m{i}.py" for i in range(6)] + [f"p{i}/inner" for i in range(6)]
    skipped = ["_private.py", "test/a", "idlelib", "site-packages/b", "m-config-3.11", "p0/tests/c"]
    write_library(tmp_path, modules + skipped)
    write_library(tmp_path, ["small.py"], lines=100)
    (tmp_path / "p1" / "latin.py").write_bytes("# café\n".encode("latin-1") * 5000)
    (tmp_path / "p1" / "notes.txt").write_text("not source " * 5000)
    names = tuple(sorted(name.split(".")[0].split("/")[0] for name in modules))
    assert STDLIB.read_labels(tmp_path) == names
    files = {e.id.rpartition(":")[0] for e in everything(tmp_path)}
    assert files == {m if m.endswith(".py") else f"{m}/part.py" for m in modules}


def test_same_text_at_every_reading(tmp_path: Path) -> None:
    write_library(tmp_path, [f"m{i:02d}.py" for i in range(20)])
    first = STDLIB.read_split(tmp_path, "train")
    python_source._read_all.cache_clear()
    assert STDLIB.read_split(tmp_path, "train") == first


def test_too_little_text(tmp_path: Path) -> None:
    write_library(tmp_path, [f"m{i}.py" for i in range(11)])
    with pytest.raises(UserError, match=f"{tmp_path}: 11 .*data.path"):
        everything(tmp_path)
    with pytest.raises(UserError, match="nowhere: 0 "):
        everything(tmp_path / "nowhere")
