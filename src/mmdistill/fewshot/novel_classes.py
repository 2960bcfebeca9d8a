"""The evaluation uses novel classes only: none that a network has learned from labels of a joint pretraining."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmdistill.data.annotations.f3set import select_fields
from mmdistill.data.clips import Clip, ClipIndex, ClipSource
from mmdistill.errors import format_count, format_first
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features

_MAX_LISTED = 8


def check_novel_classes(
    name: str, learned: Iterable[Mapping[str, Any]], dataset: str, index: ClipIndex, sources: Sequence[ClipSource]
) -> None:
    """Raise if evaluated clips belong to classes that a network has learned.

    A clip's whole label is reduced to the fields of the learned classes, so that classes of other fields are compared,
    too. The number of a class, as in ``take (3)``, is not compared. A class that is only a number is compared within
    one dataset only.

    Args:
        name: of the network or its checkpoint, for the message.
        learned: the sources of its pretraining, see `labeled_sources`.
        dataset: name of the evaluated dataset.
        index: the evaluated clips.
        sources: of these clips, see `clip_sources`.

    Raises:
        FewshotError: lists the classes.
    """
    for record in learned:
        known = {_class_name(label, dataset == record["dataset"]) for label in record["classes"]} - {""}
        found = set()
        for clip, source in zip(index.clips, sources, strict=True):
            if clip.label >= 0:
                own = index.classes[clip.label]
                reduced = _reduce(source.label or own, record["label_fields"])
                if {_class_name(label, dataset == record["dataset"]) for label in (own, reduced)} & known:
                    found.add(own)
        if found:
            raise FewshotError(
                f"{name} was pretrained with labels of {format_count(len(found), 'class')} of the evaluation, of its "
                f"source {record['dataset']}: {format_first(sorted(found), _MAX_LISTED)}. Evaluate novel classes only: "
                "`mmdistill split-data --by class` writes lists of base and novel classes; set "
                "data_module.fewshot_eval_json_path (of a validation data_module.val_json_path) to the novel ones"
            )


def check_novel_features(features: Features) -> None:
    """`check_novel_classes` of a file of features: its network, with the classes that the file stores."""
    rows = zip(features.ids, features.groups, features.labels.tolist(), strict=True)
    clips = tuple(Clip(clip, group, (), label, group) for clip, group, label in rows)
    learned = features.info.get("labeled_sources", [])
    sources = features.sources or [ClipSource("")] * len(clips)
    dataset = str(features.info.get("dataset", ""))
    check_novel_classes(features.network, learned, dataset, ClipIndex(clips, features.classes), sources)


def _class_name(label: str, is_same_dataset: bool) -> str:
    """The name of a class, without its number; "" for a class of another dataset that is only a number."""
    if re.fullmatch(r"\d+(-\d+)*", label):
        return label if is_same_dataset else ""
    return re.sub(r" \(\d+(-\d+)*\)$", "", label)


def _reduce(label: str, fields: Sequence[str] | None) -> str:
    """`select_fields`; a label that does not have the fields is of another kind and stays as it is."""
    try:
        return select_fields(label, fields)
    except ValueError:
        return label
