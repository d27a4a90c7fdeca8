"""Weights of Hugging Face models under the names of `ir/parameters.py`, and back.

Two layouts of experts are read: one tensor for each expert, as checkpoints lie on disk, and one stacked
tensor, as the model classes of transformers 5 hold them and gpt-oss stores them. Linear weights are
[out, in] and rotary positions pair the halves of a head on both sides, so nothing else is permuted.

    E: experts, F: feed-forward width, H: hidden size
    ours     layers.N.moe.experts.gate, .up [E, F, H], .down [E, H, F]
    theirs   gate_up_proj [E, 2F, H], gate rows first, down_proj [E, H, F]
    gpt-oss  gate_up_proj [E, H, 2F], gate and up in alternate columns, down_proj [E, F, H]

The correction of a router (DeepSeek-V3, arXiv:2412.19437 §2.1.2) is no parameter but belongs to the weights:
it stands under `layers.N.moe.router.correction_bias`, [E].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meshwright.errors import InputError
from meshwright.families import read_model
from meshwright.files import read_text
from meshwright.ir.parameters import parameters
from meshwright.model import Model

Experts = Literal["separate", "stacked"]
Shape = tuple[int, ...]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 100_000_000

_IN_A_LAYER = {  # our module: theirs
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "q_a", "q_b", "kv_b")},
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "moe.shared_gate": "mlp.shared_expert_gate",
}
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_MIXTRAL_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_QUANTISED = ("_scale_inv", "_scales", "_blocks", ".weight_scale", ".qweight", ".qzeros")


@dataclass(frozen=True, slots=True)
class _Spelling:
    """What families name or lay out differently."""

    router: str = "gate"
    shared: str = "shared_experts"
    mixtral: bool = False
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one of our tensors comes from: tensors of theirs, all of one shape, and what is done to them."""

    names: tuple[str, ...]
    shape: Shape
    make: Callable[[list[Tensor]], Tensor]


class Translated(Mapping[str, Tensor]):
    """Another's weights under our names, each tensor made when it is asked for.

    Names are checked at once, shapes as tensors are read. Raises InputError for a tensor that is missing,
    quantised, of a wrong shape or of no parameter, and for a model of no family that is read.
    """

    def __init__(self, model: Model, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._written = _plain_names(state)
        stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in self._written)
        self._sources = dict(_sources(model, stacked))
        self._require_names(model)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        return source.make([self._read(theirs, source.shape) for theirs in source.names])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _read(self, name: str, shape: Shape) -> Tensor:
        written = self._written[name]
        return _of_shape(written, self._state[written], shape)

    def _require_names(self, model: Model) -> None:
        quantised = next((name for name in self._state if name.endswith(_QUANTISED)), None)
        if quantised is not None:
            raise InputError(
                quantised, "a quantised weight", "weights are read in number types of torch only"
            )
        as_on_disk = any(".block_sparse_moe." in name for name in self._state)
        needed: set[str] = set()
        for source in self._sources.values():
            needed.update(source.names)
            for name in source.names:
                if name not in self._written:
                    raise _missing(_on_disk(name) if as_on_disk else name, source.shape)
        for name, written in self._written.items():
            if name not in needed and not self._may_be_left(model, name):
                raise _surplus(written)

    def _may_be_left(self, model: Model, name: str) -> bool:
        """What says nothing that the model does not know: angles of rotary positions, a head that is the
        embedding, layers that predict further tokens, shared experts of no width."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        if name == "lm_head.weight" and model.tie_word_embeddings:
            head, table = self._state[self._written[name]], self["embedding.weight"]
            if head is not table and not torch.equal(head, table):
                raise InputError(name, "another tensor", "the model's head is its embedding")
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= model.num_hidden_layers:
            return f"{layer[0]}eh_proj.weight" in self._written
        return ".shared_expert" in name and self._state[self._written[name]].numel() == 0


def from_hugging_face(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights of a model under our names; what needs no rearranging is not copied.

    Raises InputError as `Translated` does, which reads them one at a time.
    """
    return dict(Translated(model, state))


def to_hugging_face(
    model: Model, weights: Mapping[str, Tensor], experts: Experts = "separate"
) -> dict[str, Tensor]:
    """The inverse of `from_hugging_face`: `separate` experts as a checkpoint on disk, `stacked` ones as the
    state of a model of transformers 5; those of gpt-oss are stacked in both. A head that is the embedding is
    left out, as it is on disk.

    Raises InputError for a tensor of ours that is missing, unknown or wrongly shaped, and for a model of no
    family that is read.
    """
    spelling = _spelling(model)
    expected = dict(_our_shapes(model))
    for name in weights:
        if name not in expected:
            raise _surplus(name)
    state: dict[str, Tensor] = {}
    for name, shape in expected.items():
        if name not in weights:
            raise _missing(name, shape)
        _of_shape(name, weights[name], shape)
        if ".moe.experts." not in name:
            state[_plain(spelling, name)] = weights[name]
    for prefix in dict.fromkeys(re.findall(r"^layers\.\d+\.moe\.experts\.", "\n".join(expected), re.M)):
        ours = {name.removeprefix(prefix): weights[name] for name in expected if name.startswith(prefix)}
        state.update(_experts_of_a_layer(spelling, _their_experts(prefix), ours, experts))
    if spelling.mixtral and experts == "separate":
        return {_on_disk(name): tensor for name, tensor in state.items()}
    return state


# Names.


def _spelling(model: Model) -> _Spelling:
    """How the family of a model spells its names. Raises InputError where no family has such a model."""
    for name, only in (("gated", True), ("norm", "rmsnorm"), ("position", "rope")):
        if getattr(model, name) != only:
            rule = "no Hugging Face family that is read has it"
            raise InputError(f"model.{name}", getattr(model, name), rule, [only])
    if model.expert_bias:
        return _Spelling(router="router", interleaved=True)
    if model.shared_expert_gate:
        return _Spelling(shared="shared_expert")
    named = model.is_mla or model.shared_width or model.router.correction_bias or model.qk_norm != "none"
    return _Spelling(mixtral=model.is_moe and not named)


def _plain(spelling: _Spelling, name: str) -> str:
    """Their name of a tensor that is the same on both sides."""
    if not name.startswith("layers."):
        module, leaf = name.split(".")
        return f"{_OUTSIDE[module]}.{leaf}"
    _, layer, inner = name.split(".", 2)
    module, _, leaf = inner.rpartition(".")
    if module == "moe.router":
        theirs = f"mlp.{spelling.router}"
        leaf = "e_score_correction_bias" if leaf == "correction_bias" else leaf
    elif module.startswith("moe.shared."):
        theirs = f"mlp.{spelling.shared}.{module.removeprefix('moe.shared.')}_proj"
    else:
        theirs = _IN_A_LAYER[module]
    return f"model.layers.{layer}.{theirs}.{leaf}"


def _their_experts(prefix: str) -> str:
    return f"model.{prefix.replace('.moe.', '.mlp.')}"


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name as most families spell it, with the name as it is written. Mixtral's differ on disk."""
    plain: dict[str, str] = {}
    for name in names:
        same = name.replace(".block_sparse_moe.", ".mlp.")
        same = re.sub(r"(\.experts\.\d+\.)(w[123])(?=\.)", lambda m: m[1] + _MIXTRAL_MATRICES[m[2]], same)
        if same in plain:
            raise InputError(name, "a second time", f"{plain[same]} is the same tensor")
        plain[same] = name
    return plain


def _on_disk(name: str) -> str:
    """The inverse of `_plain_names` for Mixtral."""
    for theirs, plain in _MIXTRAL_MATRICES.items():
        name = re.sub(rf"(\.experts\.\d+\.){plain}(?=\.)", rf"\g<1>{theirs}", name)
    return re.sub(r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.", name)


def _our_shapes(model: Model) -> Iterator[tuple[str, Shape]]:
    """Parameters, and the corrections of routers, which are none."""
    for param in parameters(model):
        yield param.name, param.shape
        if model.router.correction_bias and param.name.endswith(".moe.router.weight"):
            yield f"{param.name.removesuffix('weight')}correction_bias", param.shape[:1]


# Tensors.


def _sources(model: Model, stacked: bool) -> Iterator[tuple[str, _Source]]:
    spelling = _spelling(model)
    for name, shape in _our_shapes(model):
        prefix, _, part = name.partition(".moe.experts.")
        if not part:
            yield name, _Source((_plain(spelling, name),), shape, _whole)
            continue
        theirs = _their_experts(f"{prefix}.moe.experts.")
        if spelling.interleaved:
            yield name, _interleaved_source(theirs, part, shape)
        elif stacked:
            yield name, _stacked_source(theirs, part, shape)
        else:
            names = tuple(f"{theirs}{expert}.{part}_proj.weight" for expert in range(shape[0]))
            yield name, _Source(names, shape[1:], torch.stack)


def _stacked_source(theirs: str, part: str, shape: Shape) -> _Source:
    if part == "down":
        return _Source((f"{theirs}down_proj",), shape, _whole)
    experts, width, hidden = shape
    rows = partial(_rows, start=0 if part == "gate" else width, count=width)
    return _Source((f"{theirs}gate_up_proj",), (experts, 2 * width, hidden), rows)


def _interleaved_source(theirs: str, part: str, shape: Shape) -> _Source:
    letter, bias = part.removesuffix("_bias"), part.endswith("_bias")
    suffix = "_bias" if bias else ""
    swapped = shape if bias else (shape[0], shape[2], shape[1])
    if letter == "down":
        return _Source((f"{theirs}down_proj{suffix}",), swapped, _whole if bias else _swapped)
    columns = partial(_columns, first=0 if letter == "gate" else 1, swap=not bias)
    return _Source((f"{theirs}gate_up_proj{suffix}",), (*swapped[:-1], 2 * swapped[-1]), columns)


def _whole(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _rows(tensors: list[Tensor], start: int, count: int) -> Tensor:
    return tensors[0][:, start : start + count].contiguous()


def _swapped(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2).contiguous()


def _columns(tensors: list[Tensor], first: int, swap: bool) -> Tensor:
    columns = tensors[0][..., first::2]
    return (columns.transpose(1, 2) if swap else columns).contiguous()


def _experts_of_a_layer(
    spelling: _Spelling, theirs: str, ours: Mapping[str, Tensor], experts: Experts
) -> Iterator[tuple[str, Tensor]]:
    if spelling.interleaved:
        for suffix in ("", "_bias"):
            gate, up, down = (ours[f"{part}{suffix}"] for part in ("gate", "up", "down"))
            both = torch.stack((gate, up), dim=2).flatten(1, 2)
            yield f"{theirs}gate_up_proj{suffix}", both if suffix else _swapped([both])
            yield f"{theirs}down_proj{suffix}", down if suffix else _swapped([down])
    elif experts == "stacked":
        yield f"{theirs}gate_up_proj", torch.cat((ours["gate"], ours["up"]), dim=1)
        yield f"{theirs}down_proj", ours["down"]
    else:
        for part, stack in ours.items():
            for expert, matrix in enumerate(stack):
                yield f"{theirs}{expert}.{part}_proj.weight", matrix.clone()  # apart, so that it can be saved


def _of_shape(name: str, tensor: Tensor, shape: Shape) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise InputError(name, list(tensor.shape), f"its shape must be {list(shape)}")
    return tensor


def _missing(name: str, shape: Shape) -> InputError:
    return InputError(name, "missing", f"the model has it, with shape {list(shape)}")


def _surplus(name: str) -> InputError:
    return InputError(name, "not of the model", "each tensor must belong to a parameter of the model")


# Folders.


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors, each read from its shard when it is asked for."""

    def __init__(self, folder: Path, model: Model, shard_of: Mapping[str, str]) -> None:
        self.folder = folder
        self.model = model
        self._shard_of = shard_of
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, framework="pt")
            tensor: Tensor = self._open[shard].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(name, str(error), f"it cannot be read from {self.folder / shard}") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


def open_weights(folder: str | Path) -> Checkpoint:
    """A folder with a `config.json` and safetensors, whole or in shards with an index; no tensor is read yet.

    `from_hugging_face(opened.model, opened)` reads all. Raises InputError where a file is missing or is not
    what its name says.
    """
    folder = Path(folder)
    model = read_model({"config": "config.json"}, folder)
    if (folder / INDEX).exists():
        return Checkpoint(folder, model, _read_index(folder / INDEX))
    single = folder / SINGLE
    if not single.is_file():
        near = sorted(path.name for path in folder.glob("*.safetensors"))[:3]
        rule = f"the folder holds neither {SINGLE} nor {INDEX}; other formats are not read"
        raise InputError(str(folder), "no weights", rule, near)
    try:
        with safe_open(single, framework="pt") as opened:
            return Checkpoint(folder, model, dict.fromkeys(opened.keys(), SINGLE))
    except (OSError, SafetensorError) as error:
        raise InputError(str(single), str(error), "the file cannot be read as safetensors") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(read_text(path, MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), str(error), "the file must be JSON") from None
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(str(path), shards, "its weight_map names the shard of each tensor")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise InputError(f"{path} weight_map.{name}", shard, "a shard is a file of the same folder")
        if not (path.parent / shard).is_file():
            raise InputError(f"{path} weight_map.{name}", shard, "there is no such file")
    return shards
