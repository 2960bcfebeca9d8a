"""Seeded splits of annotated rallies that share no match, or no class."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import match_name, select_fields
from mmdistill.errors import format_count
from mmdistill.randomness import seeded_rng


def split_by_match(
    rallies: Sequence[Rally],
    fractions: Mapping[str, float],
    *,
    seed: int,
    match: Callable[[str], str] = match_name,
) -> dict[str, list[Rally]]:
    """Assign whole matches to splits, so that no court, player pair or day is in two splits.

    Matches are assigned in a seeded random order, each to the split that is furthest below its fraction of the events.
    `match` gives the match of a video's name.

    Raises:
        ValueError: the fractions do not sum to 1, or there are fewer matches than splits.
    """
    _check_fractions(fractions)
    matches: dict[str, list[Rally]] = {}
    for rally in rallies:
        matches.setdefault(match(rally.video), []).append(rally)
    if len(matches) < len(fractions):
        raise ValueError(
            f"{format_count(len(matches), 'match')} cannot be divided into {len(fractions)} splits; give fewer "
            "splits or more matches"
        )
    sizes = {name: sum(len(r.events) for r in part) or len(part) for name, part in matches.items()}
    chosen = _assign(sizes, fractions, seed=seed)
    return {name: [r for r in rallies if chosen[match(r.video)] == name] for name in fractions}


def split_by_class(
    rallies: Sequence[Rally],
    fractions: Mapping[str, float],
    *,
    seed: int,
    label_fields: Sequence[str] | None = None,
    min_events: int = 1,
    reference: Sequence[Rally] | None = None,
) -> dict[str, list[Rally]]:
    """Assign whole classes to splits. An event goes to the split of its class, so a rally may be in several splits.

    `fractions` are fractions of the classes. `label_fields` define the class, see `select_fields`. Classes with fewer
    than `min_events` events are skipped. `reference` are the rallies whose classes are assigned; None: `rallies`. Files
    that are split with the same reference have the same classes in each split.

    Raises:
        ValueError: the fractions do not sum to 1, or there are fewer classes than splits.
    """
    _check_fractions(fractions)
    counts = Counter(select_fields(e.label, label_fields) for r in reference or rallies for e in r.events if e.label)
    classes = {name: 1 for name, count in counts.items() if count >= min_events}
    if len(classes) < len(fractions):
        raise ValueError(
            f"{format_count(len(classes), 'class')} with at least {format_count(min_events, 'event')} cannot be "
            f"divided into {len(fractions)} splits; give fewer splits or lower --min-events"
        )
    chosen = _assign(classes, fractions, seed=seed)
    out: dict[str, list[Rally]] = {name: [] for name in fractions}
    for rally in rallies:
        for name, part in out.items():
            labeled = [e for e in rally.events if e.label]
            events = tuple(e for e in labeled if chosen.get(select_fields(e.label, label_fields)) == name)
            if events:
                part.append(replace(rally, events=events))
    return out


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if len(fractions) < 2 or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {dict(fractions)} must be two or more positive numbers that sum to 1")


def _assign(sizes: Mapping[str, int], fractions: Mapping[str, float], *, seed: int) -> dict[str, str]:
    """Assign each item to the split that is furthest below its fraction. Every split gets at least one item."""
    names = sorted(sizes)
    order = [names[i] for i in seeded_rng(seed, "split").permutation(len(names))]
    total = sum(sizes.values())
    assigned = dict.fromkeys(fractions, 0)
    chosen: dict[str, str] = {}
    for number, item in enumerate(order):
        empty = [name for name in fractions if name not in chosen.values()]
        remaining = len(order) - number
        candidates = empty if remaining <= len(empty) else list(fractions)
        best = max(candidates, key=lambda name: fractions[name] - assigned[name] / total)
        chosen[item] = best
        assigned[best] += sizes[item]
    return chosen
