"""Reading parts of safetensors files: the right bytes, all counted; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from coterie.offload.checkpoint import DTYPES, Checkpoint, read_header
from coterie.routing.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"a": torch.arange(24.0).reshape(4, 3, 2), "b": torch.ones(5, dtype=torch.bfloat16)},
        tmp_path / "one.safetensors",
    )
    save_file({"c": torch.arange(6, dtype=torch.int16), "empty": torch.empty(0, 3)}, tmp_path / "two.safetensors")
    where = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "empty": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tmp_path


def test_tensors_of_all_shards_are_read_and_counted(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.slice("a")[...], torch.arange(24.0).reshape(4, 3, 2))
    assert torch.equal(checkpoint.slice("b")[...], torch.ones(5, dtype=torch.bfloat16))
    assert checkpoint.slice("empty")[...].shape == (0, 3)
    assert checkpoint.counter.bytes == 96 + 10


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 3), max_size=6))
def test_only_the_rows_asked_for_are_read(tmp_path_factory, rows: list[int]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    tensor = torch.randn(4, 3, 2)
    save_file({"a": tensor}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    piece = checkpoint.slice("a", rows)
    assert piece.shape == (len(rows), 3, 2) and checkpoint.counter.bytes == 0
    assert torch.equal(piece[...], tensor[rows])
    assert checkpoint.counter.bytes == 24 * len(rows)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES.values()), key=str))
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    back = Checkpoint.open(tmp_path).slice("a").read()
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"two\.safetensors: no such file, expected it listed in model\.safetensors\.index\.json"
    ):
        Checkpoint.open(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        Checkpoint.open(tmp_path)


def test_a_truncated_shard_is_named_with_the_tensor_it_lacks(folder: Path) -> None:
    shard = folder / "one.safetensors"
    data = shard.read_bytes()
    for length in range(0, len(data), 7):
        shard.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"one\.safetensors: .*(truncated|not JSON)"):
            Checkpoint.open(folder)


def test_a_shard_that_shrinks_after_opening_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    shard = folder / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"one\.safetensors: was changed since its header was read; start again"):
        for name in checkpoint.tensors:
            checkpoint.slice(name).read()
    checkpoint.versions.clear()
    with pytest.raises(InputError, match="is it truncated"):
        checkpoint.slice("a").read()
        checkpoint.slice("b").read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "three.safetensors"}}', r"three\.safetensors: no such file"),
        ('{"weight_map": {"z": "one.safetensors"}}', r"lacks tensor 'z'"),
        ('{"weight_map": 3}', r"weight_map: found 3"),
        ('{"weight_map": {"a": "../one.safetensors"}}', r"weight_map: found"),
        ("{", r"is not valid JSON"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)


def with_header(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "header: found list"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "tensor 'a': dtype: found F99, expected one of F64"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            r"shape \[2\] does not fit data_offsets \[0, 4\]",
        ),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, "does not fit"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "tensor 'a': found"),
        ({"a": None}, "tensor 'a': found None"),
        (b"{not json", "header is not JSON"),
        (b"\xff", "header is not JSON"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(with_header(tmp_path / "x.safetensors", header))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=120))
def test_whatever_the_bytes_the_answer_is_an_error_of_ours(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_header(path)
    try:
        assert read_header(with_header(path, b"{" + data)) == {}, "only an empty object could be right"
    except InputError as error:
        assert str(path) in str(error)
