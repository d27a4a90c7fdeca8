"""Nodes kept spare: how many, so that a job which loses one goes on with another.

A failed node is under repair for a time T, and a spare takes its place. With s spares the job runs as long
as at most s nodes are under repair; with s + 1 it waits. While it waits nothing fails, so nodes under repair
follow A. K. Erlang's loss system with s + 1 places and an offered load of a = T/M nodes, M the mean time
between failures that take a node out (A. K. Erlang, Solution of some problems in the theory of probabilities
of significance in automatic telephone exchanges, 1917). Of T only the mean matters (B. A. Sevast'yanov, An
ergodic theorem for Markov processes and its application to telephone systems with refusals, Theory of
Probability and its Applications 2 (1957) 104). With B(s, a) = (a^s/s!) / Σ a^k/k!, k = 0 … s:

    failures that find no spare     B(s, a)
    time that the job waits         B(s + 1, a)
    mean of one wait                T/(s + 1)

Spares do not fail while they wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.errors import InputError
from meshwright.simulator.failures import FailureRate, not_negative
from meshwright.units import parse_count, parse_count_or_zero, parse_number


@dataclass(frozen=True, slots=True)
class Shortage:
    """What goes wrong with `num_spares` spare nodes.

    `short_fraction`: failures that find no spare; `waiting_fraction`: time that the job waits for a repair,
    by which effective training time is to be multiplied as 1 − waiting; `wait_s`: mean of one such wait.
    """

    num_spares: int
    short_fraction: float
    waiting_fraction: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Spares:
    """The fewest spares with a replacement at hand at `probability_fraction` of failures, and none at all.

    `in_repair_nodes`: nodes under repair on average, were there always a spare.
    """

    num_nodes: int
    probability_fraction: float
    repair_s: float
    in_repair_nodes: float
    enough: Shortage
    none: Shortage


def erlang_b(num_servers: int, offered_load: float) -> float:
    """B(s, a) by its recursion B(s) = a·B(s−1) / (s + a·B(s−1)), B(0) = 1; 0 where nothing is offered."""
    load = not_negative("offered_load", offered_load)
    blocked = 1.0 if load else 0.0
    for servers in range(1, parse_count_or_zero(num_servers, "num_servers") + 1):
        blocked = load * blocked / (servers + load * blocked)
        if not blocked:
            break
    return blocked


def shortage(
    rate: FailureRate, repair_s: float, num_spares: int, *, replaced_fraction: float = 1.0
) -> Shortage:
    """What goes wrong with a given number of spare nodes; the formulas stand at the top of this module.

    `replaced_fraction` of failures take a node out: the others are over with a restart.
    """
    spares = parse_count_or_zero(num_spares, "num_spares")
    load = _in_repair(rate, repair_s, replaced_fraction)
    return Shortage(spares, erlang_b(spares, load), erlang_b(spares + 1, load), repair_s / (spares + 1))


def spare_nodes(
    rate: FailureRate,
    repair_s: float,
    *,
    gpus_per_node: int = 8,
    probability_fraction: float = 0.99,
    replaced_fraction: float = 1.0,
) -> Spares:
    """The fewest spare nodes with B(s, a) ≤ 1 − probability, and what goes wrong with them and without.

    Raises InputError for a probability that is not between 0 and 1, and for a repair that takes so long that
    more nodes would be out than the job has: no number of spares mends that.
    """
    probability = parse_number(probability_fraction, "probability_fraction")
    if not 0 < probability < 1:
        raise InputError("probability_fraction", probability_fraction, "between 0 and 1, exclusive", [0.99])
    num_nodes = math.ceil(rate.num_gpus / parse_count(gpus_per_node, "gpus_per_node"))
    load = _in_repair(rate, repair_s, replaced_fraction)
    if load > num_nodes:
        rule = (
            f"with one failure in {rate.mtbf_s:,.0f} s, more nodes would be out than the job's {num_nodes:,}"
        )
        longest = rate.mtbf_s / replaced_fraction * num_nodes
        raise InputError("repair_s", repair_s, rule, [f"{longest:.4g}"])
    spares, short = 0, erlang_b(0, load)
    while short > 1 - probability:
        spares += 1
        short = load * short / (spares + load * short)
    enough, none = (
        shortage(rate, repair_s, count, replaced_fraction=replaced_fraction) for count in (spares, 0)
    )
    return Spares(num_nodes, probability, repair_s, load, enough, none)


def _in_repair(rate: FailureRate, repair_s: float, replaced_fraction: float) -> float:
    """a of the formulas, which is how many nodes are out on average if no failure waits."""
    share = parse_number(replaced_fraction, "replaced_fraction")
    if not 0 <= share <= 1:
        raise InputError("replaced_fraction", replaced_fraction, "a share of failures, 0 to 1", [0, 1])
    return share * not_negative("repair_s", repair_s) / rate.mtbf_s
