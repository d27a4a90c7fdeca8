"""The fit finds constants that it is shown, holds whole recipes back, and stays where values make sense."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import log

import numpy as np
import pytest
from tests.validate import synthetic
from tests.validate.run_rows import EXPERTS, row_of

from meshwright.cost.constants import Constants, constants
from meshwright.errors import InputError
from meshwright.files import parse_yaml
from meshwright.planner.interval import Residual, residuals
from meshwright.validate import fit as fitting
from meshwright.validate.answer import Priced, Table
from meshwright.validate.fit import FOLDS, STARTS, Fitted, cross_validated, fit, folds, is_share
from meshwright.validate.predict import error_of, log_time, prepare, simulated, simulated_times
from meshwright.validate.refit import Refit, constants_text, half_width, refit, residuals_text


@pytest.fixture(scope="module")
def whole() -> Iterator[Fitted]:
    """A fit that the starting values hardly pull: thirty rows say less than hundreds against it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "PULL", 0.001)
        yield fit(synthetic.measured(), constants())


@pytest.fixture(scope="module")
def refitted() -> Refit:
    priced = tuple(Priced(prepared, None) for prepared in synthetic.measured())
    return refit(Table("synthetic.csv", priced, ()), constants())


def test_constants_behind_measurements_are_found_again(whole: Fitted) -> None:
    for name, value in synthetic.TRUTH.items():
        assert STARTS[name][0] != pytest.approx(value, rel=0.1), f"{name} starts where it should end"
        assert whole.values[name] == pytest.approx(value, rel=0.05), name


def test_what_is_fitted_explains_the_measurements(whole: Fitted) -> None:
    def worst(values: Constants) -> float:
        return max(abs(float(error_of(row, values)[0])) for row in synthetic.measured())

    start = constants().changed({name: value for name, (value, _) in STARTS.items()})
    assert worst(start) > 0.2
    assert worst(constants().changed(whole.values)) < 0.03


def test_derivatives_are_those_of_single_changes(whole: Fitted) -> None:
    """All points of a step go through the model at once; one at a time gives the same."""
    rows = synthetic.measured()[:4]
    for name in ("slowdown.hopper", "network", "hidden.data"):
        low, high = whole.values[name] * 0.999, min(whole.values[name] * 1.001, 0.999999)
        if not is_share(name):
            high = whole.values[name] * 1.001
        for index, row in enumerate(rows):
            errors = [
                float(error_of(row, constants().changed({**whole.values, name: v}))[0]) for v in (low, high)
            ]
            scale = (
                np.log(high / (1 - high)) - np.log(low / (1 - low)) if is_share(name) else np.log(high / low)
            )
            slope = (errors[1] - errors[0]) / scale
            assert whole.jacobian[index, list(STARTS).index(name)] == pytest.approx(slope, abs=0.03), name


def test_a_fit_stays_where_values_make_sense() -> None:
    """Measurements a hundred times too long or too short bend no share beyond 0 to 1, and no sign."""
    for factor in (100.0, 0.01):
        absurd = [
            replace(row, run=replace(row.run, measured_s=factor * (row.run.measured_s or 0.0)))
            for row in synthetic.measured()[::3]
        ]
        values = fit(absurd, constants(), iterations=8).values
        assert set(values) == set(STARTS)
        for name, value in values.items():
            assert np.isfinite(value)
            assert value > 0, name
            assert not is_share(name) or value < 1, name


def test_folds_never_split_a_recipe() -> None:
    rows = synthetic.measured()
    parts = folds(rows)
    assert sorted(index for part in parts for index in part) == list(range(len(rows)))
    homes: dict[str, set[int]] = {}
    for number, part in enumerate(parts):
        for index in part:
            homes.setdefault(rows[index].run.recipe, set()).add(number)
    assert len(homes) > 5
    assert all(len(numbers) == 1 for numbers in homes.values())


def test_a_fold_is_fitted_without_its_rows(whole: Fitted) -> None:
    """Whatever the rows of a fold measured, its constants are the same; those of the other folds are not."""
    rows = synthetic.measured()
    odd = rows[8].run.recipe
    spoiled = [
        replace(row, run=replace(row.run, measured_s=2 * (row.run.measured_s or 0.0)))
        if row.run.recipe == odd
        else row
        for row in rows
    ]
    plain, found = (cross_validated(own, constants(), whole) for own in (rows, spoiled))
    assert len(found) == min(FOLDS, len({row.run.recipe for row in rows}))
    for before, after in zip(plain, found, strict=True):
        assert before.rows == after.rows
        assert (before.values == after.values) is (8 in after.rows)
        values = constants().changed(after.values)
        for index, error in zip(after.rows, after.errors, strict=True):
            assert error == pytest.approx(float(error_of(spoiled[index], values)[0]), abs=1e-9)


def test_files_of_a_fit_are_read_back(refitted: Refit) -> None:
    values = refitted.constants()
    assert Constants.model_validate(parse_yaml(constants_text(values), "constants.yaml")) == values
    widths = {
        name: Residual.model_validate(entry)
        for name, entry in parse_yaml(residuals_text(refitted.residuals()), "residuals.yaml").items()
    }
    assert widths == refitted.residuals()
    assert widths["moe_efa"] == residuals()["moe_efa"], "no row of the group: the catalogue's stays"
    assert widths["dense"].rows == 24


def test_each_constant_says_what_stands_behind_it(refitted: Refit) -> None:
    fitted = dict(refitted.constants().flat())
    known = dict(constants().flat())
    assert set(fitted) == set(known)
    source = fitted["slowdown.hopper"].source
    assert f"fitted to 30 rows of {len({row.run.recipe for row in refitted.timed})} recipes" in source
    found = re.search(
        r"between ([\d.]+) and ([\d.]+) over 10 folds; mean error .* of the (\d+) rows it", source
    )
    assert found is not None, source
    assert float(found[1]) <= fitted["slowdown.hopper"].value * 1.01
    assert float(found[2]) >= fitted["slowdown.hopper"].value * 0.99
    assert 0 < int(found[3]) <= 15, "half of the rows ran on Hopper"
    assert fitted["slowdown.hopper"].value == pytest.approx(1.5, rel=0.05)
    for name in ("slowdown.blackwell", "fp8_cast", "efa", "natural_routing"):
        assert fitted[name] == known[name], f"no row moves {name}"


def test_a_fit_needs_enough_rows_and_recipes(refitted: Refit) -> None:
    few = Table("few.csv", refitted.table.priced[:19], ())
    with pytest.raises(InputError, match=r"few\.csv: '19 rows of \d+ recipes': a fit needs at least 20 rows"):
        refit(few, constants())
    alone = tuple(one for one in refitted.table.priced if one.run.recipe == refitted.timed[0].run.recipe)
    with pytest.raises(InputError, match="of 5 recipes"):
        refit(Table("alone.csv", alone * 6, ()), constants())


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_half_width_holds_four_of_five_errors(spread: float) -> None:
    """With the correction for what is not seen yet: at least 80 % of those that it comes from."""
    errors = np.random.default_rng(7).normal(0, 0.2, 99)
    width = half_width(errors, np.full(99, spread))
    inside = np.abs(errors) <= np.sqrt(width**2 + spread**2) + 1e-12
    assert inside.sum() == 80
    assert half_width([0.01, 0.02], [0.5, 0.5]) == 0.0, "the candidates' spread is wide enough"
    assert half_width([0.3], [0.0]) == pytest.approx(0.3)


def test_a_fit_by_simulation_is_one_to_simulated_times() -> None:
    """What a simulation takes beyond the estimate is known by candidate, and no part of the error."""
    run = synthetic.run_of(row_of(**EXPERTS, pp=2, num_gpus=16, iteration_time_s=3.0))
    plain = prepare(run)
    known = simulated(plain)
    expected = np.median(np.log(simulated_times(plain)))
    assert float(log_time(known)[0]) == pytest.approx(float(expected), abs=1e-12)
    assert float(error_of(known)[0]) == pytest.approx(float(expected) - log(3.0), abs=1e-12)
    slower = constants().changed({"slowdown.hopper": 1.05 * constants().slowdown["hopper"].value})
    again = np.median(np.log(simulated_times(plain, slower)))
    assert float(log_time(known, slower)[0]) == pytest.approx(float(again), abs=2e-3)
