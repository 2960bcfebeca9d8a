from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.clips import ClipSource
from mmdistill.fewshot.errors import FeatureError
from mmdistill.fewshot.features import Features, load_features, merge_features, save_features


def example(clips: int = 6) -> Features:
    x = np.random.default_rng(0).normal(size=(clips, 2, 5)).astype(np.float32)
    labels = np.arange(clips) % 3 - 1
    ids = tuple(f"clip {i} ünï" for i in range(clips))
    groups = tuple(f"g{i // 2}" for i in range(clips))
    return Features(x, labels, ids, groups, ("a", "b"), {"network": "teacher_flow", "seconds": 1.5})


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_a_written_file_is_read_back(tmp_path: Path, name: str):
    found = load_features(save_features(example(), tmp_path / "new" / name))
    assert np.array_equal(found.features, example().features)
    assert found.has_same_clips(example())
    assert found.groups == example().groups
    assert found.network == "teacher_flow"
    assert not list((tmp_path / "new").glob(".tmp*"))


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
def test_sources_of_clips_are_written_and_read(tmp_path: Path, name: str):
    sources = tuple(ClipSource(f"m{i // 3}", "near_ad_serve", f"Ä {i}", "LH") for i in range(6))
    assert load_features(save_features(replace(example(), sources=sources), tmp_path / name)).sources == sources
    assert load_features(save_features(example(), tmp_path / f"none-{name}")).sources == ()
    with pytest.raises(FeatureError, match="6 features, but 5 sources of clips"):
        replace(example(), sources=sources[1:])


def test_players_of_other_programs_have_the_match_of_their_video(tmp_path: Path):
    arrays = {"features": np.eye(3), "labels": np.arange(3), "groups": ["m_1_2", "m_3_4", "x"], "players": [7, 7, 8]}
    np.savez(tmp_path / "theirs.npz", **arrays)
    sources = load_features(tmp_path / "theirs.npz").sources
    assert sources == (ClipSource("m", "", "7"), ClipSource("m", "", "7"), ClipSource("x", "", "8"))
    np.savez(tmp_path / "wrong.npz", **{**arrays, "players": ["a", "b"]})
    with pytest.raises(FeatureError, match=r"wrong\.npz: players: expected one text for each of 3 clips"):
        load_features(tmp_path / "wrong.npz")


def test_features_of_other_programs(tmp_path: Path):
    x = np.random.default_rng(0).normal(size=(4, 7))
    np.savez(tmp_path / "theirs.npz", features=x, labels=np.array([10, 30, 10, -5]))
    found = load_features(tmp_path / "theirs.npz")
    assert found.features.shape == (4, 1, 7)
    assert found.features.dtype == np.float32
    assert found.labels.tolist() == [0, 1, 0, -1]
    assert found.classes == ("10", "30")
    assert found.network == "theirs"
    assert found.info["has_groups"] is False
    np.savez(tmp_path / "names.npz", features=x, labels=np.array(["b", "a", "b", "c"]), groups=np.array([1, 1, 2, 2]))
    found = load_features(tmp_path / "names.npz")
    assert found.labels.tolist() == [1, 0, 1, 2]
    assert found.groups == ("1", "1", "2", "2")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros((3, 2))}, "no array labels; it has features"),
        ({"features": np.zeros((3, 2)), "labels": np.zeros(4, int)}, "the arrays differ in length"),
        ({"features": np.full((3, 2), np.nan), "labels": np.zeros(3, int)}, "NaN or infinite values in 3 of 3"),
        ({"features": np.zeros((3, 2)), "labels": np.zeros(3)}, "integers or names"),
        ({"features": np.zeros(3), "labels": np.zeros(3, int)}, r"must be \[clips, D\]"),
        ({"features": np.zeros((3, 2)), "labels": np.array([{}, 1, 2], object)}, "Python objects"),
        ({"features": np.zeros((2, 2)), "labels": np.zeros(2, int), "ids": np.array(["a", "a"])}, "same id"),
        ({"features": np.array([["1", "2"]]), "labels": np.zeros(1, int)}, "must be numbers, got the type <U1"),
        (
            {"features": np.zeros((1, 2)), "labels": np.zeros(1, int), "info": np.array("[1]")},
            "info is not a JSON object",
        ),
    ],
)
def test_invalid_files_raise_an_error_that_names_the_file(tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(FeatureError, match=rf"bad\.npz.*{message}"):
        load_features(tmp_path / "bad.npz")


@pytest.mark.parametrize("name", ["f.npz", "f.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_files_raise_an_error(tmp_path: Path, name: str, kept: float):
    path = save_features(example(), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(FeatureError, match="corrupt"):
        load_features(path)


def test_a_flipped_bit_is_detected(tmp_path: Path):
    path = save_features(example(), tmp_path / "f.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(FeatureError, match="checksum"):
        load_features(path)


def test_unknown_suffixes_and_absent_files_raise_an_error(tmp_path: Path):
    with pytest.raises(FeatureError, match=r"\.safetensors or \.npz"):
        save_features(example(), tmp_path / "f.pt")
    with pytest.raises(FeatureError, match="does not exist"):
        load_features(tmp_path / "f.npz")


def test_merge_restores_the_order_and_rejects_gaps():
    whole = example()
    parts = [
        Features(whole.features[r], whole.labels[r], whole.ids[r], whole.groups[r], whole.classes)
        for r in (slice(1, None, 2), slice(0, None, 2))
    ]
    merged = merge_features(parts, whole.ids)
    assert np.array_equal(merged.features, whole.features)
    assert merged.has_same_clips(whole)
    for wrong in (parts[:1], [*parts, parts[0]]):
        with pytest.raises(FeatureError, match="for 6 clips"):
            merge_features(wrong, whole.ids)


def test_file_of_another_kind_is_reported_without_numpys_advice_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"garbage")
    with pytest.raises(FeatureError, match=r"a\.npz: not an \.npz file of arrays; write it again") as caught:
        load_features(tmp_path / "a.npz")
    assert "pickle" not in str(caught.value)
