"""DCP's `.metadata`, a pickle, read without letting it do anything but describe tensors."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from meshwright.errors import MeshwrightError, shown
from meshwright.runtime.checkpoint.folder import METADATA, FileRecord

StorageInfo = filesystem._StorageInfo
"""Where a rectangle lies: file, offset, length. DCP keeps the name to itself, but not the format."""

_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.TensorStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.TensorProperties,
        dcp._MEM_FORMAT_ENCODING,
        torch.serialization._get_layout,
        StorageInfo,
    )
}
_CLASSES["torch", "Size"] = torch.Size


class _Unpickler(pickle.Unpickler):
    """Builds the classes of DCP's metadata and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise MeshwrightError(f"{METADATA} asks for {shown(f'{module}.{name}')}, which no checkpoint needs")


def parse_metadata(data: bytes, files: Mapping[str, FileRecord]) -> Metadata:
    """DCP's description of a checkpoint with these files. Raises MeshwrightError for anything else."""
    try:
        metadata: Metadata = _Unpickler(io.BytesIO(data)).load()
        _check_tensors(metadata)
        _check_places(metadata, files)
    except MeshwrightError:
        raise
    except Exception as error:  # a pickle made by hand can fail in any way
        raise MeshwrightError(f"{METADATA} does not describe a checkpoint ({type(error).__name__})") from None
    return metadata


def saved_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and rectangles of each tensor by name; parsed metadata holds nothing but tensors."""
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


def _check_tensors(metadata: Any) -> None:
    _need(metadata, Metadata)
    _need(metadata.state_dict_metadata, dict)
    for name, saved in metadata.state_dict_metadata.items():
        _need(name, str)
        _need(saved, dcp.TensorStorageMetadata)
        _need(saved.size, torch.Size)
        _need(saved.properties.dtype, torch.dtype)
        for chunk in saved.chunks:
            _need(chunk, dcp.ChunkStorageMetadata)
            _need(chunk.offsets, torch.Size)
            _need(chunk.sizes, torch.Size)


def _check_places(metadata: Metadata, files: Mapping[str, FileRecord]) -> None:
    """Every rectangle lies in a file of the checkpoint, and nowhere else."""
    for index, info in metadata.storage_data.items():
        _need(index, MetadataIndex)
        _need(info, StorageInfo)
        if info.relative_path not in files:
            raise MeshwrightError(
                f"{METADATA} reads {index.fqn} from {shown(info.relative_path)}, "
                "which is not a file of the checkpoint"
            )
        if not 0 <= info.offset <= info.offset + info.length <= files[info.relative_path].size:
            raise MeshwrightError(f"{METADATA} reads {index.fqn} from beyond the end of {info.relative_path}")
        if info.transform_descriptors:
            raise MeshwrightError(f"{METADATA} reads {index.fqn} through a filter, which is not done here")
    for name, saved in saved_tensors(metadata).items():
        for chunk in saved.chunks:
            if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                raise MeshwrightError(f"{METADATA} says of no file that it holds a part of {name}")


def _need(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} is no {kind.__name__}")
