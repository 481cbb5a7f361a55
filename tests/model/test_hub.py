"""Models by their name on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import assert_same_params, quietly
from tiny_models import BERT, tiny_model, tiny_params

from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import load_pretrained
from trbert_jax.model.weights import local_directory


def test_hub_model_that_is_not_cached_offline() -> None:
    with pytest.raises(UserError, match="could not be reached") as error:
        load_pretrained("some-body/some-model")
    assert "hf download some-body/some-model --local-dir" in str(error.value)


def test_neither_a_directory_nor_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    "weights", ["model.safetensors", pytest.param("pytorch_model.bin", marks=pytest.mark.torch)]
)
def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """The PyTorch file is fetched only where there is no safetensors file."""
    if weights == "pytorch_model.bin":
        torch = pytest.importorskip("torch")
    remote, cache = tiny_model(tmp_path / "remote"), tmp_path / "cache"
    if weights == "pytorch_model.bin":
        tensors = {k: torch.from_numpy(v) for k, v in load_file(remote / "model.safetensors").items()}
        torch.save(tensors, remote / weights)
        (remote / "model.safetensors").unlink()
    else:
        (remote / "pytorch_model.bin").write_bytes(b"not wanted")
    (remote / "tf_model.h5").write_bytes(b"not wanted")
    cache.mkdir()

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some-body/some-model"
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_directory("some-body/some-model") == cache
    assert_same_params(quietly("some-body/some-model").params, tiny_params(BERT))
    assert not (cache / "tf_model.h5").exists()
    assert (cache / "pytorch_model.bin").exists() == (weights == "pytorch_model.bin")
