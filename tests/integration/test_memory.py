"""A job of a sweep that runs out of memory leaves its memory to the next job."""

from pathlib import Path

from tests.commands import run_python
from tests.tiny_data import MODEL, make_tiny, overrides

SWEEP = """
import weakref
import torch
from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.cli.pretrain import run_pretraining
from mmdistill.config import PretrainConfig
from mmdistill.models import videomae

networks = []

def forward(self, *args, **kwargs):
    networks.append(weakref.ref(self))
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

original = videomae.Encoder.forward

def job(config, run_dir):
    videomae.Encoder.forward = forward if config.seed == 1 else original
    if config.seed == 2:
        print("networks of the first job:", sum(network() is not None for network in networks), "of", len(networks))
    run_pretraining(config, run_dir)

if __name__ == "__main__":
    run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
"""
LINE = (
    "the GPU is out of memory while 2.00 GiB were requested; lower batch_size, or set precision=bf16 or "
    "trainer.activation_checkpointing=true"
)


def test_next_job_gets_the_memory(tmp_path: Path) -> None:
    data = overrides(make_tiny(tmp_path / "data", per_class=2))
    script = tmp_path / "sweep_main.py"
    script.write_text(SWEEP)
    more = [
        "accelerator=cpu",
        "trainer.epochs=1",
        "batch_size=8",
        "num_workers=0",
        f"hydra.sweep.dir={tmp_path / 'out'}",
    ]
    done = run_python(script, "-m", "modality=flow", "seed=1,2", *data, *MODEL, *more, expect=1)
    assert "networks of the first job: 0 of 1" in done.stdout
    assert f"the sweep continues: {LINE}" in done.stderr
    assert "Traceback" not in done.stderr
