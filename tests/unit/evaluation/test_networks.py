from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, read_checkpoint, save_torch
from mmdistill.config import ConfigError, DataModuleConfig, DistillConfig
from mmdistill.evaluation.networks import load_network, load_networks, make_random_network
from mmdistill.fewshot.encode import EvalMasks
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import get_modality
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.configs import distill_config

TINY = ("data_module.num_frames=4", "data_module.crop_size=[32,32]", "data_module.patch_size=8")


def make_config(*overrides: str) -> DistillConfig:
    return distill_config("train=False", "ckpt_path=x", *TINY, *overrides)


@pytest.fixture(scope="module")
def data() -> DataModuleConfig:
    return make_config().data_module


def encoder(channels: int, seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(channels, 4, 32, 32, 8, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256))


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """A distilled checkpoint as another program might write it: weights only."""
    components = {"student_rgb": encoder(3, 0), "teacher_rgb": encoder(3, 1), "teacher_flow": encoder(2, 2)}
    state = {f"{name}.encoder.{k}": v for name, e in components.items() for k, v in e.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "epoch=01-train_loss=0.5.ckpt")
    return tmp_path / "epoch=01-train_loss=0.5.ckpt"


@pytest.mark.parametrize(
    ("component", "name", "modality", "seed"),
    [
        (None, "student_rgb", "rgb", 0),
        ("teacher_rgb", "teacher_rgb", "rgb", 1),
        ("teacher_flow", "teacher_flow", "flow", 2),
    ],
)
def test_any_component_of_a_distilled_checkpoint_is_loaded(
    distilled: Path, data: DataModuleConfig, component: str | None, name: str, modality: str, seed: int
):
    network = load_network(distilled, component=component, data=data)
    assert (network.name, network.modality, network.checkpoint) == (name, modality, str(distilled))
    assert torch.equal(
        network.encoder.blocks[0].mlp.fc1.weight, encoder(3 if modality == "rgb" else 2, seed).blocks[0].mlp.fc1.weight
    )
    job = network.encoding_job(get_modality(modality).spec(), EvalMasks())
    assert job.network == name
    assert job.info == {"checkpoint": str(distilled), "modality": modality}


def test_a_pretraining_checkpoint_is_named_after_its_modality(tmp_path: Path, data: DataModuleConfig):
    torch.save({"model": {f"encoder.{k}": v for k, v in encoder(2, 0).state_dict().items()}}, tmp_path / "f.pth")
    assert load_network(tmp_path / "f.pth", data=data).name == "pretrained_flow"


def test_wrong_components_modalities_and_specs_raise_an_error(distilled: Path, data: DataModuleConfig):
    with pytest.raises(CheckpointError, match="student_rgb, teacher_rgb, teacher_flow"):
        load_network(distilled, component="teacher_skeleton", data=data)
    with pytest.raises(FewshotError, match="teacher_flow has the modality flow, not rgb"):
        load_network(distilled, component="teacher_flow", modality="rgb", data=data)
    with pytest.raises(FewshotError, match="needs rgb with 3 channels, but the input is flow with 2"):
        load_network(distilled, data=data).spec(get_modality("flow").spec())


def test_one_of_several_encoders_without_a_student_must_be_named(tmp_path: Path, data: DataModuleConfig):
    encoders = {"teacher_rgb": encoder(3, 1), "teacher_flow": encoder(2, 2)}
    state = {f"{name}.encoder.{k}": v for name, e in encoders.items() for k, v in e.state_dict().items()}
    path = tmp_path / "teachers.pt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"several encoders and no student; select one of teacher_rgb, teacher_f"):
        load_network(path, data=data)
    with pytest.raises(CheckpointError, match=r"^eval_component: .*'student_rgb'; select one of teacher_rgb, tea"):
        load_networks(make_config("baselines=[]"), read_checkpoint(path))
    (scored,), _ = load_networks(make_config("baselines=[]", "eval_component=teacher_flow"), read_checkpoint(path))
    assert (scored.name, scored.modality) == ("teacher_flow", "flow")


def test_flow_teacher_is_compared_with_an_untrained_flow_encoder(tmp_path: Path):
    """docs/runs.md gives this command, because the tables of a student contain no untrained flow encoder."""
    torch.save({"model": {f"encoder.{k}": v for k, v in encoder(2, 0).state_dict().items()}}, tmp_path / "f.pth")
    networks, messages = load_networks(make_config("baselines=[random]"), read_checkpoint(tmp_path / "f.pth"))
    assert [(n.name, n.modality) for n in networks] == [("pretrained_flow", "flow"), ("random", "flow")]
    assert messages == []


def test_the_random_network_is_seeded_and_does_not_advance_the_global_generator(
    distilled: Path, data: DataModuleConfig
):
    student = load_network(distilled, data=data)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (make_random_network(student, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    weight = [n.encoder.blocks[0].attn.qkv.weight for n in (a, b, c, student)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], weight[3])
    assert (a.name, a.checkpoint) == ("random", "none: untrained weights")


def test_untrained_encoder_of_a_teacher(distilled: Path) -> None:
    """`random_flow` has the architecture, the modality and the statistics of `teacher_flow`, and other weights."""
    baselines = "baselines=[random,teacher_flow,random_flow]"
    networks, messages = load_networks(make_config(baselines), read_checkpoint(distilled))
    _, random, teacher, untrained = networks
    assert messages == ["baselines: random_flow is an untrained encoder with the architecture of teacher_flow"]
    assert (random.modality, untrained.name, untrained.modality) == ("rgb", "random_flow", "flow")
    assert untrained.encoder.config == teacher.encoder.config
    assert untrained.statistics == teacher.statistics
    own, trained = untrained.encoder.state_dict(), teacher.encoder.state_dict()
    assert not torch.equal(own["blocks.0.attn.qkv.weight"], trained["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("component", "name"), [("student_rgb", "student_rgb"), ("encoder", "pretrained_rgb"), (None, "pretrained_rgb")]
)
def test_exported_student_keeps_its_name(
    component: str | None, name: str, data: DataModuleConfig, tmp_path: Path
) -> None:
    """`export` stores the component."""
    torch.save({"model": {f"encoder.{k}": v for k, v in encoder(3, 0).state_dict().items()}}, tmp_path / "student.pth")
    source = read_checkpoint(tmp_path / "student.pth")
    source.meta.update({} if component is None else {"component": component})
    assert [network.name for network in load_networks(make_config("baselines=[]"), source)[0]] == [name]
    assert load_network(source, data=data).name == name


def test_another_pooling_than_that_of_the_training_is_logged(distilled: Path) -> None:
    source = read_checkpoint(distilled)
    source.meta["pooling"] = "halves"
    for value, is_logged in (("null", False), ("halves", False), ("mean", True)):
        networks, messages = load_networks(make_config("baselines=[]", f"pooling={value}"), source)
        assert str(networks[0].pooling) == ("mean" if is_logged else "halves")
        line = f"pooling=mean: {distilled} was trained with pooling=halves; omit the key to use it"
        assert messages == ([line] if is_logged else [])


def test_untrained_encoder_of_a_missing_teacher_is_an_error(distilled: Path) -> None:
    with pytest.raises(CheckpointError, match=r"baselines: .*no component 'teacher_skeleton'"):
        load_networks(make_config("baselines=[random_skeleton]"), read_checkpoint(distilled))
    with pytest.raises(ConfigError, match=r"baselines=random_b: .*, or random_flow for an untrained encoder"):
        make_config("baselines=[random_b]")


def test_statistics_precision_and_weights_are_in_the_cache_key(distilled: Path, data: DataModuleConfig):
    student = load_network(distilled, data=data)
    spec = get_modality("rgb").spec()
    keys = {
        student.encoding_job(spec, EvalMasks()).cache_key("d"),
        student.encoding_job(spec.with_statistics((0.0,), (1.0,)), EvalMasks()).cache_key("d"),
        student.encoding_job(spec, EvalMasks(), precision="bf16").cache_key("d"),
        make_random_network(student, seed=7).encoding_job(spec, EvalMasks()).cache_key("d"),
    }
    assert len(keys) == 4


def test_wrong_resolution_without_metadata_raises_an_error(tmp_path: Path) -> None:
    """Patch 16 at 64 x 64 fits heat-maps of 16 x 16 by the rule "size of the input", with a grid of one token."""
    config = EncoderConfig(17, 4, 64, 64, 16, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256)
    torch.save({"model": {f"encoder.{k}": v for k, v in Encoder(config).state_dict().items()}}, tmp_path / "s.pth")
    with pytest.raises(ConfigError, match=r"\(checkpoint / data_module\): height 64 / 16, width 64 / 16, patch 16 / 4"):
        load_network(tmp_path / "s.pth", data=make_config("data_module.modalities.skeleton.input_stride=2").data_module)


def save_epochs(run_dir: Path, *names: str) -> list[str]:
    """Pretraining checkpoints of one run, with different weights."""
    paths = [run_dir / "checkpoints" / name for name in names]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": {f"encoder.{k}": v for k, v in encoder(3, seed).state_dict().items()}}, path)
    return [str(path) for path in paths]


def names_of(distilled: Path, *baselines: str) -> list[str]:
    listed = ",".join(f"'{path}'" for path in baselines)
    networks, messages = load_networks(make_config(f"baselines=[{listed}]"), read_checkpoint(distilled))
    assert messages == []
    return [network.name for network in networks]


def test_two_epochs_of_one_run_have_distinct_names(distilled: Path, tmp_path: Path):
    first, last = save_epochs(tmp_path / "2026" / "pretrain_rgb", "epoch=24-loss=0.5.pth", "epoch=49-loss=0.25.pth")
    other = save_epochs(tmp_path / "2027" / "pretrain_other", "last.pth")[0]
    assert names_of(distilled, first, other) == ["student_rgb", "pretrain_rgb", "pretrain_other"]
    distinct = ["pretrain_rgb (epoch=24-loss=0.5)", "pretrain_rgb (epoch=49-loss=0.25)"]
    assert names_of(distilled, first, other, last) == ["student_rgb", distinct[0], "pretrain_other", distinct[1]]


def test_runs_of_the_same_name_are_named_by_their_paths(distilled: Path, tmp_path: Path):
    paths = [save_epochs(tmp_path / day / "pretrain_rgb", "last.pth")[0] for day in ("monday", "tuesday")]
    assert names_of(distilled, *paths) == ["student_rgb", *paths]


def test_the_same_baseline_twice_raises_an_error(distilled: Path, tmp_path: Path):
    (path,) = save_epochs(tmp_path / "pretrain_rgb", "last.pth")
    for baselines in ((path, path), ("random", "random")):
        with pytest.raises(ConfigError, match="two networks have the same name"):
            names_of(distilled, *baselines)


def test_misspelled_baseline_is_reported_with_the_nearest_name(distilled: Path) -> None:
    known = "random, student_rgb, teacher_rgb, teacher_flow, random_rgb, random_flow"
    message = f"baselines: randm is not one of {known}, nor an existing path"
    with pytest.raises(ConfigError, match=rf"^{message}; did you mean random\?$"):
        names_of(distilled, "randm")


def test_default_baseline_that_the_checkpoint_lacks_is_skipped(tmp_path: Path) -> None:
    """Also in the check before the training; a baseline that the user names must exist."""
    state = {f"student_rgb.encoder.{k}": v for k, v in encoder(3, 0).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    networks, messages = load_networks(make_config(), read_checkpoint(tmp_path / "last.ckpt"))
    assert [network.name for network in networks] == ["student_rgb", "random"]
    path = tmp_path / "last.ckpt"
    assert messages == [f"baselines: skipping teacher_rgb: {path} has no such teacher; baselines=[random] omits it"]
    with pytest.raises(CheckpointError, match=r"baselines: .*no component 'teacher_rgb'; select one of student_rgb"):
        load_networks(make_config("baselines=[teacher_rgb]"), read_checkpoint(path))


def test_config_of_another_dataset_is_named(tmp_path: Path) -> None:
    config = EncoderConfig(3, 4, 64, 64, 16, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256)
    meta = {"kind": "pretrain", "modality": "rgb", "encoders": {"encoder": vars(config)}}
    meta["config"] = {"data_module": {"name": "tennis"}}
    state = {f"encoder.{k}": v for k, v in Encoder(config).state_dict().items()}
    save_torch({"module": state, "mmdistill": meta}, tmp_path / "rgb.pt")
    with pytest.raises(ConfigError, match=r"trained on dataset tennis, .* dataset demo: give the --config-name and"):
        load_network(tmp_path / "rgb.pt", data=make_config().data_module)
