"""Reconstruction images during a pretraining, and of its checkpoint by the script."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import Script, run_python
from tests.tiny_data import MODEL, make_tiny, overrides


def test_images_of_a_pretraining_and_of_its_checkpoint(tmp_path: Path, script: Script) -> None:
    data, run = make_tiny(tmp_path / "data", per_class=2), tmp_path / "run"
    arguments = [*overrides(data), *MODEL, "trainer.image_every_n_epochs=2", "logger=[tensorboard,csv]"]
    run_python("pretrain_main.py", "modality=rgb", *arguments, f"hydra.run.dir={run}")
    assert [p.name for p in (run / "images").iterdir()] == ["epoch=01.png"]
    one_epoch = ["trainer.epochs=1", "trainer.warmup_epochs=0", f"hydra.run.dir={tmp_path / 'one_epoch'}"]
    run_python("pretrain_main.py", "modality=rgb", *arguments, *one_epoch)
    assert [p.name for p in (tmp_path / "one_epoch" / "images").iterdir()] == ["epoch=00.png"]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("reconstruction")] == [6]  # 24 clips in batches of 8, twice
    checkpoint = next((run / "checkpoints").glob("epoch=01-*"))
    moved = data.rename(tmp_path / "moved")
    arguments = [checkpoint, f"data_module.target_data_dir={moved}", "--clips", 2, "--split", "val"]
    result = script("visualize_reconstruction.py", *arguments, "--out", tmp_path / "out")
    output = result.stdout
    assert "Setting accelerator" not in output + result.stderr  # a warning of DeepSpeed
    assert len(list((tmp_path / "out").glob("clip_*.png"))) == 2
    assert output.count("constant baseline") == 2
