"""Tables of the ledger of the teachers, which a distilled checkpoint contains; see `mmdistill.distill.ledger`."""

from collections.abc import Mapping
from typing import Any

from mmdistill.errors import format_count
from mmdistill.evaluation.report.tables import Table

NOTES = (
    "Variance: of the teacher's features over the training clips of the epoch's last batch, mean over dimensions.",
    "Gradient: share of the norm of the gradient of the teacher's weighted loss with respect to the student's feature.",
    "R²: of the student's prediction of the teacher's targets on masked held-out clips. 1 is perfect, 0 is the best "
    "constant prediction. The deviations of a class are from the mean of all clips. – means that it is unknown.",
)


def ledger_tables(ledger: Mapping[str, Any] | None) -> list[Table]:
    """What each teacher contributes, and R² by class. None for a checkpoint without a ledger."""
    teachers = (ledger or {}).get("teachers") or {}
    if not ledger or not teachers:
        return []
    tables = [
        Table(
            f"Teachers after epoch {ledger['epoch']}: {format_count(ledger['train_clips'], 'training clip')}, "
            f"{format_count(ledger['held_out_clips'], 'held-out clip')} of {ledger['held_out']}",
            ("teacher", "variance", "gradient, %", "R²", "note"),
            [
                (
                    name,
                    _format(values["variance"], ".3g"),
                    f"{100 * values['gradient_share']:.1f}",
                    _format(values["r2"]),
                    "constant features: nothing to learn" if values["is_constant"] else "",
                )
                for name, values in teachers.items()
            ],
            num_names=1,
        )
    ]
    classes = list(dict.fromkeys(label for values in teachers.values() for label in values["r2_by_class"]))
    if classes:
        rows = [
            (label, *(_format(values["r2_by_class"].get(label)) for values in teachers.values())) for label in classes
        ]
        tables.append(Table("R² by class", ("class", *teachers), rows, num_names=1))
    return tables


def ledger_lines(ledger: Mapping[str, Any] | None) -> list[str]:
    """`NOTES`, and why an R² is unknown."""
    problems = (ledger or {}).get("problems") or {}
    return [*NOTES, *(f"R² of {name or 'all teachers'} is unknown: {text}." for name, text in problems.items())]


def _format(value: float | None, digits: str = ".3f") -> str:
    return "–" if value is None else f"{value:{digits}}"
