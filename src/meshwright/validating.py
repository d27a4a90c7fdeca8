"""What `meshwright validate` computes: predictions of a table, and the files of a fit."""

from __future__ import annotations

from meshwright.validate.answer import Table, Validation
from meshwright.validate.progress import Progress


def validation_of(
    file: str, cross_validate: bool, fit: str | None, residuals: str | None, simulated: bool
) -> Validation:
    """Predictions of a table; the fit's files are written where they are asked for."""
    from meshwright.terminal.progress import progress_bar
    from meshwright.validate.answer import read_table, validated, with_simulation

    with progress_bar() as progress:
        table = read_table(file, progress)
        if cross_validate or fit or residuals:
            validation = _fitted(table, fit, residuals, simulated, progress)
        else:
            validation = validated(table)
        return with_simulation(validation, progress) if simulated else validation


def _fitted(
    table: Table, fit: str | None, residuals: str | None, simulated: bool, progress: Progress
) -> Validation:
    from meshwright.cost.constants import constants
    from meshwright.files import write_text
    from meshwright.validate.refit import constants_text, refit, residuals_text

    fitted = refit(table, constants(), progress, simulated)
    if fit is not None:
        write_text(fit, constants_text(fitted.constants()))
    if residuals is not None:
        write_text(residuals, residuals_text(fitted.residuals()))
    return fitted.validation()
