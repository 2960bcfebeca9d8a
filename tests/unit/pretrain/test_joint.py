"""Joint pretraining: its loss against a written-out formula, and whole trainings on tiny data."""

import csv
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from mmdistill.builders import make_clip_dataset, make_decoder_config, make_source_dataset
from mmdistill.checkpoint import load_encoder, load_weights
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.config import ConfigError, PretrainConfig
from mmdistill.data.joint import JointDataset
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE, Process
from mmdistill.models.joint import JointVideoMAE
from mmdistill.models.videomae import Encoder, VideoMAE
from mmdistill.pretrain.joint import JointLoss, describe_terms, label_entropy, make_joint_loss
from mmdistill.pretrain.trainer import PretrainTrainer, pretrain
from mmdistill.training.train_data import make_train_data
from tests.configs import pretrain_config, source_override
from tests.flops import count_flops
from tests.tiny_data import MODEL, make_tiny, overrides

CLASSES = [f"near_deuce_stroke_fh_gs_{direction}_-_in" for direction in ("CC", "DL", "T", "W")]
MEAN, TARGET_STD, SOURCE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.5, 0.5, 0.5]
SOURCE = "data_module.modalities.rgb.std=[0.5]", "data_module.name=labeled"  # other statistics than the target


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """12 target clips, and 8 clips of a source of 4 classes."""
    root = tmp_path_factory.mktemp("tiny")
    target, source = overrides(make_tiny(root / "a", per_class=1)), overrides(make_tiny(root / "b", per_class=2))
    return [*target, source_override(*source, *SOURCE)]


def _config(data: list[str], *more: str) -> PretrainConfig:
    fixed = ["modality=rgb", "accelerator=cpu", "batch_size=2", "trainer.lr=0.1", "trainer.image_every_n_epochs=0"]
    return pretrain_config(*data, *MODEL, *fixed, *more)


class _Case:
    """A batch of 3 clips and a network with random classifier."""

    def __init__(self, config: PretrainConfig) -> None:
        assert config.source is not None
        target = make_clip_dataset(config.data_module, ("rgb",), training=True, seed=0)
        source = make_source_dataset(config.source, "rgb", seed=0)
        joint = JointDataset(target, source)
        self.batch = default_collate([joint[(0, i), (0, 2 * i)] for i in range(3)])
        found = make_joint_loss(config, source)
        assert found is not None
        self.loss: JointLoss = found
        torch.manual_seed(0)
        sizes = (self.loss.encoder, make_decoder_config(config.model))
        classes = self.loss.num_classes
        self.model = JointVideoMAE(*sizes, num_classes=classes) if classes else VideoMAE(*sizes)

    def __call__(self, predict: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        target = self.input(self.batch, TARGET_STD)
        return self.loss(self.model, target, self.batch["source"], self.batch["visible"], predict)

    @staticmethod
    def input(sample: Mapping[str, Any], std: list[float]) -> torch.Tensor:
        """(3, 3, T, 32, 32): the crop of each clip, normalized."""
        clips = []
        for clip, box in zip(sample["rgb"].double() / 255, sample["crop_box"].int().tolist(), strict=True):
            cut = clip[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]  # (T, h, w, 3)
            clips.append(((cut - torch.tensor(MEAN)) / torch.tensor(std)).movedim(3, 0))
        return torch.stack(clips).float()

    def reconstruction(self, x: torch.Tensor, predict: torch.Tensor | None = None) -> tuple[float, float]:
        """Mean squared error of the removed tokens of the target motion_energy, and that of the best constants.

        With `predict` of these tokens only.
        """
        prediction, removed = VideoMAE.forward(self.model, x, self.batch["visible"], predict)
        energy = (x - x.mean(dim=2, keepdim=True)).abs().double().numpy()
        errors, values = [], []
        for clip in range(len(x)):
            for token, predicted in zip(removed[clip].tolist(), prediction[clip].detach().numpy(), strict=True):
                t, h, w = token // 16, token // 4 % 4, token % 4
                patch = energy[clip, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
                values.append(patch.reshape(3, -1))
                errors.append((predicted.astype(np.float64) - patch.reshape(-1)) ** 2)
        return float(np.mean(errors)), float(np.concatenate(values, axis=1).var(axis=1).mean())


WEIGHTS = ["trainer.lambda_source=0.5", "trainer.lambda_target=2.0", "trainer.lambda_ce={rgb: 0.3, flow: 9}"]


def test_loss_equals_its_formula(data: list[str]) -> None:
    """0.5 * reconstruction(source) + 2 * reconstruction(target) + 0.3 * cross-entropy; constant baselines likewise."""
    case = _Case(_config(data, *WEIGHTS))
    loss, values = case()
    source, labels = _Case.input(case.batch["source"], SOURCE_STD), case.batch["source"]["label"].tolist()
    of_target, flat_target = case.reconstruction(_Case.input(case.batch, TARGET_STD))
    of_source, flat_source = case.reconstruction(source)
    assert isinstance(case.model, JointVideoMAE)
    tokens = case.model.encoder(source, case.batch["visible"])
    scores = case.model.classify(tokens).detach().double().numpy()
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    entropy = -np.mean([np.log(shares[i, label]) for i, label in enumerate(labels)])
    flat_entropy = np.log(4)  # 4 classes of 2 clips
    expected = {
        "constant_baseline_loss": 2 * flat_target + 0.5 * flat_source + 0.3 * flat_entropy,
        "loss_target": of_target, "constant_baseline_loss_target": flat_target,
        "loss_source": of_source, "constant_baseline_loss_source": flat_source,
        "loss_ce": entropy, "constant_baseline_loss_ce": flat_entropy,
        "accuracy_source": np.mean(scores.argmax(axis=1) == labels),
    }  # fmt: skip
    assert {name: float(value.detach()) for name, value in values.items()} == pytest.approx(expected, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(2 * of_target + 0.5 * of_source + 0.3 * entropy, rel=1e-5)


def test_dual_masking_predicts_the_same_tokens_of_both_clips(data: list[str]) -> None:
    """Other ones for each pair of clips."""
    case = _Case(_config(data, *WEIGHTS))
    removed = [sorted({*range(32)} - {*row}) for row in case.batch["visible"].tolist()]
    predict = torch.tensor([row[i : i + 4] for i, row in enumerate(removed)])
    _, values = case(predict)
    for name, sample, std in (("target", case.batch, TARGET_STD), ("source", case.batch["source"], SOURCE_STD)):
        expected = case.reconstruction(_Case.input(sample, std), predict)
        found = values[f"loss_{name}"], values[f"constant_baseline_loss_{name}"]
        assert [float(value.detach()) for value in found] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("more", "terms"),
    [
        ("trainer.lambda_target=0", {"source", "ce"}),
        ("trainer.lambda_source=0", {"target", "ce"}),
        ("trainer.lambda_ce=0", {"target", "source"}),
        ("data_module.mask_ratio=0", {"ce"}),
    ],
)
def test_terms_without_a_weight_are_left_out(data: list[str], more: str, terms: set[str]) -> None:
    """Also if nothing is reconstructed, each parameter has a gradient, which ZeRO needs."""
    case = _Case(_config(data, more))
    loss, values = case()
    assert {name.removeprefix("loss_") for name in values if name.startswith("loss_")} == terms
    weights = {"target": 1.0, "source": 1.0, "ce": 0.05}
    total = sum(weights[term] * float(values[f"loss_{term}"].detach()) for term in terms)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in case.model.parameters())


def test_entropy_of_the_labels() -> None:
    assert label_entropy(np.array([4, 4, 7, 4])) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_log_line_of_the_terms() -> None:
    assert describe_terms({"loss": 1.0, "constant_baseline_loss": 2.0}) == ""
    means = {"loss_ce": 0.5, "constant_baseline_loss_ce": 2.0, "accuracy_source": 0.25}
    assert describe_terms(means) == ": ce 0.5000 (ratio to constant baseline 0.250), accuracy of the source 0.250"


def test_a_source_needs_two_classes(data: list[str]) -> None:
    config = _config(data, "source.label_fields=[side]")
    assert config.source is not None
    with pytest.raises(
        ConfigError, match=r"unlabel\.json: its 8 clips have 1 class.*; set source\.unlabel_json_path"
    ) as caught:
        make_source_dataset(config.source, "rgb", seed=0)
    assert "1 class (with source.label_fields=[side]), and" in str(caught.value)
    assert str(caught.value).endswith(", or choose other source.label_fields")
    with pytest.raises(ConfigError, match=r"source\.unlabel_json_path: .*absent\.json does not exist; set source\."):
        pretrain(_config(data, "source.unlabel_json_path=absent.json"), Path("unused"))


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.lambda_ce=0"],
        ["trainer.lambda_source=0"],
        ["trainer.lambda_target=0"],
        ["trainer.lambda_source=0", "trainer.lambda_target=0"],
        ["data_module.mask_ratio=0"],
    ],
)
def test_flops_are_those_of_a_step(data: list[str], options: list[str]) -> None:
    config = _config(data, *options)
    case = _Case(config)
    device, trainer = torch.device("cpu"), object.__new__(PretrainTrainer)
    trainer.config, trainer.joint, trainer.encoder_config = config, case.loss, case.loss.encoder
    trainer.decoder_config = make_decoder_config(config.model)
    trainer.data = make_train_data(config, ("rgb",), Process(device, 0, 1))
    counted = count_flops(lambda: case()[0].backward())
    assert counted == 3 * trainer.flops_per_clip > 0


def _rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        timed = ("clips_per_s", "data_wait_percent", "mfu_percent")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def test_a_training_in_two_parts_is_bit_identical(
    data: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped in its 8th batch, the second of the second epoch, with dropout."""
    more = ["trainer.classifier_dropout=0.5", "trainer.lambda_ce=1"]
    full = pretrain(_config(data, *more), tmp_path / "full")
    original, num_batches = PretrainTrainer.losses, 0

    def stop_in_the_8th(self: Any, batch: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "losses", stop_in_the_8th)
        with pytest.raises(SystemExit) as stopped:
            pretrain(_config(data, *more), tmp_path / "parts")
    assert stopped.value.code == INTERRUPTED_EXIT_CODE
    assert len(list((tmp_path / "parts" / "checkpoints").glob("epoch=01-*-step=8"))) == 1
    last = pretrain(_config(data, *more, "resume=auto"), tmp_path / "parts")
    own, expected = read_checkpoint(last), read_checkpoint(full)
    assert own.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(own.state_dict[name], x) for name, x in expected.state_dict.items())
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "full")
    terms = {f"{name}_{term}" for name in ("loss", "constant_baseline_loss") for term in ("target", "source", "ce")}
    assert terms | {"accuracy_source"} <= _rows(tmp_path / "full")[0].keys()
    log = (tmp_path / "full" / "run.log").read_text()
    assert "source of 8 clips of 4 classes" in log
    assert "; loss 1 * reconstruction of target + 1 * reconstruction of source + 1 * cross-entropy of 4 classes" in log
    assert ", ce 1." in log
    _check_checkpoint(full)
    with pytest.raises(ConfigError, match=r"source std \[0\.5, 0\.5, 0\.5\] / \[0\.4, 0\.4, 0\.4\]"):
        pretrain(_config(data, *more, "source.modalities.rgb.std=[0.4]", "resume=auto"), tmp_path / "parts")
    for other in ("source=null", "trainer.lambda_ce=0"):
        changed = ["trainer.lambda_ce=0.05", "trainer.classifier_dropout=0"] if other == "source=null" else more[:1]
        with pytest.raises(
            ConfigError, match=r"\(checkpoint / run\): source classes 4 \(sha256 \w+\) / 0 \(sha256 \w+\)"
        ):
            pretrain(_config(data, *changed, other, "resume=auto"), tmp_path / "parts")


def _check_checkpoint(path: Path) -> None:
    """Both statistics and the classes are in the metadata, and the classifier is ignored and counted by an encoder."""
    meta = read_checkpoint(path).meta
    assert meta["statistics"]["rgb"]["std"] == [0.229, 0.224, 0.225]
    source = meta["source"]
    assert (source["dataset"], source["statistics"]["rgb"]["std"]) == ("labeled", [0.5, 0.5, 0.5])
    assert source["classes"] == CLASSES
    encoder = load_encoder(path)
    assert isinstance(encoder, Encoder)
    ignored = load_weights(encoder, path).ignored_keys
    assert (ignored["fc_norm"], ignored["head_action"]) == (2, 2)


def test_a_source_clip_that_gives_a_nan_is_named(
    data: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sum of all terms is checked."""
    original = JointLoss.__call__

    def nan_in_the_cross_entropy(self: Any, *arguments: Any) -> Any:
        loss, values = original(self, *arguments)
        return loss + values["loss_ce"] * float("nan"), values

    monkeypatch.setattr(JointLoss, "__call__", nan_in_the_cross_entropy)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0 .* Clips: rally.*'source rally_\w+#0@6'"):
        pretrain(_config(data), tmp_path)


def test_without_a_source_a_mask_must_remove_tokens(data: list[str]) -> None:
    config = _config(data, "source=null", "data_module.mask_ratio=0.02")  # of 16 positions
    with pytest.raises(ConfigError, match=r"data_module\.mask_ratio=0\.02 removes no token, so there is nothing"):
        make_joint_loss(config, None)


def test_a_validation_does_not_score_classes_of_the_source(data: list[str], tmp_path: Path) -> None:
    """The log names the reason; the other metrics of the validation are computed."""
    more = ["trainer.epochs=1", "trainer.check_val_every_n_epoch=1", "trainer.val_episodes=2", "data_module.n_way=2"]
    pretrain(_config(data, *more, "data_module.q_sample=1"), tmp_path)
    log = (tmp_path / "run.log").read_text()
    assert "no val_top1_action: the network was pretrained with labels of 4 classes of the evaluation" in log
    (row,) = _rows(tmp_path)
    assert "val_top1_action" not in row
    assert float(row["held_out_loss"]) > 0
