"""Where the members of a group sit: how many of them share each link tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster

Array = Any
"""A number or a numpy array of numbers; arrays are taken elementwise and broadcast."""


@dataclass(frozen=True, slots=True)
class Group:
    """Where the members of a group sit. Fields may be arrays.

    `within[t]` is how many members share one domain of tier t, innermost first: the mean over the domains
    that the most scattered group of this size and stride touches. The last entry is `ranks`.
    """

    ranks: Array
    within: tuple[Array, ...]

    @property
    def inner(self) -> Array:
        """Members that share the innermost tier."""
        return self.within[0] if self.within else self.ranks


def group_on(cluster: Cluster, size: Array, stride: Array) -> Group:
    """Placement of the groups of `size` ranks that stand `stride` apart, for ranks placed in order.

    Elementwise. Groups tile the ranks as `Layout.groups` does: block·(size·stride) + offset, offset < stride.
    With span L = (size − 1)·stride, a tier of T consecutive ranks and d = gcd(size·stride, T), the first
    member stands at most at T − d + min(stride, d) − 1 within its domain, so that the most scattered group
    touches 1 + ⌊(L + T − d + min(stride, d) − 1)/T⌋ domains, and never more than it has members.
    """
    within = []
    span = size * stride
    for position in range(len(cluster.links)):
        tier = cluster.tier_size(position)
        if tier >= cluster.num_gpus:
            within.append(size * 1.0)
            continue
        block = np.gcd(span, tier)
        last = span - stride + tier - block + np.minimum(stride, block) - 1
        within.append(size / np.minimum(1 + last // tier, size))
    return Group(size, tuple(within))
