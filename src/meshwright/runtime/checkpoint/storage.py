"""DCP's files, written with their hashes and read one rectangle at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from meshwright.errors import MeshwrightError
from meshwright.runtime.checkpoint.folder import FileRecord, hashed_file
from meshwright.runtime.checkpoint.metadata import StorageInfo
from meshwright.runtime.checkpoint.rectangles import spelled


class HashedFiles(FileSystem):
    """A file system that hashes and syncs what is written and keeps the records."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A file to be written; nothing is read through this file system."""
        if mode != "wb":
            raise ValueError(f"a checkpoint's files are only written here, not opened as {mode!r}")
        with hashed_file(Path(path)) as stream:
            yield stream
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, and its record with it."""
        os.replace(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class PiecesWriter(FileSystemWriter):
    """DCP's writer with hashes, one file per rank that has anything to write.

    DCP's own loop keeps a copy of every view until the file is closed; here one copy lives at a time.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False)  # HashedFiles syncs, buffers and all
        self.fs = files = HashedFiles()
        self.records = files.records
        """The files that this rank has written."""

    def storage_meta(self) -> StorageMeta | None:
        """None: DCP would write down where on this machine the checkpoint was made."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's rectangles, each as torch.save writes it, one after another."""
        results: list[WriteResult] = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with self.fs.create_stream(Path(self.path) / name, "wb") as file:
                stream = cast(IO[bytes], file)
                for item in plan.items:
                    offset = stream.tell()
                    torch.save(_compact(cast(Tensor, planner.resolve_data(item))), stream)
                    length = stream.tell() - offset
                    results.append(WriteResult(item.index, length, StorageInfo(name, offset, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, alone in its storage: torch.save writes storages whole."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class PiecesReader(FileSystemReader):
    """DCP's reader over metadata that is known already; a rectangle is read once, however many need it."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata that was verified; DCP's own method would unpickle whatever the file holds."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the tensors that the planner names."""
        wanted: dict[str, dict[MetadataIndex, list[ReadItem]]] = {}
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            wanted.setdefault(name, {}).setdefault(item.storage_index, []).append(item)
        for name, parts in wanted.items():
            with open(Path(self.path) / name, "rb") as file:
                for index in sorted(parts, key=lambda index: self.storage_data[index].offset):
                    saved = _tensor_in(name, self._slice_file(file, self.storage_data[index]))
                    _fill(name, saved, parts[index], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _tensor_in(name: str, view: IO[bytes]) -> Tensor:
    try:
        saved = torch.load(view, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes made by hand can fail in any way
        raise MeshwrightError(f"{name} holds something that is no tensor ({type(error).__name__})") from error
    if not isinstance(saved, Tensor):
        raise MeshwrightError(f"{name} holds something that is no tensor ({type(saved).__name__})")
    return saved


def _fill(name: str, saved: Tensor, items: list[ReadItem], planner: LoadPlanner) -> None:
    """Copy the parts of one saved rectangle to where they are wanted."""
    for item in items:
        window = zip(item.storage_offsets, item.lengths, strict=True)
        part = saved[tuple(slice(offset, offset + length) for offset, length in window)]
        target = planner.resolve_tensor(item).detach()
        if part.shape != target.shape or part.dtype != target.dtype:
            wanted = spelled((tuple(item.storage_offsets), tuple(item.lengths)))
            raise MeshwrightError(
                f"{name} holds {tuple(saved.shape)} {saved.dtype} as a part of {item.storage_index.fqn}; "
                f"{wanted} {target.dtype} of it is needed"
            )
        target.copy_(part)
        planner.commit_tensor(item, target)
