"""Values reach Hydra as typed, also with characters that its grammar rejects."""

import pytest

from mmdistill.config import DistillConfig
from mmdistill.config.compose import load_config
from mmdistill.config.overrides import add_overrides, is_override, quote_overrides, without_option_values
from tests.configs import TEACHERS


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("ckpt_path=/p/epoch=49-train_loss=0.0081.ckpt", "ckpt_path='/p/epoch=49-train_loss=0.0081.ckpt'"),
        ("ckpt_path='/p/epoch=49.ckpt'", "ckpt_path='/p/epoch=49.ckpt'"),
        ("trainer.ckpt_path=[/a/epoch=1-loss=2,/b]", "trainer.ckpt_path=['/a/epoch=1-loss=2',/b]"),
        ("trainer.ckpt_path={rgb:/a/epoch=1,flow:/b}", "trainer.ckpt_path={rgb:'/a/epoch=1',flow:/b}"),
        ("ckpt_path=/a/epoch=1,/a/epoch=2", "ckpt_path='/a/epoch=1','/a/epoch=2'"),
        ("trainer.epochs=3", "trainer.epochs=3"),
        ("trainer.lr=choice(0.1,0.2)", "trainer.lr=choice(0.1,0.2)"),
        ("data_module.frame_pattern={video}/{frame}", "data_module.frame_pattern='{video}/{frame}'"),
        ("--config-name=config_mmdistill_tennis", "--config-name=config_mmdistill_tennis"),
        ("-m", "-m"),
        ("ckpt_path=/it's/epoch=1", "ckpt_path='/it\\'s/epoch=1'"),
    ],
)
def test_values_with_special_characters_are_quoted(argument: str, quoted: str) -> None:
    assert quote_overrides([argument]) == [quoted]


@pytest.mark.parametrize(
    "path", ["/p/epoch=49-train_loss=0.0081.ckpt", "/a b/epoch=1", "/x[1]/epoch=2", "/it's/epoch=3", "/数据/epoch=4"]
)
def test_quoted_path_arrives_unchanged(path: str) -> None:
    assert load_config(DistillConfig, "config_mmdistill", [TEACHERS, f"ckpt_path={path}"]).ckpt_path == path


def test_quoted_list_arrives_unchanged() -> None:
    given = ["trainer.ckpt_path=[/a/epoch=1-loss=2,/b/c=d/e=f,/g]"]
    config = load_config(DistillConfig, "config_mmdistill", given)
    assert config.trainer.ckpt_path == ["/a/epoch=1-loss=2", "/b/c=d/e=f", "/g"]


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]])
def test_local_rank_is_removed_in_each_spelling(flag: list[str]) -> None:
    assert quote_overrides(["a=1", *flag, "b=2"]) == ["a=1", "b=2"]


def test_options_and_words_are_no_overrides() -> None:
    assert [a for a in ("a=1", "+a.b=1", "~a=1", "-m", "--config-name=x", "x") if is_override(a)] == [
        "a=1",
        "+a.b=1",
        "~a=1",
    ]


def test_added_overrides_follow_the_last_override() -> None:
    assert add_overrides(["--config-name", "x", "a=1", "-m"], ["b=2"]) == ["--config-name", "x", "a=1", "b=2", "-m"]
    assert add_overrides(["-m", "a=1"], ["b=2"]) == ["-m", "a=1", "b=2"]
    assert add_overrides(["--config-name=x"], ["b=2"]) == ["--config-name=x", "b=2"]


def test_options_are_moved_before_the_overrides() -> None:
    given = [
        "modality=rgb",
        "--config-name=config_pretrain_tennis",
        "model=tiny",
        "--config-dir",
        "/data/c",
        "a=1",
        "-m",
    ]
    options = ["--config-name=config_pretrain_tennis", "--config-dir", "/data/c", "-m"]
    assert quote_overrides(given) == [*options, "modality=rgb", "model=tiny", "a=1"]


def test_values_of_options_are_left_out() -> None:
    argv = [
        "-m",
        "modality",
        "--config-name",
        "x",
        "--config-dir=d",
        "rgb",
        "--multirun",
        "flow",
        "--info",
        "--modality",
    ]
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert without_option_values(argv) == [(i, argv[i]) for i in kept]
    assert without_option_values([]) == []
