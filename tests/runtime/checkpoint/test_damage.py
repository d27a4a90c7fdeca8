"""A checkpoint that was changed, or made by someone else, is refused in words."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from meshwright.errors import MeshwrightError
from meshwright.runtime.checkpoint import Pieces, load, newest, save, survey, whole
from meshwright.runtime.checkpoint import folder as disk

from .conftest import Crew

KINDS = ("__0_0.distcp", ".metadata", "extra.json", "manifest.json", "COMMITTED")


def wanted() -> dict[str, Pieces]:
    return {"a": whole(torch.zeros(8, 4)), "b": whole(torch.zeros(3))}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run", 5, {"a": whole(torch.randn(8, 4)), "b": whole(torch.ones(3))}, {"at": 5})


def refusal(path: Path) -> str:
    state = wanted()
    with pytest.raises(MeshwrightError) as caught:
        load(path, state)
    assert not any(piece.tensor.any() for pieces in state.values() for piece in pieces.pieces)
    return str(caught.value).removeprefix(f"{path}: ")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def flip_a_value(file: Path) -> None:
    """One bit of a tensor's value, where no format would notice."""
    data = file.read_bytes()
    value = torch.ones(3).numpy().tobytes()
    assert data.count(value) == 1
    file.write_bytes(data.replace(value, bytes([value[0] ^ 1]) + value[1:]))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def link(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, link])
def test_a_damaged_file_is_named(name: str, harm: Callable[[Path], None], saved: Path) -> None:
    harm(saved / name)
    assert name in refusal(saved)
    hidden = harm is flip and name not in ("manifest.json", "COMMITTED")
    assert newest(saved.parent) == (saved if hidden else None)


def test_a_flipped_bit_of_a_value_is_found(saved: Path) -> None:
    flip_a_value(saved / "__0_0.distcp")
    assert refusal(saved).startswith("__0_0.distcp has changed since it was written")


@pytest.mark.parametrize("name", KINDS)
def test_every_rank_refuses_with_the_same_message(name: str, crew: Crew, saved: Path) -> None:
    flip(saved / name)
    messages = crew(3, lambda _: refusal(saved))
    assert len(set(messages)) == 1
    assert name in messages[0]


def test_broken_checkpoints_are_passed_over_and_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved.parent
    cut = save(folder, 6, wanted(), {})
    (cut / "__0_0.distcp").write_bytes(b"")
    unfinished = save(folder, 7, wanted(), {})
    (unfinished / disk.MARKER).unlink()
    (folder / "step-00000008").write_text("a file")
    (folder / "step-00000009.removing").mkdir()
    (folder / "notes").mkdir()
    assert newest(folder) == saved
    ours = [record for record in caplog.records if record.name.startswith("meshwright.")]
    said = [record.getMessage().removeprefix(f"{folder}{os.sep}") for record in ours]
    size = json.loads((cut / "manifest.json").read_text())["files"]["__0_0.distcp"]["size"]
    assert said == [
        "step-00000008 is passed over: it is not a folder",
        "step-00000007 is passed over: COMMITTED is missing: the save did not finish",
        f"step-00000006 is passed over: __0_0.distcp has 0 bytes, {size:,} were written",
    ]
    assert [found.step for found in survey(folder) if found.problem is None] == [5]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert refusal(tmp_path / "nowhere") == "there is no such checkpoint"


def forge(path: Path, name: str, data: bytes) -> None:
    """Replace a file and make manifest and marker fit: what an attacker does, not an accident."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / disk.MANIFEST).read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge_manifest(path, manifest)


def forge_manifest(path: Path, manifest: Any) -> None:
    text = json.dumps(manifest)
    (path / disk.MANIFEST).write_text(text)
    (path / disk.MARKER).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_metadata_cannot_run_code(saved: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    forge(saved, ".metadata", pickle.dumps(Shell(f"touch {harm}")))
    assert ".metadata asks for 'posix.system', which no checkpoint needs" in refusal(saved)
    forge(saved, ".metadata", pickle.dumps(print))
    assert ".metadata asks for 'builtins.print'" in refusal(saved)
    forge(saved, ".metadata", b"\x80\x04\x8c\x05torch\x8c\x07os.path\x93.")
    assert ".metadata asks for 'torch.os.path'" in refusal(saved)
    assert not harm.exists()


def test_tensor_files_cannot_run_code(saved: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    torch.save(Shell(f"touch {harm}"), tmp_path / "evil")
    data = (tmp_path / "evil").read_bytes()
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(data)
    forge(saved, "__0_0.distcp", data)
    forge(saved, ".metadata", pickle.dumps(metadata))
    assert refusal(saved) == "__0_0.distcp holds something that is no tensor (UnpicklingError)"
    assert not harm.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", "..", "a/b", "\0", "x\n"])
def test_the_manifest_names_files_of_the_checkpoint_only(name: str, saved: Path) -> None:
    manifest = json.loads((saved / disk.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["extra.json"]
    forge_manifest(saved, manifest)
    assert refusal(saved) == f"manifest.json lists {name!r}, which is not a file of the checkpoint"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [],
        lambda m: {},
        lambda m: {**m, "files": []},
        lambda m: {**m, "files": {}},
        lambda m: {**m, "files": {**m["files"], "x": {"size": True, "sha256": "0" * 64}}},
        lambda m: {**m, "files": {**m["files"], "x": {"size": 1, "sha256": "0"}}},
        lambda m: {**m, "files": {**m["files"], "x": {"size": 1}}},
    ],
)
def test_what_is_no_manifest_is_refused(change: Callable[[Any], Any], saved: Path) -> None:
    forge_manifest(saved, change(json.loads((saved / disk.MANIFEST).read_text())))
    assert refusal(saved) == "manifest.json is not a manifest"


def test_a_later_format_is_refused(saved: Path) -> None:
    forge_manifest(saved, {**json.loads((saved / disk.MANIFEST).read_text()), "format": 2})
    assert refusal(saved) == "manifest.json has format 2, 1 is read"


def change_places(**changes: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                setattr(info, name, value)

    return change


def forget_places(metadata: Metadata) -> None:
    metadata.storage_data.clear()


def cut_a_part(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size([7, 4])


def repeat_a_part(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].chunks *= 2


def overlap_parts(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata["a"]
    tensor.chunks = [
        ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in (([0, 0], [5, 4]), ([3, 0], [3, 4]))
    ]
    place = metadata.storage_data[MetadataIndex("a", [0, 0])]
    metadata.storage_data[MetadataIndex("a", [3, 0])] = place


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["a"].properties.dtype = "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_places(relative_path="../secret/s.distcp"),
            ".metadata reads a from '../secret/s.distcp', which is not a file of the checkpoint",
        ),
        (change_places(length=10**9), ".metadata reads a from beyond the end of __0_0.distcp"),
        (change_places(offset=-1), ".metadata reads a from beyond the end of __0_0.distcp"),
        (change_places(transform_descriptors=["zstd"]), ".metadata reads a through a filter"),
        (forget_places, ".metadata says of no file that it holds a part of a"),
        (cut_a_part, "a: 4 of its 32 elements are in no part"),
        (repeat_a_part, "a: the checkpoint holds one part twice"),
        (overlap_parts, "a: parts [0:5, 0:4] and [3:6, 0:4] overlap"),
        (other_dtype, ".metadata does not describe a checkpoint (TypeError)"),
        (
            change_places(relative_path="extra.json", offset=0, length=4),
            "extra.json holds something that is no tensor",
        ),
    ],
)
def test_metadata_that_lies_is_refused(
    change: Callable[[Metadata], None], message: str, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "secret").mkdir()
    shutil.copy(saved / "__0_0.distcp", tmp_path / "run" / "secret" / "s.distcp")
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    change(metadata)
    forge(saved, ".metadata", pickle.dumps(metadata))
    assert message in refusal(saved)


def test_a_file_that_holds_another_tensor_is_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    places = metadata.storage_data
    first, second = MetadataIndex("a", [0, 0]), MetadataIndex("b", [0])
    places[first], places[second] = places[second], dataclasses.replace(places[first])
    forge(saved, ".metadata", pickle.dumps(metadata))
    assert refusal(saved).startswith("__0_0.distcp holds (")


def test_a_file_that_holds_another_dtype_is_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["b"].properties.dtype = torch.int32
    forge(saved, ".metadata", pickle.dumps(metadata))
    state = {**wanted(), "b": whole(torch.zeros(3, dtype=torch.int32))}
    with pytest.raises(MeshwrightError, match=r"__0_0.distcp holds \(3,\) torch.float32 as a part of b"):
        load(saved, state)


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", pickle.dumps([1]), pickle.dumps({}), b"\x80\x05K\x01."])
def test_what_is_no_metadata_is_refused(data: bytes, saved: Path) -> None:
    forge(saved, ".metadata", data)
    assert ".metadata does not describe a checkpoint" in refusal(saved)


def test_extra_that_is_no_json_is_refused(saved: Path) -> None:
    forge(saved, "extra.json", b"{")
    assert refusal(saved) == "extra.json is not JSON"
    forge(saved, "extra.json", b"[" * 100_000)
    assert refusal(saved) == "extra.json is not JSON"
