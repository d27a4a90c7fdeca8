"""The checks of a dry run: what ranks were seen to hold and do, against the layout and the graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from meshwright.cost.rank import CONTEXT, SLACK
from meshwright.dryrun.expected import Expected
from meshwright.dryrun.matching import mismatches, stuck
from meshwright.ir.observed import Conduct, Observed, Ranges, StageFacts
from meshwright.ir.program import StageProgram
from meshwright.units import BYTES

MEMORY_LIMIT = 0.05
"""By which fraction a peak may differ from the memory model."""
MOST_EVENTS = 4_000_000
"""Events of all ranks together that are run to the end; beyond, groups are compared alone."""
Passed = tuple[str, tuple[int, ...]]
"""What stages pass to one another: element type and shape."""
NOTHING: Passed = ("", ())
NO_STEP = "no whole step ran to its end"


@dataclass(frozen=True)
class Check:
    """Whether something holds, None where it was not run. `worst`: the largest deviation, a fraction or a
    count as `unit` says; `why`: where it is, or why nothing was run, in words."""

    name: str
    holds: bool | None
    worst: float
    unit: str
    why: str = ""

    def document(self) -> dict[str, object]:
        """As JSON."""
        return {
            "name": self.name,
            "holds": self.holds,
            "worst": self.worst,
            "unit": self.unit,
            "why": self.why,
        }


def not_run(name: str, unit: str, why: str) -> Check:
    """A check that neither holds nor fails."""
    return Check(name, None, 0, unit, why)


def counted(name: str, unit: str, found: Iterable[str], unseen: str = "") -> Check:
    """A check that holds where nothing was found. `unseen`: why nothing was looked at, if so."""
    if unseen:
        return not_run(name, unit, unseen)
    words = list(found)
    more = f" (and {len(words) - 1} more)" if len(words) > 1 else ""
    return Check(name, not words, len(words), unit, words[0] + more if words else "")


def checks_of_all(expected: Expected, probes: Sequence[Observed]) -> Iterator[Check]:
    """Checks of what every rank declares and of its short step. `probes` by rank."""
    yield counted("build", "ranks", _failures(probes))
    built = [seen for seen in probes if not seen.conduct.failed]
    yield counted("groups", "ranks", _wrong_groups(expected, probes))
    none = "" if built else "no rank was built"
    yield counted("stages", "ranks", _wrong_stages(expected, built), none)
    yield parameters_check(expected, built)
    yield counted("element types", "ranks", _wrong_elements(expected, built), none)
    missing = "" if len(built) == len(probes) else "not every rank was built"
    yield counted("slices", "parameters", _wrong_slices(expected, built), missing)
    found = mismatches(expected.groups, [seen.conduct for seen in probes])
    yield counted("matching", "groups", found, none)


def checks_of_steps(
    expected: Expected, steps: Sequence[Observed], conducts: Sequence[Conduct] | None
) -> Iterator[Check]:
    """Checks of whole steps. `conducts`: every rank's in a whole step, where all are known."""
    yield counted("step", "ranks", _failures(steps))
    run = [seen for seen in steps if not seen.conduct.failed]
    yield flops_check(expected, run)
    yield collectives_check(expected, run)
    yield order_check(expected, run)
    unknown = "the steps of some ranks alone were run" if conducts is None else ""
    found = mismatches(expected.groups, conducts or ())
    yield counted("matching of steps", "groups", found, unknown or ("" if run else NO_STEP))
    yield not_run("progress", "ranks", unknown) if conducts is None else _progress(expected, conducts)
    yield memory_check(expected, run)
    yield fits_check(expected, run)


def _failures(observed: Sequence[Observed]) -> Iterator[str]:
    for seen in observed:
        if seen.conduct.failed:
            yield f"rank {seen.facts.rank}: {seen.conduct.failed}"


def _wrong_groups(expected: Expected, probes: Sequence[Observed]) -> Iterator[str]:
    own: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for axis, groups in expected.groups.items():
        for group in groups:
            for rank in group:
                own[rank][axis] = group
    for seen in probes:
        said, rank = own[seen.facts.rank], seen.facts.rank
        for axis in said.keys() | seen.facts.groups.keys():
            did = seen.facts.groups.get(axis)
            if did != said.get(axis):
                words = f"rank {rank} speaks along {axis} with {_shown(did)}, "
                yield words + f"where the layout has {_shown(said.get(axis))}"
                break


def _shown(group: tuple[int, ...] | None) -> str:
    if group is None:
        return "nobody"
    return f"ranks {', '.join(map(str, group[:8]))}{', …' if len(group) > 8 else ''}"


def _wrong_stages(expected: Expected, built: Sequence[Observed]) -> Iterator[str]:
    plan = expected.plan
    tokens = plan.workload.max_sequence_length
    divided = plan.layout.tp if plan.policy.sequence_parallel else 1
    shape = (tokens // divided, plan.policy.micro_batch_size, plan.model.hidden_size)
    between: Passed = plan.workload.precision, shape
    last = plan.layout.num_stages - 1
    for seen in built:
        rank = seen.facts.rank
        said = expected.program.stages_of(expected.pp_rank(rank))
        did = {stage.index: stage for stage in seen.conduct.stages}
        for stage in said:
            one = did.get(stage.index)
            if one is None or len(did) != len(said):
                yield f"rank {rank} holds stages {sorted(did)}, not {[s.index for s in said]}"
                break
            words = _stage_words(one, stage, between, last)
            if words:
                yield f"rank {rank}, stage {stage.index}: {words}"
                break


def _stage_words(one: StageFacts, stage: StageProgram, between: Passed, last: int) -> str:
    """How a stage is built otherwise than the graph says; nothing where it is not."""
    if one.layers != stage.layers:
        return f"layers {_run(one.layers)}, not {_run(stage.layers)}"
    ends = (
        ("the embedding", one.has_embedding, stage.has_embedding),
        ("a head", one.has_head, stage.has_head),
    )
    for what, did, said in ends:
        if did != said:
            return f"has {what}" if did else f"has no {what.split()[-1]}"
    passed = (
        ("takes", one.takes, between if stage.index else NOTHING),
        ("gives", one.gives, between if stage.index < last else NOTHING),
    )
    for verb, did_pass, said_pass in passed:
        if did_pass != said_pass:
            return f"{verb} {_passed(did_pass)}, not {_passed(said_pass)}"
    return ""


def _passed(what: Passed) -> str:
    return f"{what[0]} {what[1]}" if what[1] else "nothing"


def _run(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}–{layers[-1]}" if layers else "none"


def parameters_check(expected: Expected, built: Sequence[Observed]) -> Check:
    """Names, shapes and bytes; the deviation is that of a rank's bytes."""
    if not built:
        return not_run("parameters", "fraction of bytes", "no rank was built")
    worst, why = 0.0, ""
    for seen in built:
        said = expected.shapes(expected.pp_rank(seen.facts.rank))
        words = _wrong_shapes(said, seen.conduct)
        bytes_said = expected.parameter_bytes(seen.facts.rank)
        off = abs(seen.conduct.parameter_bytes - bytes_said) / bytes_said if bytes_said else 0.0
        if off and not words:
            words = f"{seen.conduct.parameter_bytes:,} B, not {bytes_said:,} B"
        why = why or (f"rank {seen.facts.rank}: {words}" if words else "")
        worst = max(worst, off)
    return Check("parameters", not why, worst, "fraction of bytes", why)


def _wrong_shapes(said: Mapping[str, tuple[int, ...]], conduct: Conduct) -> str:
    """The first parameter that is missing, surplus or of another shape, in words."""
    did = {held.name: held.shape for held in conduct.parameters}
    if did == said:
        return ""
    words = [f"no {name}" for name in said.keys() - did.keys()]
    words += [f"{name} too many" for name in did.keys() - said.keys()]
    words += [f"{n} is {did[n]}, not {shape}" for n, shape in said.items() if n in did and did[n] != shape]
    return words[0]


def _distinct(
    expected: Expected, built: Sequence[Observed]
) -> Iterator[tuple[tuple[int, Conduct], Observed]]:
    """One rank of each conduct and pipeline rank."""
    seen_already = set()
    for seen in built:
        key = expected.pp_rank(seen.facts.rank), id(seen.conduct)
        if key not in seen_already:
            seen_already.add(key)
            yield (key[0], seen.conduct), seen


def _wrong_elements(expected: Expected, built: Sequence[Observed]) -> Iterator[str]:
    for _, seen in _distinct(expected, built):
        for held in seen.conduct.parameters:
            if held.name in expected.degrees and held.element != expected.element(held.name):
                said = expected.element(held.name)
                yield f"rank {seen.facts.rank} holds {held.name} in {held.element}, not {said}"
                break


def _wrong_slices(expected: Expected, built: Sequence[Observed]) -> Iterator[str]:
    """The distinct slices of a parameter cover it once, and each is held by as many ranks."""
    held: dict[str, Counter[Ranges]] = defaultdict(Counter)
    ranks: dict[tuple[str, Ranges], int] = {}
    for seen in built:
        for name, ranges in seen.facts.slices.items():
            held[name][ranges] += 1
            ranks.setdefault((name, ranges), seen.facts.rank)
    whole = {param.name: param.shape for stage in expected.program.stages for param in stage.params}
    for name, slices in held.items():
        covered = sum(prod(stop - start for start, stop in ranges) for ranges in slices)
        if name not in whole:
            continue
        if covered != prod(whole[name]):
            rare = min(slices, key=lambda one: slices[one])
            words = f"the ranks' slices of {name} cover {covered:,} of {prod(whole[name]):,} elements"
            yield f"{words}; rank {ranks[name, rare]} holds {_ranges(rare)}"
        elif len(set(slices.values())) > 1:
            rare = min(slices, key=lambda one: slices[one])
            yield f"{slices[rare]} ranks hold {name} {_ranges(rare)}, among them rank {ranks[name, rare]}"


def _ranges(ranges: Ranges) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in ranges) + "]"


def flops_check(expected: Expected, run: Sequence[Observed]) -> Check:
    """FLOPs of each kind against the graph's."""
    if not run:
        return not_run("flops", "fraction", NO_STEP)
    worst, why = 0.0, ""
    for (pp_rank, conduct), seen in _distinct(expected, run):
        said, did = expected.work(pp_rank), conduct.work
        for kind in (
            ("matmul", "grouped_matmul", "attention") if expected.is_even else ("matmul", "attention")
        ):
            one, other = getattr(did, kind), getattr(said, kind)
            off = abs(one - other) / other if other else float(one > 0)
            if off > worst:
                worst, why = off, f"rank {seen.facts.rank}: {one:,} FLOPs of {kind}, the graph has {other:,}"
    return Check("flops", worst == 0, worst, "fraction", why)


def collectives_check(expected: Expected, run: Sequence[Observed]) -> Check:
    """Kinds, axes, counts and bytes of a step's collectives against the graph's."""
    return counted("collectives", "calls", _wrong_calls(expected, run), "" if run else NO_STEP)


def _wrong_calls(expected: Expected, run: Sequence[Observed]) -> Iterator[str]:
    for (pp_rank, conduct), seen in _distinct(expected, run):
        said, did = expected.calls(pp_rank), _as_the_graph_names(conduct)
        for what, more in (("missing", said - did), ("surplus", did - said)):
            for (kind, axis, size), count in sorted(more.items()):
                if axis in ("ep", "etp") and not expected.is_even:
                    continue
                yield f"rank {seen.facts.rank}: {what} {count} × {kind} along {axis} of {size:,} B"


def _as_the_graph_names(conduct: Conduct) -> Counter[tuple[str, str, int]]:
    """The graph counts sums over copies of heads to tp."""
    found: Counter[tuple[str, str, int]] = Counter()
    for (kind, axis, size), count in conduct.counted().items():
        found[kind, "tp" if axis == "kv_copies" else axis, size] += count
    return found


def order_check(expected: Expected, run: Sequence[Observed]) -> Check:
    """The pipeline's actions against the schedule's."""
    return counted("order", "ranks", _wrong_order(expected, run), "" if run else NO_STEP)


def _wrong_order(expected: Expected, run: Sequence[Observed]) -> Iterator[str]:
    for (pp_rank, conduct), seen in _distinct(expected, run):
        said, did = expected.order(pp_rank), conduct.order
        if said != did:
            pairs = enumerate(zip(said, did, strict=False))
            place = next((n for n, (one, other) in pairs if one != other), min(len(said), len(did)))
            one = did[place] if place < len(did) else "the end"
            other = said[place] if place < len(said) else "the end"
            yield f"rank {seen.facts.rank}, action {place + 1}: {one}, the schedule has {other}"


def _progress(expected: Expected, conducts: Sequence[Conduct]) -> Check:
    if failed := sum(1 for conduct in conducts if conduct.failed):
        return Check("progress", False, failed, "ranks", "ranks that fail leave the others waiting")
    if sum(len(conduct.events) for conduct in conducts) > MOST_EVENTS:
        why = f"more than {MOST_EVENTS:,} events; the members of each group were compared"
        return not_run("progress", "ranks", why)
    found = stuck(expected.groups, conducts)
    if found is None:
        return Check("progress", True, 0, "ranks")
    return Check("progress", False, len(found.ranks), "ranks", found.words)


def memory_check(expected: Expected, run: Sequence[Observed]) -> Check:
    """Each rank's peak against what tensors hold by the memory model."""
    if not run:
        return not_run("memory", "fraction", NO_STEP)
    worst, why = 0.0, ""
    for seen in run:
        if seen.peak is None:
            continue
        said = expected.memory[expected.pp_rank(seen.facts.rank)].allocated_bytes
        off = abs(said - seen.peak.bytes) / seen.peak.bytes
        if off >= worst:
            peak, other = BYTES.format(seen.peak.bytes), BYTES.format(said)
            worst, why = off, f"rank {seen.facts.rank} peaks at {peak}, the model says {other}"
    return Check("memory", worst <= MEMORY_LIMIT, worst, "fraction", why)


def fits_check(expected: Expected, run: Sequence[Observed]) -> Check:
    """Whether the fullest rank fits in a GPU's memory, with the context and the slack of the memory model on
    top of its tensors."""
    needs = []
    for seen in run:
        if seen.peak is not None:
            model = expected.memory[expected.pp_rank(seen.facts.rank)]
            needs.append((seen.peak.bytes + model.line(CONTEXT) + model.line(SLACK), seen.facts.rank))
    if not needs:
        return not_run("fits", "fraction of memory", NO_STEP)
    room = expected.plan.cluster.gpu.memory
    needed, rank = max(needs, key=lambda one: one[0])
    words = f"{BYTES.format(needed)} with context and slack, of {BYTES.format(room)}"
    return Check("fits", needed <= room, needed / room, "fraction of memory", f"rank {rank} needs {words}")
