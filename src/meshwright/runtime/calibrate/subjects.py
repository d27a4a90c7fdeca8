"""What is timed: each op of the graph by the function with which the runtime runs it, with inputs of its own.

Shape letters: T tokens, N copies of tokens, E experts, K of them chosen, H and W widths, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.model import Model
from meshwright.runtime.attention import rotate
from meshwright.runtime.dispatch import by_expert_order, owners_of_rows
from meshwright.runtime.layers import activate, rms_norm
from meshwright.runtime.permute import copies_in_order, grouped_matmul, reordered, restored, weighted_sum
from meshwright.runtime.routing import route, routing_counts
from meshwright.workload import Optimizer

OPTIMIZER_TENSORS = 16
"""Parameters that an update is spread over: about as many as a small model has."""


class Shape(NamedTuple):
    """An op of the graph at one size, as `cost/measured.py` names it."""

    op: str
    phase: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Surroundings:
    """What an op's sizes do not say: the model that it stands in, the type it computes in, and where."""

    model: Model
    dtype: torch.dtype
    device: torch.device
    optimizer: Optimizer = "adamw"

    def tensor(self, *shape: int) -> Tensor:
        """Random numbers of the compute type that take part in autograd."""
        return torch.randn(*shape, device=self.device).to(self.dtype).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """A weight whose FP32 gradient adds up in a buffer that is there already, as in a step."""
        weight = torch.randn(*shape, device=self.device).to(self.dtype).requires_grad_()
        weight.grad_dtype = torch.float32
        weight.grad = torch.zeros(*shape, dtype=torch.float32, device=self.device)
        return weight

    def integers(self, below: int, *shape: int) -> Tensor:
        """Random whole numbers."""
        return torch.randint(0, below, shape, device=self.device)


@dataclass
class Subject:
    """An op that can be run. `splits`: its input and its weight gradient are timed apart, as the graph counts
    them. `update` replaces backward where autograd makes no node of the op."""

    run: Callable[[], Tensor]
    inputs: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()
    splits: bool = False
    update: Callable[[], object] | None = None
    gradient: Tensor | None = field(default=None, init=False)

    def prepared(self, phase: str) -> Callable[[], object]:
        """What is timed of a phase; the forward that a backward needs is run here."""
        if phase in ("forward", "step"):
            return self.run
        if self.update is not None:
            return self.update
        if self.splits:
            _require(self.inputs, phase == "input_gradient")
            _require(self.weights, phase == "weight_gradient")
        out = self.run()
        if self.gradient is None:
            self.gradient = torch.ones_like(out)
        for one in self.inputs:
            one.grad = None
        gradient = self.gradient
        return lambda: out.backward(gradient)

    def settle(self) -> None:
        """Bring everything back to how a forward pass finds it."""
        if self.splits:
            _require((*self.inputs, *self.weights), True)


def _require(tensors: Sequence[Tensor], wanted: bool) -> None:
    for tensor in tensors:
        tensor.requires_grad_(wanted)


def subject_of(shape: Shape, here: Surroundings) -> Subject:
    """The subject of an op at one size. What has none of its own is timed as a product of two tensors."""
    build = _BUILDERS.get(shape.op, _product)
    return build(here, *shape.sizes)


def _matmul(here: Surroundings, m: int, n: int, k: int) -> Subject:
    x, w = here.tensor(m, k), here.weight(n, k)
    return Subject(lambda: F.linear(x, w), [x], [w], splits=True)


def _grouped(here: Surroundings, groups: int, m: int, n: int, k: int) -> Subject:
    x, w = here.tensor(m, k), here.weight(groups, n, k)
    counts = torch.full((groups,), m // groups, device=here.device)
    counts[: m % groups] += 1
    return Subject(lambda: grouped_matmul(x, w, counts), [x], [w], splits=True)


def _attention(
    here: Surroundings, batch: int, heads: int, queries: int, keys: int, qk_dim: int, v_dim: int
) -> Subject:
    """Causal, on tensors that stand sequence-first as in a stage, with the model's key-value heads."""
    ratio = max(here.model.num_attention_heads // here.model.kv_heads, 1)
    kv_heads = heads // ratio if heads % ratio == 0 else heads
    q = here.tensor(queries, batch, heads, qk_dim)
    k, v = here.tensor(keys, batch, kv_heads, qk_dim), here.tensor(keys, batch, kv_heads, v_dim)

    def run() -> Tensor:
        turned_q, turned_k, turned_v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        grouped = kv_heads != heads
        out = F.scaled_dot_product_attention(turned_q, turned_k, turned_v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(-2)

    return Subject(run, [q, k, v])


def _norm(here: Surroundings, tokens: int, width: int) -> Subject:
    x, weight, eps = here.tensor(tokens, width), here.weight(width), here.model.norm_eps
    if here.model.norm == "rmsnorm":
        return Subject(lambda: rms_norm(x, weight, eps), [x], [weight])
    bias = here.weight(width)
    return Subject(lambda: F.layer_norm(x, (width,), weight, bias, eps), [x], [weight, bias])


def _activation(here: Surroundings, tokens: int, width: int) -> Subject:
    up, name = here.tensor(tokens, width), here.model.hidden_act or "silu"
    return Subject(lambda: activate(up, name), [up])


def _gated(here: Surroundings, tokens: int, width: int) -> Subject:
    gate, up, name = here.tensor(tokens, width), here.tensor(tokens, width), here.model.hidden_act or "silu"
    return Subject(lambda: activate(gate, name) * up, [gate, up])


def _residual(here: Surroundings, tokens: int, width: int) -> Subject:
    """Backward adds up the gradients of the branch and of the stream beside it."""
    x, y = here.tensor(tokens, width), here.tensor(tokens, width)
    one, other = x.detach().clone(), y.detach().clone()
    return Subject(lambda: x + y, [x, y], update=lambda: one + other)


def _rope(here: Surroundings, tokens: int, width: int) -> Subject:
    """Turning queries or keys, in one head where the width is not that of the model's; a stage makes the
    angles once for all of its layers."""
    dim = here.model.qk_head_dim if width % here.model.qk_head_dim == 0 else width
    x = here.tensor(tokens, 1, width // dim, dim)
    pairs = max(int(dim * here.model.partial_rotary_factor) // 2, 1)
    cos, sin = (torch.rand(tokens, 1, 1, pairs, device=here.device) for _ in range(2))
    return Subject(lambda: rotate(x, cos, sin), [x])


def _embedding(here: Surroundings, tokens: int, width: int) -> Subject:
    table, ids = here.weight(here.model.vocab_size, width), here.integers(here.model.vocab_size, tokens, 1)
    return Subject(lambda: F.embedding(ids, table), [], [table])


def _route(here: Surroundings, tokens: int, experts: int) -> Subject:
    """Scores, choices, weights, counts, and the order in which copies leave; the host waits for counts."""
    logits = torch.randn(tokens, experts, device=here.device).requires_grad_()
    router, top_k = here.model.router, _top_k(here.model, experts)
    corrected = torch.zeros(experts, device=here.device) if router.correction_bias else None

    def run() -> Tensor:
        routing = route(logits, router, top_k, correction_bias=corrected)
        routing_counts(routing)
        _, counts = by_expert_order(routing.choices.flatten(), experts)
        counts.view(1, -1).sum(1).tolist()
        return routing.weights

    return Subject(run, [logits])


def _top_k(model: Model, experts: int) -> int:
    return min(model.num_experts_per_tok or 2, experts)


def _copies(here: Surroundings, copies: int, width: int) -> Subject:
    top_k = _top_k(here.model, copies)
    tokens = max(copies // top_k, 1)
    x, order = here.tensor(tokens, width), torch.randperm(tokens * top_k, device=here.device)
    return Subject(lambda: copies_in_order(x, order, top_k), [x])


def _combine(here: Surroundings, copies: int, width: int) -> Subject:
    top_k = _top_k(here.model, copies)
    tokens = max(copies // top_k, 1)
    y, order = here.tensor(tokens * top_k, width), torch.randperm(tokens * top_k, device=here.device)
    weights = torch.rand(tokens, top_k, device=here.device).requires_grad_()
    return Subject(lambda: weighted_sum(y, weights, order), [y, weights])


def _sorted(back: bool, here: Surroundings, copies: int, width: int) -> Subject:
    """Rows of two senders to the order of the local experts, and back; the order is found on the way."""
    local = max(here.model.num_experts // 2, 1)
    counts = torch.full((2, local), copies // (2 * local), device=here.device)
    counts[0, 0] += copies - int(counts.sum())
    x, known = here.tensor(copies, width), owners_of_rows(counts).argsort(stable=True)
    if back:
        return Subject(lambda: restored(x, known), [x])
    return Subject(lambda: reordered(x, owners_of_rows(counts).argsort(stable=True)), [x])


def _loss(here: Surroundings, tokens: int, vocabulary: int) -> Subject:
    logits, targets = here.tensor(tokens, vocabulary), here.integers(vocabulary, tokens)
    return Subject(lambda: F.cross_entropy(logits.float(), targets, reduction="sum"), [logits])


def _scale(here: Surroundings, tokens: int, width: int) -> Subject:
    x, gate = here.tensor(tokens, width), here.tensor(tokens, 1)
    return Subject(lambda: x * gate.sigmoid(), [x, gate])


def _product(here: Surroundings, *sizes: int) -> Subject:
    x, y = here.tensor(*sizes), here.tensor(*sizes)
    return Subject(lambda: x * y, [x, y])


def _update(here: Surroundings, moved_bytes: int) -> Subject:
    """Clearing, norming, clipping and updating FP32 masters, as `runtime/optim.py` does."""
    each = max(moved_bytes // (bytes_of_element(here) * OPTIMIZER_TENSORS), 1)
    masters = [torch.zeros(each, device=here.device) for _ in range(OPTIMIZER_TENSORS)]
    flat = torch.zeros(each * OPTIMIZER_TENSORS, device=here.device)
    gradients = [flat[place * each : (place + 1) * each] for place in range(OPTIMIZER_TENSORS)]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    make: Any = torch.optim.AdamW if here.optimizer == "adamw" else torch.optim.SGD
    inner = make(masters, lr=1e-4, fused=True)
    weights = None if here.dtype == torch.float32 else flat.to(here.dtype)

    def run() -> Tensor:
        flat.zero_()
        norms = torch.stack(torch._foreach_norm(gradients))
        total = norms.square().sum()
        torch._foreach_mul_(gradients, 0.5)
        inner.step()
        if weights is not None:
            weights.copy_(flat)
        return total

    return Subject(run)


def bytes_of_element(here: Surroundings) -> int:
    """Bytes that an update moves for one parameter, as `planner/step.py` counts them."""
    moved = {"adamw": 28, "sgd": 8}[here.optimizer]
    return moved + torch.empty(0, dtype=here.dtype).element_size() + 8


_BUILDERS: Mapping[str, Callable[..., Subject]] = {
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "attention": _attention,
    "norm": _norm,
    "activation": _activation,
    "gated_activation": _gated,
    "residual": _residual,
    "rope_q": _rope,
    "rope_k": _rope,
    "embedding": _embedding,
    "route": _route,
    "permute": _copies,
    "combine_tokens": _combine,
    "sort": partial(_sorted, False),
    "unsort": partial(_sorted, True),
    "loss": _loss,
    "shared_scale": _scale,
    "optimizer": _update,
}
