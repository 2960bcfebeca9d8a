"""Teacher features on disk."""

from pathlib import Path

import pytest
import torch

from mmdistill.distill.teacher_cache import TeacherCache

WIDTHS = {"rgb": 2, "flow": 1}


def _cache(path: Path, *, key: object = "key", num_draws: int = 2) -> TeacherCache:
    return TeacherCache(path, num_draws=num_draws, num_clips=3, widths=WIDTHS, key=key)


def _add(cache: TeacherCache, epoch: int, clips: list[int], value: float) -> None:
    index = torch.tensor(clips)
    cache.add(epoch, index, {m: torch.full((len(clips), w), value) for m, w in WIDTHS.items()})


def test_first_epochs_are_computed() -> None:
    cache = _cache(Path("nowhere"))
    assert [cache.is_cached(epoch) for epoch in range(4)] == [False, False, True, True]


def test_features_are_read_by_draw(tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    for epoch, value in ((0, 1.0), (1, 2.0)):
        _add(cache, epoch, [0, 1, 2], value)
        cache.write(epoch)
        cache.open(epoch)
    for epoch, value in ((2, 1.0), (3, 2.0), (4, 1.0)):
        features = cache.features(epoch, torch.tensor([2, 0]))
        assert {m: f.tolist() for m, f in features.items()} == {"rgb": [[value] * 2] * 2, "flow": [[value]] * 2}


def test_missing_features_raise(tmp_path: Path) -> None:
    cache = _cache(tmp_path, num_draws=1)
    _add(cache, 0, [0, 2], 1.0)
    cache.write(0)
    cache.open(0)
    assert cache.features(1, torch.tensor([2]))["rgb"].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="no features of some of the clips"):
        cache.features(1, torch.tensor([1]))


def test_write_adds_to_the_file(tmp_path: Path) -> None:
    """A resumed run computes what is missing and keeps the rest."""
    first = _cache(tmp_path)
    _add(first, 0, [0, 1], 1.0)
    first.write(0)
    second = _cache(tmp_path)
    assert second.known_clips(0).tolist() == [True, True, False]
    assert not second.known_clips(1).any()
    _add(second, 0, [1, 2], 5.0)
    second.write(0)
    second.open(0)
    assert second.features(2, torch.tensor([0, 1, 2]))["flow"].flatten().tolist() == [1, 5, 5]


def test_another_key_is_another_directory(tmp_path: Path) -> None:
    assert _cache(tmp_path, key={"mask": 0.5}).directory != _cache(tmp_path, key={"mask": 0.9}).directory
