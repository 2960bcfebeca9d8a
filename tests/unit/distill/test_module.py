"""The distillation module: losses, modes, average, checkpoints."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from mmdistill.checkpoint import CheckpointError
from mmdistill.distill import module
from mmdistill.distill.module import MMDistill, StudentOptions, TargetOptions
from mmdistill.distill.parallel_encoders import run_in_parallel
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.modalities import BUILTIN_MODALITIES, ModalitySpec, get_modality
from mmdistill.models.pooling import Pooling, person_weights
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.training.optim import Optimization
from tests.flops import count_flops


@pytest.fixture(params=[2, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set this number of torch threads, independent of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _module(*, ema: float | None = None, num_frames: int = 4, **more: Any) -> MMDistill:
    torch.manual_seed(0)
    specs = {name: get_modality(name).spec() for name in BUILTIN_MODALITIES}
    teachers = {name: Encoder(_encoder_config(spec, num_frames)) for name, spec in specs.items()}
    more.setdefault("student", StudentOptions(ema=ema))
    return MMDistill(teachers, specs, Optimization(1e-3), **more).train()


def _encoder_config(spec: ModalitySpec, num_frames: int = 4) -> EncoderConfig:
    size, patch = 32 // spec.input_stride, 8 // spec.input_stride
    return EncoderConfig(spec.channels, num_frames, size, size, patch, 2, 16, 2, 2, 8, 32)


def _batch(clips: int = 2, num_frames: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rgb": torch.randint(0, 256, (clips, num_frames, 36, 40, 3), dtype=torch.uint8),
        "flow": torch.randn(clips, num_frames, 2, 36, 40).half(),
        "skeleton": torch.rand(clips, num_frames, 1, 17, 3) * 32,
        "visible": torch.stack([torch.randperm(32)[:8].sort().values for _ in range(clips)]),
        "crop_box": torch.tensor([[0.0, 7, 32, 32, 0], [2, 1, 32, 32, 1]]).repeat(clips, 1)[:clips],
        "index": torch.arange(clips),
    }


def test_parallel_and_sequential_steps_are_equal(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_jobs: list[int] = []
    monkeypatch.setattr(module, "run_in_parallel", lambda jobs: num_jobs.append(len(jobs)) or run_in_parallel(jobs))
    found = []
    for max_tokens in (0, 16):
        monkeypatch.setattr(module, "MAX_TOKENS_FOR_THREADING", max_tokens)
        net = _module()
        losses = net.losses(_batch())
        torch.stack([loss for loss, _ in losses.values()]).sum().backward()
        assert all(p.grad is None for m in net.modalities for p in net.teacher(m).parameters())
        found.append(([v.detach() for pair in losses.values() for v in pair],
                      [p.grad for p in net.parameters() if p.grad is not None]))  # fmt: skip
    assert num_jobs == [4]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_activation_checkpointing_runs_in_sequence(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(module, "run_in_parallel", lambda jobs: pytest.fail("encoders run in parallel"))
    net = _module()
    net.student.set_activation_checkpointing(True)
    torch.stack([loss for loss, _ in net.losses(_batch()).values()]).sum().backward()
    assert all(p.grad is not None for p in net.student.parameters())


@pytest.mark.parametrize("recomputes", [False, True])
def test_flops_are_those_of_a_step(recomputes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With and without the teachers; a teacher that is a file costs nothing but its head."""
    monkeypatch.setattr(module, "MAX_TOKENS_FOR_THREADING", 0)  # torch counts in this thread only
    cache = TeacherCache(tmp_path, num_draws=1, num_clips=2, widths=dict.fromkeys(BUILTIN_MODALITIES, 16), key={})
    net = _module(targets=TargetOptions(cache=cache, files={"other": torch.randn(2, 12)}))
    net.student.set_activation_checkpointing(recomputes)

    def step() -> None:
        net.training_step(_batch(), 0)["loss"].backward()

    flops = net.flops_per_clip(8)
    assert count_flops(step) == 2 * flops
    cache.write(0)
    cache.open(0)
    cache.is_cached = lambda epoch: True  # type: ignore[method-assign]
    cached_flops = net.flops_per_clip(8)
    assert count_flops(step) == 2 * cached_flops
    assert 0 < cached_flops < flops


def test_losses_are_those_of_the_formula() -> None:
    """MSE between the transfer head's output and the teacher's feature; the best constant feature is the mean."""
    net, batch = _module(), _batch()
    losses = net.losses(batch)
    feature = net.student.embed(net.input("rgb", batch), batch["visible"])
    for name, prediction in net.cmt(feature).items():
        target = net.teacher(name).embed(net.input(name, batch), batch["visible"]).detach()
        loss, constant_baseline = losses[name]
        torch.testing.assert_close(loss, mse_loss(prediction, target))
        torch.testing.assert_close(constant_baseline, mse_loss(target.mean(dim=0).expand_as(target), target))
        torch.testing.assert_close(net.targets(batch)[name], target)


def _train(net: MMDistill, *, num_steps: int = 3) -> dict[str, torch.Tensor]:
    """The state of student and transfer head after steps of AdamW; the first epoch ends after the second step."""
    optimizer = net.configure_optimizers()["optimizer"]
    for step in range(num_steps):
        optimizer.zero_grad()
        net.training_step(_batch(5), step)["loss"].backward()
        optimizer.step()
        if step == 1:
            net.on_train_epoch_end()
    return {k: v for k, v in net.state_dict().items() if k.startswith(("student_", "cmt."))}


def _scale_teacher(net: MMDistill, modality: str, factor: float) -> MMDistill:
    teacher = net.teacher(modality)
    embed = teacher.embed
    teacher.embed = lambda *inputs: embed(*inputs) * factor  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize("method", ["standard", "phi_s"])
def test_scale_of_a_teacher_does_not_change_the_standardized_training(method: str) -> None:
    own, scaled = (_module(targets=TargetOptions(method)) for _ in range(2))
    assert all(
        torch.equal(value, other)
        for value, other in zip(
            _train(own).values(), _train(_scale_teacher(scaled, "flow", 1024.0)).values(), strict=True
        )
    )
    plain = _module(), _scale_teacher(_module(), "flow", 1024.0)
    assert not torch.equal(*(_train(net)["cmt.mlp_to_flow.2.weight"] for net in plain))


def test_standardized_losses_are_those_of_the_formula() -> None:
    net, batch = _module(targets=TargetOptions("standard")), _batch(5)
    losses = net.losses(batch)
    prediction = net.cmt(net.student.embed(net.input("rgb", batch), batch["visible"]))["flow"]
    raw = net.teacher("flow").embed(net.input("flow", batch), batch["visible"]).detach()
    target = (raw - raw.mean(dim=0)) / raw.std(dim=0, unbiased=False)
    torch.testing.assert_close(losses["flow"][0], mse_loss(prediction, target), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["flow"][1], torch.tensor(1.0))  # the variance of the targets


def test_statistics_are_those_of_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    net = _module(targets=TargetOptions("standard"))
    net.losses(_batch())
    assert net.standardizer("rgb").count == 2
    net.eval()
    net.losses(_batch())
    monkeypatch.setattr(MMDistill, "current_epoch", 1)
    net.train()
    net.losses(_batch())
    assert net.standardizer("rgb").count == 2


def test_weights_multiply_the_losses() -> None:
    net = _module(targets=TargetOptions(weights={"flow": 3.0, "rgb": 0.0}))
    found = net.training_step(_batch(), 0)
    losses = {name: loss for name, (loss, _) in net.losses(_batch()).items()}
    torch.testing.assert_close(found["loss"], 3 * losses["flow"] + losses["skeleton"])
    assert found["values"]["train_loss_rgb"] == pytest.approx(losses["rgb"].item())  # without its weight


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"standardize_targets": True}, r"trainer\.standardize_targets=standard, this run has phi_s"),
        ({}, r"trainer\.standardize_targets=false, this run has phi_s"),
        (
            {"standardize_targets": "phi_s", "teacher_weights": {"rgb": 2}},
            r"teacher_weights=\{'rgb': 2.0\}, this run has \{'rgb': 1.0\}",
        ),
    ],
)
def test_resume_needs_the_same_targets(stored: dict[str, Any], message: str) -> None:
    net = _module(targets=TargetOptions("phi_s"))
    with pytest.raises(CheckpointError, match=message):
        net.on_load_checkpoint({"state_dict": net.state_dict(), "mmdistill": {"config": {"trainer": stored}}})


@pytest.mark.parametrize("name", ["motion", "last_k", "segments", "halves", "person"])
def test_student_and_teachers_have_the_same_pooling(name: str) -> None:
    net, batch = _module(student=StudentOptions(pooling=Pooling(name, 2)), num_frames=8), _batch(num_frames=8)
    batch["motion"] = torch.rand(2, 64, generator=torch.Generator().manual_seed(2))
    weights = batch["motion"] if name == "motion" else None
    if name == "person":
        weights = person_weights(batch["skeleton"], batch["crop_box"], (4, 4, 4))
    losses = net.losses(batch)

    def embed(encoder: Encoder, modality: str) -> torch.Tensor:
        x = net.input(modality, batch)
        tokens = encoder(x, batch["visible"]) if name != "last_k" else encoder(x, batch["visible"], 2)
        return Pooling(name, 2)(tokens, batch["visible"], (4, 4, 4), weights)

    feature = embed(net.student, "rgb")
    assert feature.shape[1] == 16 * {"segments": 3, "halves": 2}.get(name, 1)
    for modality, prediction in net.cmt(feature).items():
        target = embed(net.teacher(modality), modality)
        torch.testing.assert_close(losses[modality][0], mse_loss(prediction, target))
    evaluated = net.validation_step(batch, 0)
    whole = Pooling("mean" if name == "person" else name, 2)
    expected = net.student.embed(net.input("rgb", batch), None, whole, batch["motion"])
    torch.testing.assert_close(evaluated, expected)


def test_person_box_does_not_contain_extra_keypoints() -> None:
    net, batch = _module(student=StudentOptions(pooling=Pooling("person"))), _batch()
    expected = net.pooling_weights(batch)
    layout = net.specs["skeleton"].keypoints
    assert layout is not None
    net.specs["skeleton"] = get_modality("skeleton").spec(channels=18, keypoints=layout.with_more(("ball",), ()))
    corner = torch.ones(2, 4, 1, 1, 3)  # the ball is in a corner of the frame
    weights = net.pooling_weights({**batch, "skeleton": torch.cat([batch["skeleton"], corner], dim=3)})
    assert torch.equal(weights, expected)


def test_student_starts_as_a_copy_of_the_rgb_teacher() -> None:
    net = _module()
    for own, teacher in zip(net.student.parameters(), net.teacher("rgb").parameters(), strict=True):
        assert torch.equal(own, teacher)
        assert own is not teacher
        assert (own.requires_grad, teacher.requires_grad) == (True, False)


def test_teachers_and_average_stay_in_eval_mode() -> None:
    net = _module(ema=0.9)
    net.eval().train()
    assert net.student.training
    assert not any(net.teacher(m).training for m in net.modalities)
    assert not net.student_ema_rgb.training


def test_average_moves_towards_the_student() -> None:
    net = _module(ema=0.75)
    before = copy.deepcopy(net.student_ema_rgb)
    with torch.no_grad():
        for parameter in net.student_rgb.parameters():
            parameter.add_(1)
    net.update_average()
    for new, old in zip(net.student_ema_rgb.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)


def test_cached_epoch_reads_only_rgb(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, num_draws=1, num_clips=2, widths=dict.fromkeys(BUILTIN_MODALITIES, 16), key={})
    net, batch = _module(targets=TargetOptions(cache=cache)), _batch()
    expected = {name: loss.item() for name, (loss, _) in net.losses(batch).items()}  # epoch 0 fills the cache
    cache.write(0)
    cache.open(0)
    cache.is_cached = lambda epoch: True  # type: ignore[method-assign]
    rgb_only = {name: value for name, value in batch.items() if name not in ("flow", "skeleton")}
    found = {name: loss.item() for name, (loss, _) in net.losses(rgb_only).items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_cached_features_give_the_same_standardized_targets(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, num_draws=1, num_clips=5, widths=dict.fromkeys(BUILTIN_MODALITIES, 16), key={})
    net, batch = _module(targets=TargetOptions("standard", cache=cache)), _batch(5)
    net.losses(batch)  # fills the cache and the statistics
    cache.write(0)
    cache.open(0)
    computed, cached = net.targets(batch), cache.features(1, batch["index"])
    assert all(torch.equal(net.target(name, computed[name]), net.target(name, cached[name])) for name in computed)


def test_checkpoint_must_have_an_average_if_the_run_has_one() -> None:
    net = _module(ema=0.9)
    with pytest.raises(CheckpointError, match=r"no average of the student .* trainer\.ema=0\.9"):
        net.on_load_checkpoint({"state_dict": _module().state_dict(), "mmdistill": {}})


def test_student_only_checkpoint_gets_the_runs_teachers() -> None:
    digests = {f"teacher_{name}": {"sha256": name} for name in BUILTIN_MODALITIES}
    net = _module(sources=digests)
    own = net.state_dict()
    student_only = {k: v for k, v in own.items() if not k.startswith("teacher_")}
    checkpoint = {"state_dict": student_only, "mmdistill": {"teachers": digests}, "lr_schedulers": [1]}
    net.on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == own.keys()
    assert checkpoint["lr_schedulers"] == []
    other = {**digests, "teacher_flow": {"sha256": "other"}}
    with pytest.raises(CheckpointError, match="teacher_flow of sha256 other; this run's teacher_flow has flow"):
        net.on_load_checkpoint({"state_dict": student_only, "mmdistill": {"teachers": other}})


def test_teachers_are_removed_from_a_student_only_checkpoint() -> None:
    net = _module(save_teachers=False)
    checkpoint = {"state_dict": net.state_dict()}
    net.on_save_checkpoint(checkpoint)
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"student_rgb", "cmt"}


def test_average_keeps_the_names_of_its_tensors() -> None:
    """`AveragedModel` would add a prefix and a count."""
    names = {name.removeprefix("student_ema_rgb.") for name in _module(ema=0.9).state_dict() if "_ema_" in name}
    assert names == {name.removeprefix("student_rgb.") for name in _module().state_dict() if "student_rgb" in name}
