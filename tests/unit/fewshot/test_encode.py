import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdistill.checkpoint.references import weights_digest
from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.fewshot.encode import ClipEncoder, EncodingJob, EvalMasks, encode_cached, encode_clips
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.fewshot.features import cache_path, merge_features
from mmdistill.modalities import get_modality, preprocess_clips
from mmdistill.models.videomae import Encoder, EncoderConfig

N, GRID = 10, (2, 2, 3)
INDEX = ClipIndex(
    tuple(Clip(f"v{i // 2}#{i}", f"v{i // 2}", tuple(range(4)), i % 3, f"v{i // 2}") for i in range(N)),
    ("serve", "return", "stroke"),
)


def tiny_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    geometry = EncoderConfig(3, 4, 32, 48, 16, 2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32)
    assert geometry.grid == GRID
    return Encoder(geometry)


def loader(order: list[int] | None = None, batch: int = 4) -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    clips = torch.from_numpy(rng.integers(0, 255, (N, 4, 32, 48, 3), dtype=np.uint8))
    view = torch.tensor([0.0, 0.0, 32.0, 48.0, 0.0])
    order = list(range(N)) if order is None else order
    rows = [torch.tensor(order[i : i + batch]) for i in range(0, len(order), batch)]
    return [{"rgb": clips[r], "crop_box": view.expand(len(r), 5), "index": r} for r in rows]


def job(masks: EvalMasks = EvalMasks(), *, encoder: Encoder | None = None, network: str = "student_rgb") -> EncodingJob:  # noqa: B008
    encoder = encoder or tiny_encoder()
    return EncodingJob(network, ClipEncoder(encoder, get_modality("rgb").spec()), GRID, masks, weights_digest(encoder))


def test_whole_clip_features_equal_those_of_the_encoder():
    encoder = tiny_encoder()
    (found,) = encode_clips([job(encoder=encoder)], loader(), INDEX)
    (batch,) = loader(batch=N)
    with torch.no_grad():
        expected = encoder.embed(
            preprocess_clips(batch["rgb"], batch["crop_box"], get_modality("rgb").spec(), (32, 48))
        )
    assert found.features.shape == (N, 1, 16)
    np.testing.assert_allclose(found.features[:, 0], expected.numpy(), atol=1e-5)
    assert found.ids == tuple(c.id for c in INDEX.clips)
    assert found.groups[3] == "v1"
    assert found.labels.tolist() == [i % 3 for i in range(N)]
    assert (found.info["network"], found.input_mode) == ("student_rgb", "whole clips")


def test_motion_masks_of_views_depend_on_the_motion_and_the_clip():
    """The weights of the batch decide; order and batch size do not."""
    clips, grid = INDEX.clips[:4], (2, 2, 3)
    masks = EvalMasks(2, 0.5, "motion", False, mask_temperature=0.01)
    weights = torch.full((4, 12), 0.01)
    for i in range(4):
        weights[i, [i, i + 3, i + 5, i + 8, 11, (i + 1) % 3]] = 2.0
    for view in (0, 1):
        visible = masks.visible_tokens(clips, view, grid, weights)
        for i in range(4):
            moving = weights[i].gt(1).nonzero().flatten()
            assert set(moving.tolist()) <= set(visible[i].tolist()) or len(moving) > 6
            assert torch.equal(visible[i], masks.visible_tokens(clips[i : i + 1], view, grid, weights[i : i + 1])[0])
    warm = EvalMasks(2, 0.5, "motion", False, mask_temperature=100.0)
    first, second = (warm.visible_tokens(clips, view, grid, weights) for view in (0, 1))
    assert first.shape == (4, 6)
    assert not torch.equal(first, second)
    assert [mode.input_mode for mode in replace(masks, n_masks=0).input_modes()] == [
        "whole clips",
        "2 motion masks, 50% removed, per clip",
    ]
    assert job(warm).cache_key("d") != job(masks).cache_key("d")
    with pytest.raises(FewshotError, match="mask_type=motion depends on the clip; use eval_masks=per_clip"):
        EvalMasks(2, 0.5, "motion")
    masks.require_visible_tokens(grid)


@pytest.mark.parametrize("shared_masks", [True, False])
def test_masks_do_not_depend_on_order_batch_or_ranks(shared_masks: bool):
    masks = EvalMasks(3, 0.5, "tube", shared_masks, seed=7)
    (whole,) = encode_clips([job(masks)], loader(), INDEX)
    (mixed,) = encode_clips([job(masks)], loader([7, 2, 9, 0, 1, 5, 3, 8, 6, 4], batch=3), INDEX)
    np.testing.assert_allclose(mixed.features, whole.features, atol=1e-5)
    parts = [encode_clips([job(masks)], loader(list(range(r, N, 2))), INDEX)[0] for r in (1, 0)]
    merged = merge_features(parts, whole.ids)
    np.testing.assert_allclose(merged.features, whole.features, atol=1e-5)
    assert merged.has_same_clips(whole)
    assert np.abs(whole.features[:, 0] - whole.features[:, 1]).max() > 1e-3  # the views differ


def test_shared_masks_are_equal_and_per_clip_masks_are_not():
    clips = INDEX.clips
    shared = EvalMasks(2, 0.5, "random").visible_tokens(clips, 0, (4, 4, 4))
    assert shared is not None
    assert shared.shape == (N, 32)
    assert (shared == shared[0]).all()
    per_clip = EvalMasks(2, 0.5, "random", False).visible_tokens(clips, 0, (4, 4, 4))
    assert per_clip is not None
    assert len({tuple(row.tolist()) for row in per_clip}) == N
    assert torch.equal(per_clip[3], EvalMasks(9, 0.5, "random", False).visible_tokens(clips[3:4], 0, (4, 4, 4))[0])
    assert not torch.equal(per_clip, EvalMasks(2, 0.5, "random", False, seed=1).visible_tokens(clips, 0, (4, 4, 4)))
    assert EvalMasks(0).visible_tokens(clips, 0, GRID) is None


def test_each_clip_is_read_once_and_encoded_once_per_view_and_network():
    read_clips: list[int] = []

    def encode(batch: dict[str, Tensor], visible: Tensor | None) -> Tensor:
        read_clips.extend(batch["index"].tolist())
        return batch["index"][:, None].float().expand(-1, 5)

    made = encode_clips(
        [EncodingJob("a", encode, GRID, EvalMasks(3, 0.5)), EncodingJob("b", encode, GRID)], loader(), INDEX
    )
    warm_up = [0, 0]  # the first clip, once per network
    assert sorted(read_clips) == sorted([*range(N)] * 4 + warm_up)
    assert [m.features.shape for m in made] == [(N, 3, 5), (N, 1, 5)]
    assert made[0].features[:, 0, 0].tolist() == list(range(N))


def test_encoding_time_excludes_the_first_call(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def make_encode(first_call_s: float):
        calls = iter([first_call_s])

        def encode(batch: dict[str, Tensor], visible: Tensor | None) -> Tensor:
            nonlocal now
            now += next(calls, 1.0)
            return batch["index"][:, None].float()

        return encode

    jobs = [EncodingJob(name, make_encode(seconds), GRID) for name, seconds in (("a", 100.0), ("b", 20.0))]
    assert [found.info["seconds"] for found in encode_clips(jobs, loader(), INDEX)] == [3.0, 3.0]  # of 3 batches


def test_nan_weights_raise_an_error_that_names_network_and_clips():
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.blocks[0].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(FeatureError, match=r"student_rgb: NaN.*4 of 4 clips.*v0#0, v0#1, v1#2"):
        encode_clips([job(encoder=encoder)], loader(), INDEX)


def test_a_clip_with_infinite_features_is_named():
    def encode(batch: dict[str, Tensor], visible: Tensor | None) -> Tensor:
        return torch.where(batch["index"] == 5, torch.inf, 1.0)[:, None].expand(-1, 3)

    with pytest.raises(FeatureError, match=r"teacher_flow.*1 of 4.*v2#5"):
        encode_clips([EncodingJob("teacher_flow", encode, GRID)], loader(), INDEX)


def test_collapsed_features_are_logged(caplog: pytest.LogCaptureFixture):
    encode_clips([EncodingJob("student_rgb", lambda b, v: torch.ones(len(b["index"]), 3), GRID)], loader(), INDEX)
    assert "student_rgb: all 10 clips have the same features" in caplog.text


def test_duplicate_and_missing_clips_raise_an_error():
    with pytest.raises(FeatureError, match="11 clips, of which 10"):
        encode_clips([job()], loader([*range(N), 0]), INDEX)
    with pytest.raises(FeatureError, match=r"for 10 clips; missing \['v4#9'\]"):
        encode_cached([job()], lambda: loader(list(range(9))), INDEX, data="d", cache=None)
    with pytest.raises(FeatureError, match="no clip"):
        encode_clips([job()], [], INDEX)


def test_cached_features_are_not_encoded_again(tmp_path: Path):
    def never() -> list[dict[str, Tensor]]:
        raise AssertionError("the data were read although everything is cached")

    jobs = [job(), job(EvalMasks(2, 0.5))]
    first = encode_cached(jobs, loader, INDEX, data="d", cache=tmp_path)
    again = encode_cached(jobs, never, INDEX, data="d", cache=tmp_path)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.features, b.features)
        assert a.has_same_clips(b)
        assert (a.info["cached"], b.info["cached"]) == (False, True)
        assert b.info["seconds"] == a.info["seconds"]
    (renamed,) = encode_cached([job(network="teacher_rgb")], never, INDEX, data="d", cache=tmp_path)
    assert renamed.network == "teacher_rgb"  # same weights: not encoded again, but under the new name


def test_the_cache_key_depends_on_weights_data_and_settings():
    base = job(EvalMasks(2, 0.5))
    others = [
        job(EvalMasks(2, 0.5), encoder=tiny_encoder(1)).cache_key("d"),
        base.cache_key("e"),
        job(EvalMasks(3, 0.5)).cache_key("d"),
        job(EvalMasks(2, 0.25)).cache_key("d"),
        job(EvalMasks(2, 0.5, "random")).cache_key("d"),
        job(EvalMasks(2, 0.5, shared_masks=False)).cache_key("d"),
        job(EvalMasks(2, 0.5, seed=1)).cache_key("d"),
        job().cache_key("d"),
    ]
    assert len({base.cache_key("d"), *others}) == 1 + len(others)
    assert job(EvalMasks(0, seed=3)).cache_key("d") == job().cache_key(
        "d"
    )  # without masks features do not depend on the seed
    with_modality = replace(base, info={"modality": "rgb"})
    assert with_modality.cache_key({"flow": "e", "rgb": "d"}) == with_modality.cache_key("d")


def test_a_corrupt_cache_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (first,) = encode_cached([job()], loader, INDEX, data="d", cache=tmp_path)
    path = cache_path(tmp_path, job().cache_key("d"))
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    (again,) = encode_cached([job()], loader, INDEX, data="d", cache=tmp_path)
    assert "encoding the clips again" in caplog.text
    assert np.array_equal(first.features, again.features)
    assert not again.info["cached"]


def test_an_unwritable_cache_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "cache").write_text("a file where a folder should be")
    (found,) = encode_cached([job()], loader, INDEX, data="d", cache=tmp_path / "cache")
    assert len(found.features) == len(INDEX.clips)
    assert "cannot write the feature cache" in caplog.text


@pytest.mark.parametrize("masks", [EvalMasks(), EvalMasks(3, 0.5, shared_masks=False), EvalMasks(2)])
def test_input_modes_are_three_and_start_with_the_configured_one(masks: EvalMasks):
    found = masks.input_modes()
    assert found[0] == masks
    assert len({m.input_mode for m in found}) == len(found) == 3
    assert {m.eval_masks for m in found} == {"none", "shared", "per_clip"}


def test_invalid_masks_raise_an_error():
    with pytest.raises(FewshotError, match="n_masks=-1"):
        EvalMasks(-1)
    with pytest.raises(FewshotError, match=r"eval_mask_ratio=1 must lie in \[0, 1\)"):
        EvalMasks(1, 1)
    EvalMasks(2, 0.5).require_visible_tokens(GRID)
    with pytest.raises(FewshotError, match=r"2 tube masks, 99% removed, shared: mask ratio 0\.99 leaves none"):
        EvalMasks(2, 0.99).require_visible_tokens(GRID)
