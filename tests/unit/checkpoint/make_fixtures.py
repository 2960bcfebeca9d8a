"""Write the committed checkpoint fixtures with the software that users' checkpoints come from.

    python tests/unit/checkpoint/make_fixtures.py       # everything, into tests/unit/checkpoint/fixtures

DeepSpeed, Lightning and transformers run here, on a CPU; most tests read their files without importing them.
``expected.safetensors`` next to each directory holds the fp32 weights as the writer reports them (DeepSpeed:
`safe_get_full_fp32_param`).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE

FIXTURES = Path(__file__).parent / "fixtures"
ENCODER = EncoderConfig(
    channels=3, num_frames=2, height=8, width=8, patch=4, tubelet=2, dim=8, depth=1, heads=2, head_dim=4, mlp_dim=16
)
DECODER = DecoderConfig(dim=4, depth=1, heads=1, head_dim=4, mlp_dim=8)
FREE_WIDTH = EncoderConfig(  # like the user's width 1024 with 12 heads of 85
    channels=3, num_frames=4, height=8, width=12, patch=4, tubelet=2, dim=16, depth=2, heads=3, head_dim=5, mlp_dim=32
)
NAME = "epoch=01-loss=0.5000"


def model(seed: int = 0) -> VideoMAE:
    """The tiny autoencoder of the fixtures; its decoder's norm is frozen."""
    torch.manual_seed(seed)
    net = VideoMAE(ENCODER, DECODER)
    net.decoder.norm.requires_grad_(False)
    return net


def cast_key_bias(net: nn.Module) -> None:
    """timm's constant key bias is a buffer, which DeepSpeed's bf16 leaves in fp32."""
    for module in net.modules():
        if hasattr(module, "k_bias"):
            module.k_bias = module.k_bias.bfloat16()


def config(stage: int, bf16: bool) -> dict:
    """A DeepSpeed configuration that runs on a CPU."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000000,
    }


def engine_for(net: nn.Module, stage: int, bf16: bool):
    """A DeepSpeed engine with two parameter groups, as with weight decay."""
    import deepspeed

    trainable = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(model=net, model_parameters=groups, config=config(stage, bf16))[0]


def train(engine, steps: int, bf16: bool, start: int = 0) -> list[str]:
    """Steps on data that depends on the step and the rank; the losses in hex."""
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(1000 * step + int(os.environ["RANK"]))
        x = torch.randn(1, 3, 2, 8, 8, generator=generator)
        prediction, _ = engine(x.bfloat16() if bf16 else x, torch.tensor([[0, 1]]))
        loss = prediction.float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
    return losses


def deepspeed_worker(stage: int, bf16: bool, out: Path) -> None:
    """One rank: train two steps, save with stock DeepSpeed, and what the weights are."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed("gloo")
    net = model()
    if bf16:
        cast_key_bias(net)
    engine = engine_for(net, stage, bf16)
    train(engine, 2, bf16)
    engine.save_checkpoint(str(out / NAME), tag="checkpoint", client_state={"epoch": 1})
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and (stage or bf16):
            full = safe_get_full_fp32_param(parameter)
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                full = parameter.detach().clone()
        else:
            full = parameter.detach().clone()
        expected[name] = (parameter if full is None else full).detach().float().clone().contiguous()
    if stage == 0 and bf16:  # safe_get_full_fp32_param knows ZeRO only
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                expected[engine.param_names[parameter]] = master.detach().clone()
    if engine.global_rank == 0:
        save_file(expected, out / "expected.safetensors")
    torch.distributed.barrier()
    deepspeed.comm.destroy_process_group()


def lightning_module():
    """A student, a teacher and a translator under the names of the distillation."""
    import pytorch_lightning as pl

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder(ENCODER)

    class Distill(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.student_rgb, self.teacher_rgb = Part(), Part()
            self.teacher_rgb.requires_grad_(False)
            self.cmt = nn.ModuleDict({"mlp_to_rgb": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))})

        def training_step(self, batch, _):
            feature = self.cmt["mlp_to_rgb"](self.student_rgb.encoder.embed(batch[0]))
            return (feature - self.teacher_rgb.encoder.embed(batch[0])).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Distill()


def lightning_worker(out: Path, deepspeed: bool) -> None:
    """A stock Trainer, plain or with the DeepSpeed strategy (whose CUDA check alone is lifted)."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
    from torch.utils.data import DataLoader, TensorDataset

    class OnCpu(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            self.parallel_devices = [torch.device("cpu", 0)]
            DDPStrategy.setup_environment(self)

    settings = {}
    if deepspeed:
        settings["strategy"] = OnCpu(stage=2, process_group_backend="gloo", config=None, allgather_bucket_size=1000)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(out),
        **settings,
    )
    module = lightning_module()
    data = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=1))
    name = "epoch=00-train_loss=0.5000.ckpt"
    trainer.save_checkpoint(str(out / name))
    weights = module.state_dict()
    save_file({k: v.float().clone().contiguous() for k, v in weights.items()}, out / "expected.safetensors")


def huggingface(out: Path) -> None:
    """transformers' own files, of the bare model and of the one for pretraining."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEModel

    settings = VideoMAEConfig(
        image_size=8, patch_size=4, num_frames=2, tubelet_size=2, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, decoder_num_hidden_layers=1, decoder_hidden_size=4,
        decoder_num_attention_heads=1, decoder_intermediate_size=8, use_mean_pooling=False, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(5)
    for kind, folder in ((VideoMAEModel, "hf-model"), (VideoMAEForPreTraining, "hf-pretraining")):
        net = kind(settings)
        with torch.no_grad():
            for parameter in net.parameters():  # biases are zero at first, which would hide an exchange
                parameter.uniform_(-0.5, 0.5)
        net.save_pretrained(out / folder)


def plain_files(out: Path) -> None:
    """Files of ``torch.save``: VideoMAE's and MM-CDFSL's customs, and the user's own kind of encoder."""
    out.mkdir(parents=True, exist_ok=True)
    state = model(1).state_dict()
    torch.save(state, out / "bare.pt")
    torch.save({"model": state, "epoch": 7}, out / "model.pth")
    torch.save({"module": {f"module.{k}": v for k, v in state.items()}}, out / "module.pt")
    torch.save({"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}}, out / "state_dict.pt")
    torch.save({"model": state}, out / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, out / "expected.safetensors")
    torch.manual_seed(2)
    encoder = Encoder(FREE_WIDTH)
    own = {k: v.clone() for k, v in encoder.state_dict().items()}
    heads = {
        f"head_{k}.{f}": torch.randn((n, 16) if f == "weight" else (n,))
        for k, n in (("action", 5), ("verb", 3), ("noun", 4))
        for f in ("weight", "bias")
    }
    torch.save({"model": {**own, **heads}}, out / "free_width_sincos.pth")
    torch.save({"model": {**own, **heads, "pos_embed": torch.randn(1, 12, 16)}}, out / "free_width_learned.pth")


def run(*words: str, processes: int = 1, port: int = 29711) -> None:
    """This file again as `processes` ranks."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(processes):
        rank_env = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        full = {**env, **{k: str(v) for k, v in rank_env.items()}}
        ranks.append(subprocess.Popen([sys.executable, __file__, *words], env=full))
    if any(process.wait() for process in ranks):
        raise SystemExit(f"{' '.join(words)} failed")


def main() -> None:
    """Everything, from scratch."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for stage in (0, 1, 2, 3):
        for world in (1, 2):
            for precision in ("fp32", "bf16"):
                out = FIXTURES / f"zero{stage}-w{world}-{precision}"
                out.mkdir(parents=True)
                run("deepspeed", str(stage), precision, str(out), processes=world)
    for kind in ("lightning", "lightning-deepspeed"):
        (FIXTURES / kind).mkdir()
        run(kind, str(FIXTURES / kind))
    for script in FIXTURES.rglob("zero_to_*.py"):
        script.unlink()
    huggingface(FIXTURES)
    plain_files(FIXTURES / "plain")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "deepspeed":
        deepspeed_worker(int(sys.argv[2]), sys.argv[3] == "bf16", Path(sys.argv[4]))
    else:
        lightning_worker(Path(sys.argv[2]), sys.argv[1] == "lightning-deepspeed")
