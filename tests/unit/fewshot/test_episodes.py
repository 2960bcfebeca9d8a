import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdistill.fewshot.episodes import EpisodeError, Episodes, EpisodeSpec, eligible_classes, sample_episodes
from tests.generated_annotations import make_f3set_entries

F3SET = Path(__file__).resolve().parents[4] / "shared" / "data" / "f3set-tennis"
LABELS = np.repeat([0, 1, 2, 3, 4, 5], [20, 20, 20, 20, 20, 7])


SPEC = EpisodeSpec(5, 2, 6)


def draw(
    labels: np.ndarray = LABELS,
    *,
    episodes: int = 40,
    seed: int = 3,
    groups: list[str] | None = None,
    **changes: object,
) -> Episodes:
    return sample_episodes(labels, replace(SPEC, **changes), episodes=episodes, seed=seed, groups=groups)


def test_every_episode_has_all_its_clips_and_they_are_distinct():
    episodes = draw()
    assert episodes.support.shape == (40, 5, 2)
    assert episodes.query.shape == (40, 5, 6)
    for support, query, classes in zip(episodes.support, episodes.query, episodes.classes, strict=True):
        assert len(set(classes)) == 5
        clips = np.concatenate((support, query), axis=1)
        assert len(np.unique(clips)) == 5 * 8
        assert (LABELS[clips] == classes[:, None]).all()


def test_each_clip_and_class_is_drawn_equally_often():
    episodes = draw(np.repeat(np.arange(8), 10), episodes=2000)
    per_class = np.bincount(episodes.classes.ravel(), minlength=8)
    assert np.abs(per_class / (2000 * 5 / 8) - 1).max() < 0.1
    per_clip = np.bincount(episodes.support.ravel(), minlength=80)
    assert np.abs(per_clip / (2000 * 5 * 2 / 80) - 1).max() < 0.3  # 5 standard deviations


def test_a_longer_series_starts_with_the_shorter_one_and_the_seed_matters():
    short, long = draw(episodes=10), draw(episodes=30)
    assert short.has_same_clips(long.take(range(10)))
    assert not short.has_same_clips(draw(episodes=10, seed=4))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_contain_every_episode_once(world_size: int):
    episodes = draw(episodes=20)
    numbers = np.concatenate([episodes.shard(r, world_size).numbers for r in range(world_size)])
    assert sorted(numbers) == list(range(20))
    with pytest.raises(EpisodeError, match="rank"):
        episodes.shard(world_size, world_size)


def test_small_classes_are_excluded_by_name_and_count():
    names = ["a", "b", "c", "d", "e", "serve"]
    found = eligible_classes(LABELS, SPEC, names=names)
    assert found.classes == (0, 1, 2, 3, 4)
    assert found.excluded == {5: 7}
    assert "serve (7)" in found.describe(names)
    with pytest.raises(EpisodeError, match=r"classes that have them: 5 of 6.*serve \(7\)") as caught:
        eligible_classes(LABELS, EpisodeSpec(6, 2, 6), names=names)
    assert str(caught.value).endswith(
        "use data_module.n_way=5 or lower k_shot or q_sample, or merge labels (label_fields)"
    )


def test_more_ways_than_classes_names_a_value_that_works():
    with pytest.raises(EpisodeError, match=r"classes that have them: 5 of 6.*\); use data_module\.n_way=5$"):
        eligible_classes(LABELS, EpisodeSpec(20, 2, 6))
    assert eligible_classes(LABELS, EpisodeSpec(5, 2, 6)).classes == (0, 1, 2, 3, 4)
    with pytest.raises(EpisodeError, match=r"of 6.*; lower k_shot or q_sample, or merge labels \(label_fields\)$"):
        eligible_classes(LABELS, EpisodeSpec(2, 900, 6))


def test_clips_without_label_are_never_drawn():
    labels = np.concatenate((LABELS, np.full(500, -1)))
    assert draw(labels).has_same_clips(draw())


@pytest.mark.parametrize(
    "options", [{"n_way": 1}, {"k_shot": 0}, {"q_sample": 0}, {"episodes": 0}, {"seed": -1}, {"disjoint": "vidoe"}]
)
def test_invalid_arguments_raise_an_error(options: dict[str, object]):
    with pytest.raises(EpisodeError):
        draw(**options)


def test_labels_must_be_integers():
    with pytest.raises(EpisodeError, match="integers"):
        draw(LABELS.astype(float))


def test_disjoint_episodes_share_no_group_over_all_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 60)
    groups = [f"rally{g}" for g in rng.integers(0, 90, len(labels))]
    codes = np.array(groups)
    episodes = draw(labels, groups=groups, disjoint="video", k_shot=5)
    for support, query in zip(episodes.support, episodes.query, strict=True):
        assert not set(codes[support].ravel()) & set(codes[query].ravel())
    shared = draw(labels, k_shot=5)
    assert any(set(codes[s].ravel()) & set(codes[q].ravel()) for s, q in zip(shared.support, shared.query, strict=True))


def test_disjoint_with_few_large_groups_still_finds_a_split():
    labels = np.tile(np.repeat(np.arange(5), 8), 4)  # 4 videos with 8 clips of each class
    groups = np.repeat(["a", "b", "c", "d"], 40).tolist()
    episodes = draw(labels, groups=groups, disjoint="video", k_shot=5, q_sample=8)
    videos = np.repeat(np.arange(4), 40)
    for support, query in zip(episodes.support, episodes.query, strict=True):
        assert not set(videos[support].ravel()) & set(videos[query].ravel())


def test_disjoint_excludes_classes_of_a_single_group():
    labels = np.repeat(np.arange(6), 20)
    groups = [str(i % 4) if label < 5 else "one" for i, label in enumerate(labels)]
    found = eligible_classes(labels, EpisodeSpec(5, 1, 5, "video"), groups=groups)
    assert found.excluded == {5: 20}
    assert found.describe() == "excluded classes, too few clips in different videos: 5 (20)"
    with pytest.raises(EpisodeError, match="needs `groups`"):
        draw(disjoint="video")


def test_impossible_disjoint_draws_raise_an_error():
    # each class alone can be split over the two videos, but the 20 clips leave no query for K=10, Q=10 of both
    labels = np.array([0] * 10 + [0] * 10 + [1] * 10 + [1] * 10 + [1] * 10)
    groups = np.array(["a"] * 10 + ["b"] * 10 + ["a"] * 10 + ["c"] * 5 + ["b"] * 5 + ["c"] * 10)
    with pytest.raises(EpisodeError, match="different videos"):
        draw(labels, groups=groups.tolist(), disjoint="video", n_way=2, k_shot=10, q_sample=12)


@pytest.mark.skipif(not F3SET.is_dir(), reason="shared/data/f3set-tennis is not next to this repository")
@pytest.mark.parametrize(("split", "classes"), [("val", 98), ("test", 112)])
def test_f3set_has_as_many_eligible_classes_as_published(split: str, classes: int):
    rallies = json.loads((F3SET / f"{split}.json").read_text())
    names, labels = np.unique([e["label"] for r in rallies for e in r["events"]], return_inverse=True)
    found = eligible_classes(labels, EpisodeSpec(5, 1, 15), names=names.tolist())
    assert len(found.classes) == classes
    groups = [r["video"] for r in rallies for _ in r["events"]]
    for disjoint in (None, "video"):
        episodes = sample_episodes(labels, EpisodeSpec(5, 1, 15, disjoint), episodes=20, seed=0, groups=groups)
        assert len(np.unique(episodes.query[0])) == 75


def test_classes_of_generated_f3set_annotations_are_counted():
    rallies = make_f3set_entries(matches=30, rallies_per_match=20)
    events = [e["label"] for r in rallies for e in r["events"]]
    names, labels = np.unique(events, return_inverse=True)
    found = eligible_classes(labels, EpisodeSpec(5, 1, 15), names=names.tolist())
    large = {name for name, count in Counter(events).items() if count >= 16}
    assert {names[c] for c in found.classes} == large
    assert 5 <= len(large) < len(names)
    groups = [r["video"] for r in rallies for _ in r["events"]]
    for disjoint in (None, "video"):
        episodes = sample_episodes(labels, EpisodeSpec(5, 1, 15, disjoint), episodes=20, seed=0, groups=groups)
        assert len(np.unique(episodes.query[0])) == 75
