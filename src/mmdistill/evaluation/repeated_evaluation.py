"""Repeat the first setting of an evaluation on the features that it used, so that each prediction is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.console import progress
from mmdistill.data.dataset import ClipDataset
from mmdistill.errors import format_count
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features, load_features
from mmdistill.fewshot.protocol import Protocol
from mmdistill.fewshot.scores import EpisodeScores, evaluate_episodes

_PROTOCOL_KEYS = ("n_way", "k_shot", "classifier", "q_sample", "episodes", "seed", "disjoint", "support_views")
_TOLERANCE = 0.005  # of the accuracy; another machine rounds differently


@dataclass(frozen=True)
class RepeatedEvaluation:
    """Features, predictions, and the content of ``fewshot.json``, whose first setting was repeated."""

    features: Features
    scores: EpisodeScores
    content: Mapping[str, Any]


def repeat_evaluation(path: Path) -> RepeatedEvaluation:
    """Draw the episodes of an evaluation again and classify them with the features of the scored network.

    Args:
        path: ``fewshot.json`` of `mmdistill evaluate`, or a JSON file of `mmdistill evaluate-features`.

    Raises:
        FewshotError: the file is of another kind, its features do not exist, or they give another accuracy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FewshotError(f"{path}: not JSON ({error}); give the fewshot.json of an evaluation") from error
    keys = (*_PROTOCOL_KEYS, "top1_action_ensemble")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise FewshotError(f"{path}: has no {', '.join(missing)}; give the fewshot.json of an evaluation")
    again = "run `mmdistill evaluate` again with feature_cache set"
    files = content.get("files") or [None]
    if files[0] is None:
        raise FewshotError(f"{path}: names no file with the features; {again}")
    if not Path(files[0]).exists():
        raise FewshotError(f"{path}: its features {files[0]} do not exist; {again}")
    features = load_features(files[0])
    n_way, k_shot, classifier, *values = (content[key] for key in _PROTOCOL_KEYS)
    protocol = Protocol((n_way,), (k_shot,), **dict(zip(_PROTOCOL_KEYS[3:], values, strict=True)))
    episodes = protocol.sample(protocol.specs()[0], features.labels, features.groups, features.classes)
    with progress("episodes", len(episodes)) as advance:
        scores = evaluate_episodes(
            features.features, episodes, classifier, support_views=protocol.support_views, advance=advance
        )
    accuracy, stored = float(scores.accuracy.mean()), float(content["top1_action_ensemble"])
    if abs(accuracy - stored) > _TOLERANCE:
        raise FewshotError(
            f"{path}: the accuracy is {100 * stored:.2f} %, but its features {files[0]} give {100 * accuracy:.2f} %, "
            f"so they are those of another evaluation; {again}"
        )
    return RepeatedEvaluation(features, scores, content)


def match_clips(features: Features, dataset: ClipDataset, classes: Sequence[str]) -> list[int]:
    """The position in the dataset of each clip of the features. `classes` are the classes of the dataset's clips.

    Raises:
        FewshotError: a clip is not in the dataset, or has another class there.
    """
    positions = {clip.id: i for i, clip in enumerate(dataset.index.clips)}
    unknown = [clip for clip in features.ids if clip not in positions]
    if unknown:
        raise FewshotError(
            f"{format_count(len(unknown), 'clip')} of the evaluation are not in the dataset, for example {unknown[0]}; "
            "add the overrides of the evaluation, such as dataset=NAME"
        )
    found = [positions[clip] for clip in features.ids]
    for i, clip, value in zip(found, features.ids, features.labels.tolist(), strict=True):
        name = features.classes[value] if value >= 0 else ""
        if name != classes[i]:
            raise FewshotError(
                f"the clip {clip} has the class {name!r} in the evaluation, but {classes[i]!r} in the dataset; set "
                "data_module.label_fields and data_module.label as in the evaluation"
            )
    return found
