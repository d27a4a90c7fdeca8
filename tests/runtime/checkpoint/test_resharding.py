"""Saved on one layout of ranks, loaded on another, bit for bit."""

from __future__ import annotations

import zlib
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from meshwright.ir.parameters import Param, parameters
from meshwright.ir.sharding import local_shape, local_slice, zero_degree
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.runtime.checkpoint import Piece, Pieces, flat_pieces, load, local_pieces, save, survey, whole
from meshwright.runtime.checkpoint import folder as disk

from .conftest import Crew

MODEL = Model(
    num_hidden_layers=2,
    hidden_size=12,
    vocab_size=50,  # not a multiple of 4: padded over tp
    num_attention_heads=4,
    num_key_value_heads=2,  # fewer than tp=4: replicated heads
    head_dim=3,
    qk_norm="head",
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=10,  # not a multiple of 4: padded over etp
    n_shared_experts=1,
)
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "dp2-ep2": Layout(dp=2, ep=2),
    "tp2-pp2": Layout(tp=2, pp=2, ep=2),
    "dp4-ep2": Layout(dp=4, ep=2),
    "tp4-etp4": Layout(tp=4, etp=4),
    "tp2-dp4-ep4": Layout(tp=2, dp=4, ep=4),
    "tp4-dp2-etp2-ep2": Layout(tp=4, dp=2, etp=2, ep=2),
    "cp2-dp2-pp2-ep2": Layout(cp=2, dp=2, pp=2, ep=2),
}


def whole_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits, so that NaNs and negative zeros are among the values."""
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    size = prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=chance).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def held(layout: Layout, rank: int, filled: bool) -> dict[str, Pieces]:
    """What a rank holds: bf16 weights as local tensors, one fp32 optimizer state as flat ZeRO ranges."""
    state = {}
    stage = layout.coordinates(rank)["pp"]
    for number, param in enumerate(parameters(MODEL)):
        weights, moments = f"weights.{param.name}", f"moments.{param.name}"
        if number % layout.pp != stage:
            if number % 3:  # another stage's tensors may be named or not
                state[weights] = Pieces(param.shape, torch.bfloat16, ())
            continue
        state[weights] = local_pieces(
            local_slice(param, layout, rank).ranges,
            local_tensor(param, layout, rank, weights, torch.bfloat16, filled),
            param.shape,
        )
        state[moments] = zero_shard(param, layout, rank, moments, filled)
    return state


def local_tensor(
    param: Param, layout: Layout, rank: int, name: str, dtype: torch.dtype, filled: bool
) -> Tensor:
    """A rank's part of a parameter, with its padding; strides are those of the transposed tensor."""
    local = torch.zeros(local_shape(param, layout)[::-1], dtype=dtype).permute(
        *reversed(range(len(param.shape)))
    )
    if filled:
        ranges = local_slice(param, layout, rank).ranges
        values = whole_tensor(name, param.shape, dtype)[tuple(slice(*r) for r in ranges)]
        local[tuple(slice(size) for size in values.shape)] = values
    return local


def zero_shard(param: Param, layout: Layout, rank: int, name: str, filled: bool) -> Pieces:
    shape = local_shape(param, layout)
    degree = zero_degree(param, layout)
    axis, view = ("edp", "expert") if param.is_expert else ("dp_cp", "dense")
    position = layout.group_of(rank, axis, view).index(rank)
    width = -(-prod(shape) // degree)
    start, stop = (min(width * k, prod(shape)) for k in (position, position + 1))
    local = local_tensor(param, layout, rank, name, torch.float32, filled).reshape(-1)
    ranges = local_slice(param, layout, rank).ranges
    return flat_pieces(ranges, local[start:stop].clone(), start, stop, param.shape, local_shape=shape)


def differences(state: dict[str, Pieces]) -> list[str]:
    """Names of tensors whose pieces are not the bits of the whole."""
    wrong = []
    for name, pieces in state.items():
        expected = whole_tensor(name, pieces.shape, pieces.dtype)
        for piece in pieces.pieces:
            offsets, sizes = piece.rectangle
            window = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            if not torch.equal(bits(piece.tensor), bits(expected[window])):
                wrong.append(f"{name} at {offsets}")
    return wrong


def save_on(crew: Crew, layout: Layout, folder: Path) -> Path:
    def act(rank: int) -> Path:
        return save(folder, 100, held(layout, rank, filled=True), {"layout": layout.degrees()})

    paths = crew(layout.world_size, act)
    assert set(paths) == {folder / "step-00000100"}
    return paths[0]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2-dp4-ep4", ["one", "tp2", "dp2-ep2", "tp2-pp2", "dp4-ep2", "tp4-etp4", "tp4-dp2-etp2-ep2"]),
        ("tp4-dp2-etp2-ep2", ["one", "dp4-ep2", "cp2-dp2-pp2-ep2"]),
        ("cp2-dp2-pp2-ep2", ["dp2-ep2", "tp2-dp4-ep4"]),
        ("one", ["one", "tp2-dp4-ep4"]),
        ("tp2-pp2", ["tp2-pp2", "cp2-dp2-pp2-ep2"]),
    ],
)
def test_any_layout_loads_what_any_other_saved(
    saved: str, loaded: list[str], crew: Crew, tmp_path: Path
) -> None:
    path = save_on(crew, LAYOUTS[saved], tmp_path / "checkpoints")

    for name in loaded:
        layout = LAYOUTS[name]

        def act(rank: int, layout: Layout = layout) -> tuple[list[str], dict[str, object]]:
            state = held(layout, rank, filled=False)
            extra = load(path, state)
            return differences(state), extra

        for wrong, extra in crew(layout.world_size, act):
            assert wrong == [], name
            assert extra == {"layout": LAYOUTS[saved].degrees()}


def test_replicas_are_written_once_and_share_the_work(crew: Crew, tmp_path: Path) -> None:
    path = save_on(crew, LAYOUTS["tp2-dp4-ep4"], tmp_path)
    names = sorted(file.name for file in path.glob("*.distcp"))
    assert names == [f"__{rank}_0.distcp" for rank in range(8)]
    payload = sum(param.numel for param in parameters(MODEL)) * (2 + 4)
    metadata = dcp.FileSystemReader(path).read_metadata()
    stored = sum(
        prod(chunk.sizes) * tensor.properties.dtype.itemsize
        for tensor in metadata.state_dict_metadata.values()
        for chunk in tensor.chunks
    )
    assert stored == payload
    sizes = [(path / name).stat().st_size for name in names]
    assert max(sizes) < 2 * min(sizes)


def test_plain_dcp_reads_the_checkpoint(crew: Crew, tmp_path: Path) -> None:
    path = save_on(crew, LAYOUTS["tp2-dp4-ep4"], tmp_path)
    state = {
        f"{kind}.{param.name}": torch.zeros(param.shape, dtype=dtype)
        for param in parameters(MODEL)
        for kind, dtype in (("weights", torch.bfloat16), ("moments", torch.float32))
    }
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=path)
    for name, tensor in state.items():
        assert torch.equal(bits(tensor), bits(whole_tensor(name, tuple(tensor.shape), tensor.dtype))), name


def cut(values: Tensor, seed: int, num_ranks: int) -> list[tuple[int, int]]:
    """A flat range for each rank, of any length, none at all among them."""
    chance = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, values.numel() + 1, (num_ranks - 1,), generator=chance).sort().values
    cuts = [0, *inner.tolist(), values.numel()]
    return list(pairwise(cuts))


def test_any_flat_cut_loads_any_other(crew: Crew, tmp_path: Path) -> None:
    """Ranks hold one, many or no rectangles, and how many is no guide to which is which."""
    shapes = [(2, 3, 4), (5, 7), (23,), (3, 1, 5, 2)]
    values = {f"{shape}.{seed}": torch.randn(shape) for shape in shapes for seed in range(8)}

    def pieces(name: str, seed: int, rank: int, num_ranks: int, filled: bool) -> Pieces:
        whole = values[name]
        start, stop = cut(whole, seed, num_ranks)[rank]
        flat = whole.flatten()[start:stop].clone() if filled else torch.zeros(stop - start)
        return flat_pieces([(0, size) for size in whole.shape], flat, start, stop, whole.shape)

    def saving(rank: int) -> Path:
        return save(tmp_path, 1, {name: pieces(name, k, rank, 4, True) for k, name in enumerate(values)}, {})

    def loading(rank: int) -> bool:
        state = {name: pieces(name, 100 + k, rank, 3, False) for k, name in enumerate(values)}
        load(disk.step_folder(tmp_path, 1), state)
        return all(
            torch.equal(found.tensor, expected.tensor)
            for k, name in enumerate(values)
            for found, expected in zip(
                state[name].pieces, pieces(name, 100 + k, rank, 3, True).pieces, strict=True
            )
        )

    crew(4, saving)
    assert crew(3, loading) == [True] * 3


def test_overlapping_parts_may_be_wanted(tmp_path: Path) -> None:
    saved = torch.arange(24.0).reshape(4, 6)
    path = save(tmp_path, 0, {"a": whole(saved)}, {})
    parts = (
        Piece((0, 0), torch.zeros(2, 2)),
        Piece((0, 0), torch.zeros(4, 6)),
        Piece((1, 1), torch.zeros(2, 3)),
    )
    load(path, {"a": Pieces((4, 6), torch.float32, parts)})
    for piece in parts:
        (row, column), (rows, columns) = piece.rectangle
        assert torch.equal(piece.tensor, saved[row : row + rows, column : column + columns])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float8_e4m3fn])
def test_every_shape_and_dtype_comes_back(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path, 0, {"a": whole(torch.ones(shape, dtype=dtype))}, {})
    wanted = torch.zeros(shape, dtype=dtype)
    load(path, {"a": whole(wanted)})
    assert torch.equal(bits(wanted), bits(torch.ones(shape, dtype=dtype)))


def test_parameters_that_require_gradients_are_filled_in_place(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    path = save(tmp_path, 7, {name: whole(value) for name, value in layer.named_parameters()}, {"a": [1.5]})
    with torch.no_grad():
        for value in layer.parameters():
            value.zero_()
    assert load(path, {name: whole(value) for name, value in layer.named_parameters()}) == {"a": [1.5]}
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name])
        assert value.requires_grad
    assert [found.problem for found in survey(tmp_path)] == [None]
