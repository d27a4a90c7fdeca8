"""Training that is interrupted: how much of the time counts, and when to save.

One job, stopped by any of its GPUs. Failures come as a Poisson process at rate 1/M, M the mean time between
them, while the job runs and while it recovers. A save stops training for C seconds and can be restarted from
D ≥ C seconds after it began. After a failure the job recovers for R seconds and runs again from the last save
that was ready. With saves every τ seconds of training these make a renewal process, whose long-run shares
are exact:

    saves that count, per failure    N = e^(−(τ+D)/M) / (1 − e^(−(τ+C)/M))
    time, per failure                M·e^(R/M)       of which recovery M·(e^(R/M) − 1)
    effective training time          τ·N / (M·e^(R/M))

For D = C that is the complete cost function of J. T. Daly, A higher order estimate of the optimum checkpoint
interval for restart dumps, Future Generation Computer Systems 22 (2006) 303, turned around:
M·e^(R/M)·(e^((τ+C)/M) − 1) of run time for τ of training. Nodes that are kept spare stand in `spares`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files

from meshwright.errors import InputError
from meshwright.files import Noun, decode, parse_yaml
from meshwright.units import MAX_COUNT, Count, Number, Seconds, Share, parse_count, parse_number

HOUR_S = 3600.0
DAY_S = 86400.0
_MOST_EXPONENT = 700.0
_MOST_STEPS = MAX_COUNT // 4


class RatePreset(Noun):
    """An observed failure rate: so many failures of so many GPUs within a duration (seconds)."""

    title: str
    counts: str
    failures: Number
    num_gpus: Count
    duration: Seconds
    source: str
    date: str

    @property
    def failures_per_gpu_s(self) -> float:
        """Failures of one GPU in a second."""
        return self.failures / (self.num_gpus * self.duration)


class TypicalTime(Noun):
    """A duration (seconds) to start from."""

    value: Seconds
    source: str
    date: str


class TypicalShare(Noun):
    """A fraction to start from."""

    value: Share
    source: str
    date: str


class Typical(Noun):
    """Figures for whoever does not know their own yet.

    `recovery`: from a failure until training runs again; `repair`: until a faulty node is back; `replaced`:
    the share of failures that take a node out.
    """

    recovery: TypicalTime
    repair: TypicalTime
    replaced: TypicalShare


class FailureCatalogue(Noun):
    """Everything in failures.yaml."""

    rates: Mapping[str, RatePreset]
    typical: Typical


@cache
def failure_catalogue() -> FailureCatalogue:
    """The published failure rates and the typical figures, each with its source."""
    text = package_files("meshwright").joinpath("catalog/failures.yaml").read_text("utf-8")
    return decode(FailureCatalogue, parse_yaml(text, "failures.yaml"), "failures.yaml")


def preset_named(name: str) -> RatePreset:
    """A published failure rate. Raises InputError with the nearest names."""
    presets = failure_catalogue().rates
    if name not in presets:
        near = difflib.get_close_matches(name[:64], presets, n=3, cutoff=0.4) or list(presets)
        raise InputError("preset", name, "no failure rate of the catalogue has this name", near)
    return presets[name]


@dataclass(frozen=True, slots=True)
class FailureRate:
    """How often a job on `num_gpus` GPUs fails: every `mtbf_s` seconds on average, infinity for never."""

    num_gpus: int
    mtbf_s: float
    source: str

    def __post_init__(self) -> None:
        parse_count(self.num_gpus, "num_gpus")
        _mean_time(self.mtbf_s)

    @property
    def failures_per_day(self) -> float:
        """Failures of the job in a day."""
        return DAY_S / self.mtbf_s


def failure_rate(
    num_gpus: int,
    *,
    per_gpu_hour: float | None = None,
    mtbf_s: float | None = None,
    preset: str | None = None,
) -> FailureRate:
    """The failure rate of a job, from exactly one of three.

    Failures per GPU and hour, of which any stops the job: M = 1 / (rate · GPUs), as for parts in series;
    M of the whole job; or a published rate by name. Raises InputError for none or several of them, for a
    negative rate, and for M that is not positive.
    """
    gpus = parse_count(num_gpus, "num_gpus")
    given = {"per_gpu_hour": per_gpu_hour, "mtbf_s": mtbf_s, "preset": preset}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InputError("failure rate", names or "none", "exactly one of them is given", list(given))
    if mtbf_s is not None:
        return FailureRate(gpus, _mean_time(mtbf_s), "given")
    if preset is not None:
        entry = preset_named(preset)
        return FailureRate(gpus, 1 / (entry.failures_per_gpu_s * gpus), f"{preset}: {entry.source}")
    rate = not_negative("per_gpu_hour", per_gpu_hour)
    return FailureRate(gpus, HOUR_S / (rate * gpus) if rate else math.inf, "given")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One save: training stands still for `stall_s`; `ready_s` after its start a restart can use it."""

    stall_s: float
    ready_s: float

    def __post_init__(self) -> None:
        stall = not_negative("stall_s", self.stall_s)
        if not_negative("ready_s", self.ready_s) < stall:
            raise InputError("ready_s", self.ready_s, "a save ends after training's stall", [stall])


def checkpoint_of(
    *,
    stall_s: float | None = None,
    size_bytes: float | None = None,
    bandwidth_bytes_per_s: float | None = None,
) -> Checkpoint:
    """What a save costs: how long training stands still, or what is written and how fast in all, or both.

    Size and bandwidth alone: training stands still while it is written. With `stall_s` too, the rest is
    written beside training. Raises InputError for neither, for one of size and bandwidth alone, and for
    figures that cannot be.
    """
    if (size_bytes is None) != (bandwidth_bytes_per_s is None):
        key = "size_bytes" if size_bytes is None else "bandwidth_bytes_per_s"
        raise InputError(key, "missing", "size and bandwidth of a checkpoint are given together")
    stall = None if stall_s is None else not_negative("stall_s", stall_s)
    if size_bytes is None or bandwidth_bytes_per_s is None:
        if stall is None:
            near = ["stall_s", "size_bytes and bandwidth_bytes_per_s"]
            raise InputError("checkpoint", "no cost", "its stall or its size and bandwidth is needed", near)
        return Checkpoint(stall, stall)
    write_s = not_negative("size_bytes", size_bytes) / positive(
        "bandwidth_bytes_per_s", bandwidth_bytes_per_s
    )
    return Checkpoint(write_s, write_s) if stall is None else Checkpoint(stall, max(stall, write_s))


@dataclass(frozen=True, slots=True)
class Recovery:
    """From a failure until training runs again: to notice it, to start processes anew, to load the save."""

    detect_s: float = 0.0
    restart_s: float = 0.0
    load_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("detect_s", "restart_s", "load_s"):
            not_negative(name, getattr(self, name))

    @property
    def total_s(self) -> float:
        """R of the formulas."""
        return self.detect_s + self.restart_s + self.load_s


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where the time goes with a save every `interval_steps` steps (None: never), as shares that add to 1.

    `effective_fraction`: steps that count, the effective training-time ratio. `saving_fraction`: saves that
    count. `lost_fraction`: what is thrown away because no ready save holds it. `recovery_fraction`: recovery.
    `lost_work_s`: seconds of running that one failure throws away, on average.
    """

    interval_steps: int | None
    interval_s: float
    effective_fraction: float
    saving_fraction: float
    lost_fraction: float
    recovery_fraction: float
    lost_work_s: float


def goodput(
    rate: FailureRate, checkpoint: Checkpoint, recovery: Recovery, step_s: float, interval_steps: int | None
) -> Goodput:
    """Long-run shares of time with a save every `interval_steps` steps of `step_s` seconds.

    The formulas stand at the top of this module. Raises InputError for an interval in which a save is not
    written before the next begins, and for none (None) where there are failures: nothing would ever count.
    """
    step = positive("step_s", step_s)
    if interval_steps is None:
        if rate.mtbf_s < math.inf:
            raise InputError("interval_steps", None, "where there are failures, saves are needed", [1])
        return Goodput(None, math.inf, 1.0, 0.0, 0.0, 0.0, math.inf)
    steps = parse_count(interval_steps, "interval_steps")
    fewest = fewest_steps(checkpoint, step)
    if steps < fewest:
        rule = "a save is written before the next one begins"
        raise InputError("interval_steps", steps, rule, [fewest])
    tau, period = steps * step, steps * step + checkpoint.stall_s
    if rate.mtbf_s == math.inf:
        lost_s = tau + checkpoint.ready_s - period / 2
        return Goodput(steps, tau, tau / period, checkpoint.stall_s / period, 0.0, 0.0, lost_s)
    mtbf = rate.mtbf_s
    saves = _saves_per_failure(tau, checkpoint, mtbf)
    running = math.exp(-recovery.total_s / mtbf)
    effective, saving = (running * saves * part / mtbf for part in (tau, checkpoint.stall_s))
    lost_s = max(0.0, mtbf - period * saves)
    return Goodput(steps, tau, effective, saving, running * lost_s / mtbf, 1 - running, lost_s)


def _saves_per_failure(tau_s: float, checkpoint: Checkpoint, mtbf_s: float) -> float:
    """N of the formulas: the chance that the k-th save is ready before a failure, summed over k."""
    period = (tau_s + checkpoint.stall_s) / mtbf_s
    first = (tau_s + checkpoint.ready_s) / mtbf_s
    return 0.0 if first > _MOST_EXPONENT else math.exp(-first) / -math.expm1(-period)


def fewest_steps(checkpoint: Checkpoint, step_s: float) -> int:
    """The shortest interval, in steps, in which a save is written before the next one begins."""
    behind = (checkpoint.ready_s - checkpoint.stall_s) / positive("step_s", step_s)
    return max(1, math.ceil(behind * (1 - 1e-12)))


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """√(2·C·M): the first-order best time between saves.

    J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM 17
    (1974) 530. Good while C is much smaller than M.
    """
    stall, mtbf = not_negative("stall_s", stall_s), _mean_time(mtbf_s)
    return math.sqrt(2 * stall) * math.sqrt(mtbf) if stall else 0.0


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """√(2·C·M)·(1 + ⅓·√(C/2M) + ⅑·C/2M) − C for C < 2M, else M: the best training time between saves.

    Daly 2006 (see the module), the closing formula. Run time is within 0.01 % of the least while C < M/2.
    """
    young = young_interval_s(stall_s, mtbf_s)
    if young in (0, math.inf):
        return young
    stall, mtbf = float(stall_s), float(mtbf_s)
    if stall >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(stall / (2 * mtbf))
    return young * (1 + ratio / 3 + ratio**2 / 9) - stall


def exact_interval_s(stall_s: float, mtbf_s: float) -> float:
    """The τ at which effective training time peaks: 1 − τ/M = e^(−(τ+C)/M).

    It is M·(1 + W(−e^(−1−C/M))) with Lambert's W, by setting the derivative of the module's formula to 0;
    here by halving. When a save is ready, and how long recovery takes, do not move it.
    """
    young = young_interval_s(stall_s, mtbf_s)
    if young in (0, math.inf):
        return young
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        early = -math.expm1(-(middle + stall_s / mtbf_s)) > middle
        low, high = (middle, high) if early else (low, middle)
    return low * mtbf_s


def best_interval_steps(rate: FailureRate, checkpoint: Checkpoint, step_s: float) -> int | None:
    """The whole number of steps between saves with the most effective training time; None: never save.

    Effective training time has one peak in the interval, so it is one of the two numbers around the exact
    optimum, or the fewest that saves allow.
    """
    fewest = fewest_steps(checkpoint, step_s)
    exact = exact_interval_s(checkpoint.stall_s, rate.mtbf_s)
    if exact == math.inf:
        return None
    below = max(fewest, min(math.floor(exact / step_s), _MOST_STEPS))
    near = [goodput(rate, checkpoint, Recovery(), step_s, steps) for steps in (below, below + 1)]
    return max(near, key=lambda found: found.effective_fraction).interval_steps


@dataclass(frozen=True, slots=True)
class Reliability:
    """What failures cost a job. `young` and `daly` are (seconds, whole steps); steps are None for never.

    `chosen` has the interval that was asked for, else the best; `half` and `double` lie around it: where the
    three differ little, the interval does not need to be exact.
    """

    rate: FailureRate
    checkpoint: Checkpoint
    recovery: Recovery
    step_s: float
    young: tuple[float, int | None]
    daly: tuple[float, int | None]
    best: Goodput
    chosen: Goodput
    half: Goodput
    double: Goodput


def reliability(
    rate: FailureRate,
    checkpoint: Checkpoint,
    recovery: Recovery,
    step_s: float,
    interval_steps: int | None = None,
) -> Reliability:
    """Effective training time at the best interval or a given one, at half and at double of it."""
    fewest = fewest_steps(checkpoint, step_s)

    def in_steps(interval_s: float) -> tuple[float, int | None]:
        return interval_s, None if interval_s == math.inf else max(fewest, round(interval_s / step_s))

    def at(steps: int | None) -> Goodput:
        return goodput(rate, checkpoint, recovery, step_s, steps)

    best = best_interval_steps(rate, checkpoint, step_s)
    chosen = best if interval_steps is None else interval_steps
    return Reliability(
        rate=rate,
        checkpoint=checkpoint,
        recovery=recovery,
        step_s=step_s,
        young=in_steps(young_interval_s(checkpoint.stall_s, rate.mtbf_s)),
        daly=in_steps(daly_interval_s(checkpoint.stall_s, rate.mtbf_s)),
        best=at(best),
        chosen=at(chosen),
        half=at(None if chosen is None else max(fewest, chosen // 2)),
        double=at(None if chosen is None else 2 * chosen),
    )


def _mean_time(mtbf_s: object) -> float:
    """M of the formulas: above 0, and infinite where nothing fails."""
    return math.inf if mtbf_s == math.inf else positive("mtbf_s", mtbf_s)


def not_negative(key: str, value: object) -> float:
    """The number, which is 0 or more. Raises InputError."""
    number = parse_number(value, key)
    if number < 0:
        raise InputError(key, value, "not below 0", [0])
    return number


def positive(key: str, value: object) -> float:
    """The number, which is above 0. Raises InputError."""
    number = parse_number(value, key)
    if number <= 0:
        raise InputError(key, value, "above 0")
    return number
