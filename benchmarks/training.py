"""Tokens per second of one training step on one CPU thread: ours, transformers' Mixtral, and matmuls alone.

The model has 58.7 M parameters: 4 layers, hidden size 512, 8 heads, 8 experts of width 1024, 2 for each
token, a vocabulary of 4096; a step is 8 sequences of 256 tokens in FP32 with AdamW. Both models start from
the same weights and see the same tokens; their losses must agree. Transformers runs its default experts
(`grouped_mm`), `sdpa` attention and torch's fused AdamW. Ours also takes the norm of the gradient and clips.

The floor is what the step's matmuls take on their own, forward and backward, in their own shapes, with tokens
spread evenly over experts and without attention's. Rounds are interleaved, so that a busy machine slows all
alike; CPU time counts, and the fastest round. `python benchmarks/training.py --rounds 9`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH = 8, 256
LAYERS, HIDDEN, HEADS, EXPERTS, TOP_K, WIDTH, VOCABULARY = 4, 512, 8, 8, 2, 1024, 4096
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "router_aux_loss_coef": 0.0,
}
RATE = 1e-4
AGREEMENT = 1e-5
"""How far the first losses of the two may be apart, relative."""

Step = Callable[[], float]
"""One step; returns its loss."""

OURS, THEIRS, FLOOR = "meshwright", "transformers", "matmuls alone"

KINDS: Mapping[str, tuple[str, ...]] = {
    "experts' matmuls": ("_grouped_mm",),
    "other matmuls": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "loss": ("_log_softmax", "nll_loss"),
    "optimizer, gradient's norm": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
    "sums into gradients": ("add_", "zero_"),
    "permutes and copies": (
        *("index", "gather", "scatter", "embedding", "copy", "_to_copy", "clone", "cat", "sort", "fill"),
        *("repeat_interleave", "bincount", "histc", "topk", "slice_backward", "select_backward", "new_zeros"),
    ),
}
"""Parts of a step by how the names of operators begin, the first that matches; the rest is norms and
elementwise operators, and what no operator takes: Python and autograd."""
REST, OUTSIDE = "norms and elementwise", "outside of operators"


class Stopwatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """CPU seconds in operators while it is active, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[kind_of(func._schema.name.partition("::")[2])] += time.process_time() - started
        return result


def kind_of(operator: str) -> str:
    """The part of a step that an operator belongs to."""
    for kind, beginnings in KINDS.items():
        if operator.startswith(beginnings):
            return kind
    return REST


def our_step(weights: Mapping[str, torch.Tensor], tokens: torch.Tensor, targets: torch.Tensor) -> Step:
    """A Trainer of one process with the given weights, under Hugging Face's names."""
    from meshwright.deployment import deployment_from
    from meshwright.plan import resolve
    from meshwright.runtime.build import values_of
    from meshwright.runtime.hugging_face import from_hugging_face
    from meshwright.runtime.mesh import single_process
    from meshwright.runtime.step import Trainer
    from meshwright.verify import require_valid

    document = {
        "cluster": {"local": 1},
        "model": {"model_type": "mixtral", **CONFIG},
        "workload": {
            "global_batch_size": BATCH,
            "sequence_length": LENGTH,
            "precision": "fp32",
            "optimizer": "adamw",
        },
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "policy": {"engine": "native", "micro_batch_size": BATCH},
        "training": {"learning_rate": RATE},
    }
    plan = resolve(deployment_from(document, Path()))
    require_valid(plan)
    values = values_of(from_hugging_face(plan.model, weights))
    trainer = Trainer(plan, single_process(torch.device("cpu")), values)
    return lambda: float(trainer.step(tokens, targets).loss)


def their_model() -> Any:
    """Mixtral as transformers builds it by default."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**CONFIG, use_cache=False)
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    return MixtralForCausalLM(config)


def their_step(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> Step:
    """Their loss, backward and torch's fused AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def matmul_shapes() -> list[tuple[int, int, int, int]]:
    """How many matmuls of [rows, inputs] by [inputs, outputs] forward has."""
    tokens = BATCH * LENGTH
    copies = tokens * TOP_K // EXPERTS
    return [
        (4 * LAYERS, tokens, HIDDEN, HIDDEN),
        (LAYERS, tokens, HIDDEN, EXPERTS),
        (2 * LAYERS * EXPERTS, copies, HIDDEN, WIDTH),
        (LAYERS * EXPERTS, copies, WIDTH, HIDDEN),
        (1, tokens, HIDDEN, VOCABULARY),
    ]


def floor_step() -> Step:
    """Each matmul with its two of backward, into memory that is there already."""
    work = []
    for count, rows, inputs, outputs in matmul_shapes():
        x, y, w = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
        work.append((count, x, y, w, tuple(torch.empty_like(t) for t in (x, y, w))))

    def step() -> float:
        for count, x, y, w, (dx, out, dw) in work:
            for _ in range(count):
                torch.mm(x, w.t(), out=out)
                torch.mm(y, w, out=dx)
                torch.mm(y.t(), x, out=dw)
        return 0.0

    return step


def cpu_s(step: Step) -> float:
    """CPU seconds of one step."""
    started = time.process_time()
    step()
    return time.process_time() - started


def parts_of(step: Step, rounds: int) -> dict[str, float]:
    """CPU seconds of the fastest of some steps by what they went into; each operator costs a call more."""
    taken = []
    for _ in range(rounds):
        with Stopwatch() as watch:
            total = cpu_s(step)
        taken.append((total, {**watch.seconds, OUTSIDE: total - sum(watch.seconds.values())}))
    return min(taken, key=lambda one: one[0])[1]


def print_speeds(times: Mapping[str, list[float]]) -> None:
    """The fastest round of each, as a rate and against the others."""
    best = {name: min(taken) for name, taken in times.items()}
    print(f"{'':<24} {'CPU ms':>8} {'tokens/s':>9} {'x transformers':>15} {'of the floor':>13}")
    for name, seconds in best.items():
        rate = BATCH * LENGTH / seconds
        ratio, share = best[THEIRS] / seconds, best[FLOOR] / seconds
        print(f"{name:<24} {1e3 * seconds:8.0f} {rate:9.0f} {ratio:15.3f} {share:13.1%}")


def print_parts(parts: Mapping[str, Mapping[str, float]]) -> None:
    """Where the time goes, ours beside theirs, in ms."""
    print(f"\n{'CPU ms of a step by parts':<28} {OURS:>12} {THEIRS:>12}")
    for kind in (*KINDS, REST, OUTSIDE):
        print(f"{kind:<28} " + " ".join(f"{1e3 * parts[name].get(kind, 0.0):12.0f}" for name in parts))
    totals = " ".join(f"{1e3 * sum(part.values()):12.0f}" for part in parts.values())
    print(f"{'together':<28} {totals}")


def main() -> None:
    """Measure in interleaved rounds and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each (7)")
    rounds = max(1, parser.parse_args().rounds)
    torch.set_num_threads(1)
    drawn = torch.Generator().manual_seed(0)
    stream = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=drawn)
    tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    model = their_model()
    steps = {
        OURS: our_step(model.state_dict(), tokens, targets),
        THEIRS: their_step(model, tokens, targets),
        FLOOR: floor_step(),
    }
    first = {name: step() for name, step in steps.items()}
    if abs(first[OURS] / first[THEIRS] - 1) > AGREEMENT:
        raise SystemExit(f"the losses differ: {first[OURS]} and {first[THEIRS]}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(cpu_s(step))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {BATCH} x {LENGTH} tokens, FP32, one thread, best of {rounds} rounds")
    print_speeds(times)
    print_parts({name: parts_of(steps[name], rounds) for name in (OURS, THEIRS)})


if __name__ == "__main__":
    main()
