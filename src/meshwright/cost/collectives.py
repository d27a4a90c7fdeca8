"""How long one collective takes on one group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.calibration import Basis
from meshwright.cluster import Cluster
from meshwright.cost.placement import Group
from meshwright.ir.graph import CollectiveKind
from meshwright.policy import Dispatcher

Array = Any


@dataclass(frozen=True, slots=True)
class TierRates:
    """What one link tier reaches: bytes per second and GPU, seconds per step."""

    ring_bytes_per_s: float
    exchange_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What the tiers of a cluster reach, innermost first; resolved once."""

    tiers: tuple[TierRates, ...]


_EXCHANGE = {"nvlink": 0.8, "efa": 0.35}


def link_rates(cluster: Cluster) -> LinkRates:
    """The rates of a cluster's links. A flat efficiency of the file replaces the curves."""
    flat = cluster.efficiency.bandwidth if cluster.efficiency else None
    return LinkRates(
        tuple(
            TierRates(
                link.bandwidth * (flat or 0.8),
                link.bandwidth * (flat or _EXCHANGE.get(link.kind, 0.7)),
                link.latency,
            )
            for link in cluster.links
        )
    )


def collective_seconds(
    rates: LinkRates,
    kind: CollectiveKind,
    payload_bytes: Array,
    group: Group,
    dispatcher: Dispatcher | None = None,
) -> Array:
    """Seconds of one collective, 0 for a group of one. Payload as CollectiveKind says; all may be arrays."""
    n = group.ranks
    below: Array = 1.0
    volume_s: Array = 0.0
    latency_s: Array = 0.0
    for tier, within in zip(rates.tiers, group.within, strict=True):
        crosses = within > below
        domains = within / below
        match kind:
            case CollectiveKind.ALL_TO_ALL:
                sent = payload_bytes * (within - below) / n
                volume_s = np.maximum(volume_s, sent / tier.exchange_bytes_per_s)
                latency_s = latency_s + crosses * tier.latency_s * (1 + 0.1 * (within - below))
            case CollectiveKind.SEND_RECV:
                volume_s = np.where(crosses, payload_bytes / tier.ring_bytes_per_s, volume_s)
                latency_s = np.where(crosses, tier.latency_s, latency_s)
            case _:
                passes = 2.0 if kind is CollectiveKind.ALL_REDUCE else 1.0
                moved = passes * crosses * payload_bytes * (n - 1) / (n * below)
                volume_s = np.maximum(volume_s, moved / tier.ring_bytes_per_s)
                steps = np.minimum(domains - 1, 2 * np.log2(np.maximum(domains, 1)))
                latency_s = latency_s + passes * steps * tier.latency_s
        below = within
    return np.where(n > 1, volume_s + latency_s, 0.0)[()]


def collective_basis(rates: LinkRates, kind: CollectiveKind, payload_bytes: int, group: Group) -> Basis:
    """Where the price of one collective comes from."""
    return "assumed"
