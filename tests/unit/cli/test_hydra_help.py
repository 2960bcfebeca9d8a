"""``--help`` and the options of the verbs with a Hydra config."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdistill.cli.distill import main as distill
from mmdistill.cli.evaluate import main as evaluate
from mmdistill.cli.hydra_help import parse_options, render_help
from mmdistill.cli.pretrain import main as pretrain
from mmdistill.config import DistillConfig, PretrainConfig
from mmdistill.config.error_messages import known_keys


@pytest.mark.parametrize(
    ("schema", "config_name", "offered", "rejected"),
    [
        (
            PretrainConfig,
            "config_pretrain",
            ("model=", "pretrain_modalities"),
            ("teachers", "k_shot", "n_masks", "trainer=mmdistill", "| mmdistill"),
        ),
        (
            DistillConfig,
            "config_mmdistill",
            ("teachers", "k_shot", "mmdistill_demo"),
            ("model=", "pretrain_modalities", "trainer=pretrain"),
        ),
    ],
)
def test_help_explains_every_key_and_offers_accepted_groups_only(
    schema: type[PretrainConfig] | type[DistillConfig],
    config_name: str,
    offered: tuple[str, ...],
    rejected: tuple[str, ...],
) -> None:
    shown = render_help("usage: x", schema, config_name, parse_options(["trainer.epochs=7"]))
    lines = shown.splitlines()
    assert lines[0] == "usage: x"
    assert "  trainer.epochs=7" in lines
    groups = shown[: shown.index("Keys (")]
    assert all(text in groups for text in offered)
    assert not any(text in groups for text in rejected)
    described = {line.strip().partition("=")[0] for line in lines if line.startswith("  ") and line[2] != " "}
    parents = ("data_module", "trainer", "model", "data_module.modalities")
    assert {key for key in known_keys(schema) if key not in parents} <= described
    keys = lines[lines.index(next(line for line in lines if line.startswith("Keys ("))) + 2 :]
    for line, following in itertools.pairwise(keys):
        is_key = not line.startswith("      ")
        assert not is_key or following.startswith("      "), f"{line} has no description"


def test_evaluation_offers_no_sweep_over_keys_of_the_training() -> None:
    """All jobs of such a sweep would have the same result."""
    shown = render_help("", DistillConfig, "config_mmdistill", parse_options(["train=False"]))
    (experiments,) = [line for line in shown.splitlines() if line.startswith("  experiment=")]
    assert experiments == "  experiment=k_shot | mm_cdfsl | n_masks | standardized_segments"


@pytest.mark.parametrize("experiment", ["teachers", "mask_ratio", "pretrain_mask_ratio"])
def test_evaluation_rejects_a_sweep_over_keys_of_the_training(
    experiment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        evaluate(["ckpt_path=x", f"experiment={experiment}"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"mmdistill evaluate: error: experiment={experiment}: not a config for `mmdistill evaluate`; choose one of "
        "k_shot, mm_cdfsl, n_masks, standardized_segments\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [pretrain, distill, evaluate])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--helpp"], "--helpp: unknown option; did you mean --help?"),
        (["--config-nam=x"], "--config-nam: unknown option; did you mean --config-name?"),
        (["--config-name"], "--config-name/-cn: expected one argument"),
    ],
)
def test_wrong_option_is_one_sentence(
    main: object, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)  # type: ignore[operator]
    verb = main.__module__.rpartition(".")[2]
    assert capsys.readouterr().err == f"mmdistill {verb}: error: {message}\n"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            pretrain,
            ["modality=rgb", "trainer=mmdistill"],
            "trainer=mmdistill: {}pretrain`; choose one of pretrain, pre",
        ),
        (pretrain, ["modality=rgb", "experiment=teachers"], "experiment=teachers: {}pretrain`; choose one of"),
        (distill, ["trainer=pretrain"], "trainer=pretrain: {}distill`; choose one of mm_distill"),
        (distill, ["model=small"], "model: distillation and evaluation use the model of the checkpoint; remove model"),
    ],
)
def test_group_of_the_other_phase_is_one_sentence(
    main: Callable[[list[str]], int],
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])  # the verbs set it
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f" error: {message.format('not a config for `mmdistill ')}" in capfd.readouterr().err


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mmdistill evaluate ckpt_path=PATH ")
    assert "\n  train=false\n      whether to train\n" in shown
