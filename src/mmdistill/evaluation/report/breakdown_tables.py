"""Tables and sentences of the report card and the shortcut audit, for the terminal and the page."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mmdistill.errors import format_count
from mmdistill.evaluation.report.tables import Table
from mmdistill.fewshot.episodes import EpisodeSpec
from mmdistill.fewshot.protocol import Protocol, Results
from mmdistill.fewshot.report_card import EXACT_LABEL, ElementScores, ReportCard
from mmdistill.fewshot.scores import mean_with_interval
from mmdistill.fewshot.shortcut_audit import SAME_AS_RALLY, AuditLevel, ShortcutAudit

NOT_SCORED = "not scored"
NONE = "–"
_LEVELS = {None: "any clips", "video": "rally", "match": "match", "player": "player"}
_PARTS = (  # in the order of the columns; other parts follow
    *("near player", "far player", "hand RH", "hand LH", "serve", "no serve"),
    *("court deuce", "court middle", "court ad"),
)
CARD_NOTES = (
    "Each element has its own episodes. Its classes are its values with enough clips. The exact label is the class of "
    "the evaluation.",
    "A part contains the query clips of these strokes. The support clips are those of all strokes.",
)
AUDIT_NOTES = (
    "Support and query clips of an episode have no rally, no match, or no match and no player in common. The player is "
    "the one who plays the stroke.",
    "All rows have the same classes in each episode, so that their differences are paired over episodes.",
)


def report_card_tables(results: Results) -> list[Table]:
    """The accuracy of each element for all networks, and for the scored network by part of the clips."""
    card = results.report_card
    if card is None:
        return []
    parts = {part for row in card.elements if row.parts for part in row.parts[0]}
    columns = [*(p for p in _PARTS if p in parts), *sorted(parts - set(_PARTS))]
    tables = [
        Table(
            "Report card, accuracy in %",
            ("element", "episodes", "classes", "chance", *card.networks),
            [_element_cells(row, card) for row in card.elements],
        )
    ]
    if columns:
        tables.append(
            Table(
                f"Report card of {card.networks[0]} by part of the clips, accuracy in %",
                ("element", *(column.replace(" ", "\n") for column in columns)),
                [_part_cells(row, columns) for row in card.elements if not row.not_scored],
                num_names=1,
            )
        )
    return tables


def report_card_lines(results: Results) -> list[str]:
    """Sentences about elements that are not scored or that have fewer ways or excluded classes."""
    card = results.report_card
    if card is None:
        return []
    lines = []
    for row in card.elements:
        if row.not_scored:
            lines.append(f"{row.element}: {row.not_scored}")
            continue
        episodes = row.scores[0].episodes
        if episodes.n_way < results.protocol.n_way[0]:
            values = ", ".join(_class_names(row))
            which = f"{episodes.n_way} classes{' with enough clips' if episodes.eligibility.excluded else ''}"
            lines.append(f"{row.element}: n_way={episodes.n_way}, because it has {which} ({values})")
        if row.element != EXACT_LABEL and episodes.eligibility.excluded:
            lines.append(f"{row.element}: {episodes.eligibility.describe(sorted(row.counts))}")
    p = results.protocol
    return [*lines, _setting(p, f"{p.k_shot[0]}-shot", EpisodeSpec(disjoint=p.disjoint).where), *CARD_NOTES]


def _class_names(row: ElementScores) -> list[str]:
    names = sorted(row.counts)  # in the order of the label values
    return [f"no {row.element}" if names[c] == "-" else names[c] for c in row.scores[0].episodes.eligibility.classes]


def _element_cells(row: ElementScores, card: ReportCard) -> tuple[str, ...]:
    if row.not_scored:
        num_classes = sum(count > 0 for count in row.counts.values())
        return (row.element, NOT_SCORED, str(num_classes), NONE, *[NOT_SCORED for _ in card.networks])
    episodes = row.scores[0].episodes
    return (
        row.element,
        f"{episodes.n_way}-way {episodes.k_shot}-shot",
        str(len(episodes.eligibility.classes)),
        f"{100 / episodes.n_way:.1f}",
        *(_mean(scores.accuracy) for scores in row.scores),
    )


def _part_cells(row: ElementScores, columns: list[str]) -> tuple[str, ...]:
    parts = row.parts[0]
    cells = (parts.get(column) for column in columns)
    return (
        row.element,
        *(NONE if cell is None else f"{100 * cell['accuracy']:.1f} ± {100 * cell['ci95']:.1f}" for cell in cells),
    )


def _mean(accuracy: NDArray[np.float64]) -> str:
    mean, _, _, ci95 = mean_with_interval(accuracy)
    return f"{100 * mean:.2f} ± {100 * ci95:.2f}"


def _setting(protocol: Protocol, size: str, where: str) -> str:
    """For example ``Setting: 1-shot, 15 queries per class, logistic, 600 episodes per row``."""
    queries, episodes = format_count(protocol.q_sample, "query"), format_count(protocol.episodes, "episode")
    return f"Setting: {size}, {queries} per class{where}, {protocol.classifiers[0]}, {episodes} per row."


def shortcut_audit_tables(results: Results) -> list[Table]:
    """The accuracy at all levels, side by side."""
    audit = results.shortcut_audit
    if audit is None:
        return []
    rows = [_level_cells(level, audit) for level in audit.levels]
    return [Table("Shortcut audit, accuracy in %", ("disjoint", *audit.networks), rows, num_names=1)]


def _level_cells(level: AuditLevel, audit: ShortcutAudit) -> tuple[str, ...]:
    other = "same as rally" if level.not_possible == SAME_AS_RALLY else "not possible"
    cells = [_mean(scores.accuracy) for scores in level.scores] or [other] * len(audit.networks)
    return (_LEVELS[level.disjoint], *cells)


def shortcut_audit_lines(results: Results) -> list[str]:
    """Sentences about the part of each score that match, court and player explain, and about impossible levels."""
    audit = results.shortcut_audit
    if audit is None:
        return []
    lines = [_explain(audit, number) for number in range(len(audit.networks))]
    impossible = [
        f"Disjoint by {_LEVELS[level.disjoint]}: {level.not_possible}" for level in audit.levels if level.not_possible
    ]
    strictest = [level for level in audit.levels if level.scores][-1:]
    excluded = [level.scores[0].episodes.eligibility.describe(results.features[0].classes) for level in strictest]
    size = f"{audit.spec.n_way}-way {audit.spec.k_shot}-shot from {format_count(audit.num_classes, 'class')}"
    return [
        *filter(None, lines),
        *impossible,
        *filter(None, excluded),
        _setting(results.protocol, size, ""),
        *AUDIT_NOTES,
    ]


def _explain(audit: ShortcutAudit, number: int) -> str:
    """How much match, court and player explain of the score of a network; "" if disjoint rallies are not possible."""
    accuracy = {level.disjoint: level.scores[number].accuracy.mean() for level in audit.levels if level.scores}
    if "video" not in accuracy:
        return ""
    above = 100 * (accuracy["video"] - 1 / audit.spec.n_way)
    start = (
        f"{audit.networks[number]}: {100 * accuracy['video']:.1f} % with disjoint rallies, {above:+.1f} points from "
        "chance."
    )
    found = audit.explained(number)
    if not found:
        return f"{start} How much match, court and player explain is unknown."
    steps = ""
    if "match" in found and "player" in found:
        steps = f" (match and court {_points(found['match'])}, player {_points(found['player'])})"
    together = found["together"]
    share = together["share"]
    part = "" if share is None else f", {round(100 * share)} % of the accuracy above chance"
    cause = "Match and court" if "player" not in found else "Match, court and player"
    return f"{start} {cause} explain {_points(together)} points of it{part}{steps}."


def _points(value: Mapping[str, float | None]) -> str:
    difference = round(100 * (value["difference"] or 0), 1) + 0.0  # without a negative zero
    return f"{difference:+.1f} ± {100 * (value['ci95'] or 0):.1f}"
