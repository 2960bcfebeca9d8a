import json
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmdistill.checkpoint.find import find_checkpoints, select_checkpoints
from mmdistill.cli.find_checkpoints import (
    _nearest_config,
    config_arguments,
    distillation_command,
    evaluation_command,
    format_ckpt_path,
    format_size,
    main,
)
from mmdistill.config import DistillConfig, PretrainConfig, to_plain
from mmdistill.config.compose import CONFIGS, load_config
from mmdistill.config.overrides import quote_overrides
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import to_json
from tests.checkpoint_files import write_distilled, write_lightning, write_native, write_output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "output")


def parsed_path(command: str) -> Path:
    """``ckpt_path`` of a printed command, as the entrypoint reads it."""
    words = shlex.split(command)
    assert words[:2] == ["mmdistill", "evaluate"]
    assert "--config-name=config_mmdistill_tennis" in words
    (quoted,) = quote_overrides(words[-1:])
    return Path(str(OverridesParser.create().parse_override(quoted).value()))


def test_printed_list_and_command_can_be_pasted(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(output)]) == 0
    text = capsys.readouterr().out
    block = text[text.index("ckpt_path: [") : text.index("]\n") + 1]
    paths = yaml.safe_load(block)["ckpt_path"]
    assert [Path(p).parent.parent.name for p in paths] == ["pretrain_rgb", "pretrain_flow", "pretrain_skeleton"]
    assert all(Path(p).is_dir() for p in paths)
    distill = next(line for line in text.splitlines() if line.startswith("mmdistill distill "))
    assert all(path in distill for path in paths)
    command = next(line for line in text.splitlines() if line.startswith("mmdistill evaluate "))
    assert parsed_path(command).is_file()
    assert '"' not in command  # as the README shows it


def test_command_quotes_paths_that_hydra_does_not_accept(tmp_path: Path) -> None:
    output = write_output(tmp_path / """it's [1], "a" é""")
    info = select_checkpoints(find_checkpoints(output))["distilled"]
    assert parsed_path(evaluation_command(info)) == info.path


def test_json(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(output), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["checkpoints"]) == 8
    assert all(data["ckpt_path"])
    assert data["ckpt_path"][0] == data["chosen"]["rgb"]


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "No checkpoints found." in capsys.readouterr().out
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent: no such directory" in capsys.readouterr().err


def test_sizes() -> None:
    assert [format_size(n) for n in (7, 1500, 2_500_000, 3 * 10**9)] == ["7 B", "2 KB", "2.5 MB", "3.0 GB"]


def test_command_selects_the_config_and_the_dataset_of_the_run(tmp_path: Path) -> None:
    """``.hydra/hydra.yaml`` as Hydra writes it."""
    folder = tmp_path / "run" / ".hydra"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data_module": {"eval_clips": "events"}}))
    sources = [("hydra", "hydra.conf"), ("main", str(CONFIGS)), ("command-line", str(tmp_path)), ("schema", "")]
    used = ["data_module.target_data_dir=/d", "++data_module.k_shot=[1,5]", "seed=3"]
    overrides = ["trainer.epochs=1", *used, "test=False", "data_module.window_stride=8", "data_module.hflip_prob=0.5"]
    hydra = {
        "job": {"config_name": "config_mmdistill_tennis"},
        "runtime": {
            "config_sources": [{"provider": provider, "path": path} for provider, path in sources],
            "choices": {"dataset": "mine"},
        },
        "overrides": {"hydra": [], "task": overrides},
    }
    (folder / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    name = "--config-name=config_mmdistill_tennis"
    expected = [name, f"--config-dir={tmp_path}", "dataset=mine", *used]
    assert config_arguments(tmp_path / "run", "evaluate") == expected
    (folder / "config.yaml").write_text(yaml.safe_dump({"data_module": {"eval_clips": "windows"}}))
    assert config_arguments(tmp_path / "run", "evaluate") == [*expected, "data_module.window_stride=8"]
    overrides.append("seed=4")  # to resume, a user adds arguments to the command of the run; the last value is used
    (folder / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    arguments = config_arguments(tmp_path / "run", "evaluate")
    assert [a for a in arguments if a.startswith("seed=")] == ["seed=4"]
    overrides.append("dataset=other")
    (folder / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    assert config_arguments(tmp_path / "run", "evaluate")[-1] == "dataset=other"
    assert "dataset=mine" not in config_arguments(tmp_path / "run", "evaluate")
    (folder / "hydra.yaml").write_text("{}")
    assert config_arguments(tmp_path / "run", "evaluate") == ["--config-name=NAME", "dataset=NAME"]


def test_evaluation_command_has_the_keys_of_the_last_evaluation(tmp_path: Path) -> None:
    """``mmdistill demo`` evaluates in a run of its own."""
    checkpoint = write_lightning(tmp_path / "mmdistill/checkpoints/last.ckpt", 1)
    folder = tmp_path / "test/.hydra"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data_module": {"eval_clips": "events"}}))
    hydra = {
        "job": {"config_name": "config_mmdistill"},
        "runtime": {"config_sources": [], "choices": {"dataset": "demo"}},
        "overrides": {"task": ["train=False", f"ckpt_path={checkpoint}", "data_module.k_shot=[1,5]"]},
    }
    (folder / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    info = select_checkpoints(find_checkpoints(tmp_path))["distilled"]
    assert "k_shot" not in evaluation_command(info)
    (tmp_path / "test/fewshot.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    (tmp_path / "features").mkdir()  # `evaluate-features` writes no .hydra folder
    (tmp_path / "features/fewshot.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    keys = "dataset=demo 'data_module.k_shot=[1,5]'"
    expected = f"mmdistill evaluate --config-name=config_mmdistill {keys} ckpt_path={checkpoint}"
    assert evaluation_command(info) == expected


def test_distillation_command_has_the_config_and_data_of_the_pretraining(output: Path) -> None:
    selected = select_checkpoints(find_checkpoints(output))
    paths = [str(selected[name].path) for name in ("rgb", "flow", "skeleton")]
    words = shlex.split(distillation_command(selected) or "")
    ckpt_path = f"trainer.ckpt_path=[{','.join(paths)}]"
    assert words == ["mmdistill", "distill", "--config-name=NAME", "dataset=NAME", ckpt_path]
    folder = selected["rgb"].path.parents[1] / ".hydra"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data_module": {"train_clips": "windows"}}))
    used = ["dataset=mine", "seed=1", "batch_size=7", "data_module.window_stride=8"]
    hydra = {
        "job": {"config_name": "config_pretrain_tennis"},
        "runtime": {"config_sources": [{"provider": "main", "path": str(CONFIGS)}], "choices": {"dataset": "mine"}},
        "overrides": {"task": ["modality=rgb", *used, "trainer.epochs=2", "data_module.mask_ratio=0.5"]},
    }
    (folder / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    words = shlex.split(distillation_command(selected) or "")
    assert words == ["mmdistill", "distill", "--config-name=config_mmdistill_tennis", *used, ckpt_path]
    (quoted,) = quote_overrides(words[-1:])
    assert OverridesParser.create().parse_override(quoted).value() == paths
    del selected["skeleton"]
    assert "trainer.teachers=[rgb,flow]" in shlex.split(distillation_command(selected) or "")
    pretrain = f"mmdistill pretrain --config-name=config_pretrain_tennis {' '.join(used)} trainer.epochs=2 "
    assert f"no complete checkpoint found; to pretrain it: {pretrain}" in format_ckpt_path(selected)
    del selected["rgb"]
    assert distillation_command(selected) is None


def write_run(folder: Path, config_name: str, root: Path, overrides: list[str]) -> None:
    """The ``.hydra`` folder of a run on the data in `root`, with clips of 4 frames and no own annotation file."""
    (folder / ".hydra").mkdir()
    data = {
        "target_data_dir": root.name,
        "annotations": "f3set",
        "unlabel_json_path": "unlabel.json",
        "fewshot_eval_json_path": "val.json",
        "num_frames": 4,
        "sampling_rate": 1,
        "window_stride": None,
        "n_way": 5,
        "q_sample": 15,
        "eval_clips": "events",
        "train_clips": "windows",
    }
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump({"data_module": data}))
    hydra = {
        "job": {"config_name": config_name},
        "runtime": {
            "cwd": str(root.parent),
            "config_sources": [{"provider": "main", "path": str(CONFIGS)}],
            "choices": {"dataset": "mine"},
        },
        "overrides": {"task": overrides},
    }
    (folder / ".hydra/hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))


def test_commands_without_an_evaluation_file_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Own videos without labels: the distillation does not evaluate, the evaluation uses the video as class."""
    root = output.parent / "mine"
    root.mkdir()
    rallies = [Rally(name, 13, 25.0, ()) for name in ("a", "b")]
    (root / "unlabel.json").write_text(json.dumps(to_json(rallies)))
    selected = select_checkpoints(find_checkpoints(output))
    write_run(selected["rgb"].path.parents[1], "config_pretrain_tennis", root, ["modality=rgb", "batch_size=6"])
    write_run(
        selected["distilled"].path.parents[1], "config_mmdistill_tennis", root, ["test=False", "data_module.n_way=3"]
    )
    distill = shlex.split(distillation_command(selected) or "")
    assert distill[3:-1] == ["dataset=mine", "batch_size=6", "test=False"]
    keys = ["eval_clips=windows", "label=video", "fewshot_eval_json_path=unlabel.json", "n_way=2", "q_sample=2"]
    evaluate = shlex.split(evaluation_command(selected["distilled"]))
    assert evaluate[3:-1] == ["dataset=mine", *(f"data_module.{key}" for key in keys)]
    assert main([str(output)]) == 0
    assert f"{root}/val.json does not exist: the video is the class" in capsys.readouterr().out
    (root / "unlabel.json").write_text(json.dumps(to_json(rallies[:1])))
    assert main([str(output)]) == 0
    assert f"{root}/val.json does not exist: the evaluation needs a file with labels" in capsys.readouterr().out
    (root / "val.json").write_text("[]")
    assert "test=False" not in (distillation_command(selected) or "")
    assert "label=video" not in evaluation_command(selected["distilled"])


def test_table_states_interrupted_epochs_and_the_state_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "pretrain_rgb/checkpoints"
    write_native(run / "epoch=01-loss=0.5000-step=9", epoch=1, loss=0.5, modality="rgb")
    assert main([str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()[1:3]
    assert header.split()[-3:] == ["saved", "files", "path"]
    assert row.endswith(f"  complete    {run}/epoch=01-loss=0.5000-step=9  (interrupted epoch)")
    assert main([str(run / "epoch=01-loss=0.5000-step=9/latest")]) == 2
    assert "latest: is a file; give a folder, or use `mmdistill inspect`" in capsys.readouterr().err


def test_missing_teacher_names_the_key_for_fewer_teachers(output: Path) -> None:
    selected = select_checkpoints(find_checkpoints(output))
    assert "trainer.teachers" not in format_ckpt_path(selected)
    text = format_ckpt_path({name: info for name, info in selected.items() if name != "skeleton"})
    assert "to pretrain it: mmdistill pretrain --config-name=NAME dataset=NAME modality=skeleton\n" in text
    assert text.endswith("remove the lines with ???, set trainer.teachers=[rgb,flow]")


def test_commands_come_from_run_json_without_the_folder_of_hydra(output: Path) -> None:
    selected = select_checkpoints(find_checkpoints(output))
    for group, config in (("rgb", {"modality": "rgb"}), ("distilled", {"train": True})):
        used = ["data_module.k_shot=[1,5]", "experiment=teachers", "dataset=epic", "trainer.epochs=1"]
        command = [
            "mmdistill x",
            "--config-name",
            f"config_{'pretrain' if group == 'rgb' else 'mmdistill'}_tennis",
            *used,
        ]
        record = {"command": command, "config": {**config, "data_module": {"eval_clips": "events"}}}
        run_dir = selected[group].path.parents[1]
        (run_dir / "run.json").write_text(json.dumps([record]))
    words = shlex.split(evaluation_command(selected["distilled"]))
    expected = ["data_module.k_shot=[1,5]", "experiment=teachers", "dataset=epic"]
    assert words[2:-1] == ["--config-name=config_mmdistill_tennis", *expected]
    words = shlex.split(distillation_command(selected) or "")
    assert words[2:-1] == ["--config-name=config_mmdistill_tennis", *expected]


def test_commands_come_from_the_config_in_a_copied_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``.hydra`` and ``run.json``. The data have no labels, so the distillation does not evaluate."""
    monkeypatch.chdir(tmp_path)
    data = ["data_module.target_data_dir=my data", "data_module.k_shot=[1,5]"]
    pretraining = load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb", "seed=3", *data])
    teachers = ["trainer.ckpt_path=[a,b]", "trainer.teachers=[rgb,flow]"]
    distillation = load_config(DistillConfig, "config_mmdistill", [*data, *teachers, "dataset=epic"])
    write_native(tmp_path / "teachers/abc", modality="rgb", config=to_plain(pretraining))
    write_distilled(tmp_path / "model.ckpt", more={"config": to_plain(distillation)})
    selected = select_checkpoints(find_checkpoints(tmp_path))
    keys = ['data_module.target_data_dir="my data"', "data_module.k_shot=[1,5]"]
    teacher = ["--config-name=config_mmdistill_tennis", "dataset=tennis", "seed=3", *keys]
    student = ["--config-name=config_mmdistill", "dataset=epic", *keys]
    words = shlex.split(distillation_command(selected) or "")
    assert sorted(words[2:-2]) == sorted(teacher)
    assert sorted(shlex.split(evaluation_command(selected["distilled"]))[2:-1]) == sorted(student)
    annotations = tmp_path / "my data" / pretraining.data_module.unlabel_json_path
    annotations.parent.mkdir(parents=True)
    annotations.write_text("[]")
    assert "test=False" in shlex.split(distillation_command(selected) or "")


@pytest.mark.parametrize(("mode", "more"), [("RUN", []), ("MULTIRUN", ["hydra.mode=RUN"])])
def test_experiment_of_the_run_is_kept_as_a_single_job(tmp_path: Path, mode: str, more: list[str]) -> None:
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", "config_mmdistill", tmp_path, ["experiment=k_shot", "data_module.k_shot=5"])
    path = tmp_path / "run/.hydra/hydra.yaml"
    path.write_text(yaml.safe_dump({"hydra": {**yaml.safe_load(path.read_text())["hydra"], "mode": mode}}))
    expected = ["dataset=mine", "experiment=k_shot", "data_module.k_shot=5", *more]
    assert config_arguments(tmp_path / "run", "evaluate")[1:] == expected


def test_experiment_of_a_pretraining_is_kept_if_the_distillation_accepts_it(tmp_path: Path) -> None:
    for name, text in (("size", "data_module: {num_frames: 8}"), ("own", "modality: rgb")):
        path = tmp_path / f"configs/experiment/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n")
        command = ["mmdistill pretrain", f"--config-dir={tmp_path}/configs", "modality=rgb", f"experiment={name}"]
        record = {"command": command, "config": {"modality": "rgb", "data_module": {}}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps([record]))
    arguments = {name: config_arguments(tmp_path / name, "distill") for name in ("size", "own")}
    assert "experiment=size" in arguments["size"]
    assert arguments["own"] == ["--config-name=config_mmdistill", f"--config-dir={tmp_path}/configs"]


def test_config_of_a_joint_pretraining_is_given_by_the_name_of_its_source() -> None:
    given = ["modality=rgb", "dataset=epic", "source=ego4d", "source.target_data_dir=/e", "trainer.lambda_ce={rgb: 1}"]
    config = load_config(PretrainConfig, "config_pretrain", given)
    name, overrides = _nearest_config(to_plain(config))
    assert overrides[-2:] == ["source=ego4d", "source.target_data_dir=/e"]
    assert load_config(PretrainConfig, name, [*overrides, "modality=rgb"]) == config
