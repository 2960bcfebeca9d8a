"""Possible episodes by granularity of the label."""

from mmdistill.fewshot.label_counts import count_labels


def test_counts_and_largest_n_of_each_combination() -> None:
    labels = [*["a"] * 6, *["b"] * 4, *["c"] * 2, ""]
    groups = [f"v{i}" for i in range(len(labels))]
    found = count_labels("all", labels, groups, shots=(1, 5), queries=(1, 3))
    assert (found.num_classes, found.smallest, found.median, found.largest) == (3, 2, 4, 6)
    assert found.most_classes[1, 1, None] == 3  # 2 clips
    assert found.most_classes[1, 3, None] == 2  # 4 clips
    assert found.most_classes[5, 1, None] == 0  # 6 clips: only one class, which is no episode


def test_clips_of_one_video_do_not_supply_support_and_query() -> None:
    labels, groups = ["a", "a", "b", "b", "c", "c"], ["v", "w", "v", "w", "x", "x"]
    found = count_labels("all", labels, groups, shots=(1,), queries=(1,))
    assert found.most_classes == {(1, 1, None): 3, (1, 1, "video"): 2}
