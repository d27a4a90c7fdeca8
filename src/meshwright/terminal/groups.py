"""The groups of a layout, and everything about one rank, as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.cluster import Cluster
from meshwright.groups import AXES_OF_VIEW, AxisGroups, RankFacts, SliceFacts, axis_groups
from meshwright.layout import Layout, View
from meshwright.plan import Plan
from meshwright.terminal import PLAIN_WIDTH, printable
from meshwright.terminal.cluster_map import show_cluster_map
from meshwright.terminal.ranges import progression, runs
from meshwright.units import BYTES_PER_S, format_count
from meshwright.verify import Finding

_EXAMPLES_LENGTH = 50


def show_groups(
    name: str,
    cluster: Cluster,
    layout: Layout,
    defaults: Mapping[str, str],
    findings: Sequence[Finding],
    console: Console,
) -> None:
    """Print both views of the ranks with their groups and links, a map of the cluster, and all defaults."""
    machine = f"{cluster.nodes} × {cluster.gpus_per_node} {printable(cluster.gpu.name)}"
    console.print(Text(f"{printable(name)}: {layout.world_size:,} ranks on {machine}", style="bold"))
    for view in AXES_OF_VIEW:
        console.print()
        console.print(_view_table(layout, cluster, view, console.width))
    console.print()
    show_cluster_map(layout, cluster, console)
    console.print()
    console.print(
        f"ep does not multiply the world: it re-names the tp·cp·dp = {layout.tp * layout.cp * layout.dp:,} "
        f"ranks of each stage as etp·ep·edp = {layout.etp}·{layout.ep}·{layout.edp}, "
        f"so each expert weight lies on edp = {layout.edp} of them."
    )
    show_notes(defaults, findings, console)


def show_notes(defaults: Mapping[str, str], findings: Sequence[Finding], console: Console) -> None:
    """Print every default that was used, and the warnings."""
    if defaults:
        console.print()
        grid = Table.grid(padding=(0, 2))
        grid.add_column()
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for position, (key, why) in enumerate(defaults.items()):
            grid.add_row("" if position else "defaults used", Text(key), Text(printable(why)))
        console.print(grid)
    for finding in findings:
        console.print(Text(f"{finding.level}: {printable(str(finding.raised()))}", style="yellow"))


def _view_table(layout: Layout, cluster: Cluster, view: View, width: int) -> Table:
    axes = AXES_OF_VIEW[view]
    product = f"{'·'.join(axes)} = {'·'.join(str(layout.size(axis)) for axis in axes)}"
    chunks = f", vpp = {layout.vpp}" if layout.vpp > 1 and view == "dense" else ""
    table = _table(f"{view} view: {product} = {layout.world_size:,}{chunks}")
    table.add_column("axis", style="bold")
    for heading in ("size", "groups", "stride"):
        table.add_column(heading, justify="right")
    rows = [axis_groups(layout, cluster, axis, view) for axis in axes]
    ranks = [_breakable(_examples(groups), width) for groups in rows]
    table.add_column("ranks", overflow="fold", min_width=_longest_word(ranks))
    table.add_column("link", overflow="fold")
    for groups, listed in zip(rows, ranks, strict=True):
        cells = (f"{groups.size:,}", f"{groups.count:,}", f"{groups.stride:,}")
        table.add_row(groups.axis, *cells, listed, _links(groups, cluster))
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )


def _examples(groups: AxisGroups) -> str:
    """The first two groups and the last; the second only where there is room for it."""
    indices = range(groups.count) if groups.count <= 3 else (0, 1, groups.count - 1)
    texts = [progression(groups.group(index)) for index in indices]
    if groups.count > 3:
        texts.insert(2, "…")
    if len(texts) > 2 and sum(map(len, texts)) > _EXAMPLES_LENGTH:
        texts[1:-1] = ["…"]
    return "   ".join(texts)


def _breakable(ranks: str, width: int) -> str:
    """Ranks that a narrow column breaks between numbers, never inside one."""
    return ranks if width >= PLAIN_WIDTH else ranks.replace(",", ", ")


def _longest_word(texts: Sequence[str]) -> int:
    return max(len(word) for text in texts for word in text.split())


def _links(groups: AxisGroups, cluster: Cluster) -> str:
    """Which tiers the groups need, with how many groups where they differ."""
    needed = [(position, number) for position, number in enumerate(groups.num_by_tier) if number]
    if not needed:
        return "–"
    if len(needed) == 1:
        return _tier_text(cluster, needed[0][0])
    return ", ".join(f"{number:,} on {_tier_text(cluster, position)}" for position, number in needed)


def _tier_text(cluster: Cluster, position: int) -> str:
    link = cluster.links[position]
    return f"{printable(link.name)} ({link.kind} {BYTES_PER_S.format(link.bandwidth)})"


def show_rank(plan: Plan, facts: RankFacts, findings: Sequence[Finding], console: Console) -> None:
    """Print where one rank stands, whom it speaks to, and what it holds."""
    layout = plan.layout
    where = f"node {facts.node}, GPU {facts.local_gpu} (all numbers count from 0)"
    title = f"{printable(plan.name)}: rank {facts.rank} of {layout.world_size:,}, {where}"
    console.print(Text(title, style="bold"))
    console.print()
    console.print(_peer_table(plan, facts, console.width))
    console.print()
    console.print(_holding_grid(plan, facts))
    console.print()
    console.print(_parameter_table(facts.slices))
    console.print()
    console.print(_zero_text(plan, facts))
    show_notes(plan.defaults, findings, console)


def _peer_table(plan: Plan, facts: RankFacts, width: int) -> Table:
    table = _table("its groups")
    table.add_column("view")
    table.add_column("axis", style="bold")
    table.add_column("size", justify="right")
    table.add_column("position", justify="right")
    ranks_of = {
        (view, axis): _breakable(progression(group), width) if len(group) > 1 else "alone"
        for view, groups in facts.groups.items()
        for axis, group in groups.items()
    }
    longest = _longest_word(list(ranks_of.values()))
    table.add_column("ranks of the group", overflow="fold", min_width=longest)
    table.add_column("link", overflow="fold")
    for view, axes in AXES_OF_VIEW.items():
        for axis in axes:
            group = facts.groups[view][axis]
            cells = (str(len(group)), str(facts.positions[view][axis]))
            link = _tier_text(plan.cluster, facts.tiers[view][axis]) if len(group) > 1 else "–"
            table.add_row(view if axis == axes[0] else "", axis, *cells, ranks_of[view, axis], link)
    return table


def _holding_grid(plan: Plan, facts: RankFacts) -> Table:
    model, layout = plan.model, plan.layout
    grid = Table.grid(padding=(0, 2))
    for chunk in facts.chunks:
        several = "s" * (len(chunk.layers) > 1)
        held = f"layer{several} {runs(chunk.layers)} of {model.num_hidden_layers}"
        held = f"embedding, {held}" if chunk.has_embedding else held
        held = f"{held}, final norm and head" if chunk.has_head else held
        label = "model" if layout.vpp == 1 else f"chunk {chunk.chunk}"
        grid.add_row(label, f"stage {chunk.stage} of {layout.num_stages}: {held}")
    heads = facts.heads
    copies = f", each on {heads.num_copies} ranks of tp" if heads.num_copies > 1 else ""
    query = f"query {runs(heads.query)} of {model.num_attention_heads}"
    key_value = f"key-value {runs(heads.key_value)} of {model.kv_heads}{copies}"
    grid.add_row("heads", f"{query}" if model.is_mla else f"{query}; {key_value}")
    if len(facts.experts):
        width = model.moe_intermediate_size or 0
        columns = f", columns {runs(facts.expert_columns)} of {width}" if layout.etp > 1 else ", whole"
        grid.add_row("experts", f"{runs(facts.experts)} of {model.num_experts}{columns}")
    elif model.is_moe:
        grid.add_row("experts", "none: no layer here has them")
    grid.add_row("batch", _batch_text(plan, facts))
    return grid


def _batch_text(plan: Plan, facts: RankFacts) -> str:
    batch, dp = plan.workload.global_batch_size, plan.layout.dp
    if facts.num_sequences is None:
        return f"{batch:,} sequences do not divide by dp = {dp}"
    share = f", 1/{plan.layout.cp} of the tokens of each" if plan.layout.cp > 1 else ""
    return f"{facts.num_sequences:,} of {batch:,} sequences a step{share}"


def _parameter_table(slices: Sequence[SliceFacts]) -> Table:
    table = _table("parameters, before ZeRO")
    table.add_column("name", overflow="fold")
    for heading in ("layers", "whole", "here"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("indices", overflow="fold")
    for held in slices:
        number = str(len(held.layers)) if held.layers else "–"
        whole, here = ("×".join(map(str, shape)) for shape in (held.shape, held.local_shape))
        table.add_row(held.name, number, whole, here, _indices(held))
    return table


def _indices(held: SliceFacts) -> str:
    pairs = zip(held.ranges, held.shape, strict=True)
    parts = [":" if (start, stop) == (0, size) else f"{start}:{stop}" for (start, stop), size in pairs]
    return "all" if set(parts) == {":"} else f"[{', '.join(parts)}]"


def _zero_text(plan: Plan, facts: RankFacts) -> str:
    layout, stage = plan.layout, plan.policy.zero_stage
    total = f"{format_count(facts.num_elements)} parameter elements here before ZeRO"
    if stage == 0:
        return f"{total}. ZeRO is off: the rank keeps the optimizer states of all of them."
    divided = (
        "optimizer states",
        "gradients and optimizer states",
        "parameters, gradients and optimizer states",
    )
    over = f"dense over dp·cp = {layout.size('dp_cp')}, experts over edp = {layout.edp}"
    share = format_count(facts.num_zero_elements)
    return (
        f"{total}. ZeRO {stage} divides their {divided[stage - 1]} ({over}), which leaves those of {share}."
    )
