import numpy as np
import pytest

from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.probe import probe_full_label_set, split_by_group

LABELS = np.repeat(np.arange(4), 30)
GROUPS = [f"rally{i % 10}" for i in range(120)]


def test_no_video_is_in_both_parts():
    train, test = split_by_group(LABELS, GROUPS, seed=0)
    owners = np.array(GROUPS)
    assert not set(owners[train]) & set(owners[test])
    assert len(train) + len(test) == 120
    again = split_by_group(LABELS, GROUPS, seed=0)
    assert np.array_equal(again[1], test)


def test_classes_without_training_clips_and_clips_without_label_are_skipped_and_counted():
    labels = LABELS.copy()
    labels[:5] = -1
    groups = [*GROUPS, "alone"]
    found = probe_full_label_set(np.eye(6)[[*labels, 5]], np.array([*labels, 4]), groups=groups, seed=1)
    assert found["linear_top1"] == found["linear_macro"] == found["knn_top1"] == 1.0
    assert found["train_clips"] + found["test_clips"] + found["skipped_clips"] == 116


def test_features_that_encode_only_the_video_score_near_chance():
    rng = np.random.default_rng(0)
    video = rng.normal(size=(10, 20))
    features = video[[int(g.removeprefix("rally")) for g in GROUPS]] + 0.01 * rng.normal(size=(120, 20))
    found = probe_full_label_set(features, LABELS, groups=GROUPS)
    assert found["linear_top1"] < 0.5  # 1.0 is possible only if one video is in both parts
    assert found["knn_top1"] < 0.5


def test_num_neighbors_is_at_most_the_clips_per_class():
    found = probe_full_label_set(np.eye(4)[LABELS[::5]], LABELS[::5], groups=GROUPS[:24])
    assert found["knn_num_neighbors"] < 6
    assert found["knn_top1"] == 1.0


def test_too_few_videos_raise_an_error():
    with pytest.raises(FewshotError, match="3 videos"):
        probe_full_label_set(np.eye(4)[LABELS], LABELS, groups=[str(i % 3) for i in range(120)])
    with pytest.raises(FewshotError, match="largest class has 2 clips"):
        probe_full_label_set(np.eye(4)[[0, 0, 1, 1, 2, 3]], np.array([0, 0, 1, 1, 2, 3]), groups=list("abcdef"))
    with pytest.raises(FewshotError, match="test clips of these; the split by video gives 3 classes and 0 test clips"):
        probe_full_label_set(np.eye(4)[LABELS], LABELS, groups=[str(label) for label in LABELS])
