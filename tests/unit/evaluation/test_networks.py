from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError
from mmdistill.evaluation.networks import load_network, random_network
from mmdistill.fewshot.encode import Views
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import get_modality
from mmdistill.models.videomae import Encoder, EncoderConfig

SIZES = {"rgb": (4, 32, 32), "flow": (4, 32, 32), "skeleton": (4, 16, 16)}


def encoder(channels: int, seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(channels, 4, 32, 32, 8, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256))


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """A distilled checkpoint as another program might write it: weights only."""
    parts = {"student_rgb": encoder(3, 0), "teacher_rgb": encoder(3, 1), "teacher_flow": encoder(2, 2)}
    state = {f"{part}.encoder.{k}": v for part, e in parts.items() for k, v in e.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "epoch=01-train_loss=0.5.ckpt")
    return tmp_path / "epoch=01-train_loss=0.5.ckpt"


@pytest.mark.parametrize(
    ("part", "name", "modality", "seed"),
    [
        (None, "student_rgb", "rgb", 0),
        ("teacher_rgb", "teacher_rgb", "rgb", 1),
        ("teacher_flow", "teacher_flow", "flow", 2),
    ],
)
def test_any_part_of_a_distilled_checkpoint(distilled: Path, part: str | None, name: str, modality: str, seed: int):
    network = load_network(distilled, part=part, input_sizes=SIZES, token_grid=(4, 4))
    assert (network.name, network.modality, network.checkpoint) == (name, modality, str(distilled))
    assert torch.equal(
        network.encoder.blocks[0].mlp.fc1.weight, encoder(3 if modality == "rgb" else 2, seed).blocks[0].mlp.fc1.weight
    )
    job = network.job(get_modality(modality).spec(), Views())
    assert job.network == name
    assert job.info == {"checkpoint": str(distilled), "modality": modality}


def test_a_pretraining_checkpoint_is_named_by_its_modality(tmp_path: Path):
    torch.save({"model": {f"encoder.{k}": v for k, v in encoder(2, 0).state_dict().items()}}, tmp_path / "f.pth")
    assert load_network(tmp_path / "f.pth", input_sizes=SIZES, token_grid=(4, 4)).name == "pretrained_flow"


def test_wrong_parts_modalities_and_specs_are_refused(distilled: Path):
    with pytest.raises(CheckpointError, match="student_rgb, teacher_rgb, teacher_flow"):
        load_network(distilled, part="teacher_skeleton", input_sizes=SIZES, token_grid=(4, 4))
    with pytest.raises(FewshotError, match="teacher_flow is of the modality flow, not rgb"):
        load_network(distilled, part="teacher_flow", modality="rgb", input_sizes=SIZES, token_grid=(4, 4))
    with pytest.raises(FewshotError, match="takes rgb with 3 channels, the data are flow"):
        load_network(distilled, input_sizes=SIZES, token_grid=(4, 4)).spec(get_modality("flow").spec())


def test_the_random_network_is_seeded_and_leaves_the_generator_alone(distilled: Path):
    student = load_network(distilled, input_sizes=SIZES, token_grid=(4, 4))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (random_network(student, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    weight = [n.encoder.blocks[0].attn.qkv.weight for n in (a, b, c, student)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3])
    assert (a.name, a.checkpoint) == ("random", "")


def test_statistics_precision_and_weights_are_in_the_cache_key(distilled: Path):
    student = load_network(distilled, input_sizes=SIZES, token_grid=(4, 4))
    spec = get_modality("rgb").spec()
    keys = {
        student.job(spec, Views()).key("d"),
        student.job(spec.with_statistics((0.0,), (1.0,)), Views()).key("d"),
        student.job(spec, Views(), precision="bf16").key("d"),
        random_network(student, seed=7).job(spec, Views()).key("d"),
    }
    assert len(keys) == 4


def test_wrong_resolution_without_metadata_is_an_error(tmp_path: Path) -> None:
    """Patch 16 at 64 x 64 fits heat-maps of 16 x 16 by the rule "size of the input", with a grid of one token."""
    config = EncoderConfig(17, 4, 64, 64, 16, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256)
    torch.save({"model": {f"encoder.{k}": v for k, v in Encoder(config).state_dict().items()}}, tmp_path / "s.pth")
    with pytest.raises(FewshotError, match=r"\(4, 64, 64\), the data give \(4, 16, 16\)"):
        load_network(tmp_path / "s.pth", input_sizes=SIZES, token_grid=(4, 4))
