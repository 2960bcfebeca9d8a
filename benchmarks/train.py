"""Measure the speed of the training steps and count their floating-point operations.

    python benchmarks/train.py [--rounds 5] [--json] [--tiny] [--device cpu|cuda] [--batch 1] [--precision 32|bf16]

- The pretraining step (forward, backward, AdamW), compared with ``transformers.VideoMAEForPreTraining`` of the same
  architecture with the same weights and mask: 16 x 224 x 384, ViT-S, mask 0.9, batch 1; with the full decoder, and with
  ``decoder_mask_ratio=0.5``.
- The distillation step (from raw clip to optimizer step; three teachers and the student, all ViT-S; mask 0.75,
  batch 1), compared with the rate of a float32 matrix product on the same threads; also with
  ``trainer.cache_teacher_epochs``.

Each round times every step once, so changes of the machine's speed affect all steps alike; medians are reported. Our
steps run in a process with the settings of `pretrain_main.py`. The step of transformers runs in a process with default
settings, and once more in ours (with `tune_malloc`). Denormals are flushed in both. FLOPs are those of matrix products
and attention, 2 per multiply-add; the backward pass counts twice the forward pass. Recomputation is not counted. The
target ratios hold for one clip on a CPU in float32.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from mmdistill.checkpoint.keys import from_huggingface
from mmdistill.data.masking import sample_visible_tokens
from mmdistill.distill.module import MMDistill
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.distributed.device import autocast, tune_malloc
from mmdistill.modalities import BUILTIN_MODALITIES, ModalitySpec, get_modality
from mmdistill.models.flops import decoder_flops, encoder_flops, encoder_training_flops
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE, masked_indices
from mmdistill.randomness import seeded_rng
from mmdistill.training.optim import Optimization, make_optimizer

FULL = {"frames": 16, "size": (224, 384), "patch": 16, "dim": 384, "depth": 12, "heads": 6, "decoder": (192, 4, 3)}
TINY = {"frames": 4, "size": (64, 64), "patch": 16, "dim": 32, "depth": 2, "heads": 2, "decoder": (16, 1, 1)}
DEFAULT_PROCESS = "pretrain, transformers"
Steps = dict[str, tuple[int, Callable[[], float]]]  # name -> (FLOPs, step, which returns the loss)


@dataclass(frozen=True)
class Setting:
    """What is measured, and where."""

    tiny: bool
    device: str
    batch: int  # clips
    precision: str

    @property
    def sizes(self) -> dict:
        """Sizes of the model and its input."""
        return TINY if self.tiny else FULL

    @property
    def has_targets(self) -> bool:
        """Whether the target ratios hold for this setting."""
        return (self.device, self.batch, self.precision) == ("cpu", 1, "32")

    def describe(self) -> str:
        """One line for the report."""
        where = torch.cuda.get_device_name() if self.device == "cuda" else f"{torch.get_num_threads()} threads"
        return f"{where}, torch {torch.__version__}, precision {self.precision}, {self.batch} clips a step"


def make_encoder_config(sizes: dict, spec: ModalitySpec) -> EncoderConfig:
    """The encoder of the benchmark."""
    (height, width), scale, dim, heads = sizes["size"], spec.input_stride, sizes["dim"], sizes["heads"]
    return EncoderConfig(
        spec.channels, sizes["frames"], height // scale, width // scale, sizes["patch"] // scale, 2,
        dim, sizes["depth"], heads, dim // heads, 4 * dim,
    )  # fmt: skip


# Arithmetic ----------------------------------------------------------------------------------------------------------


def pretrain_flops(g: EncoderConfig, d: DecoderConfig, visible: int, predicted: int) -> int:
    """One pretraining step on one clip."""
    return encoder_training_flops(g, visible) + 3 * decoder_flops(g, d, visible, predicted)


def distill_flops(encoder_configs: dict[str, EncoderConfig], visible: int, *, cached: bool) -> int:
    """One distillation step on one clip, without the transfer head, which acts on one feature only."""
    teachers = 0 if cached else sum(encoder_flops(g, visible) for g in encoder_configs.values())
    return teachers + encoder_training_flops(encoder_configs["rgb"], visible)


# Steps ---------------------------------------------------------------------------------------------------------------


def mask(g: EncoderConfig, ratio: float, setting: Setting) -> Tensor:
    """(B, Lv)"""
    drawn = torch.from_numpy(sample_visible_tokens(g.grid, ratio=ratio, mask_type="tube", rng=seeded_rng(0)))
    return drawn.expand(setting.batch, -1).to(setting.device)


def stepper(module: torch.nn.Module, loss: Callable[[], Tensor], setting: Setting) -> Callable[[], float]:
    """Forward, backward, AdamW."""
    optimizer = make_optimizer(module, Optimization(1e-9))

    def step() -> float:
        with autocast(setting.precision, torch.device(setting.device)):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return float(value.detach())

    return step


def huggingface(sizes: dict, g: EncoderConfig) -> VideoMAEForPreTraining:
    """transformers' model of this architecture."""
    dim, depth, heads = sizes["decoder"]
    config = VideoMAEConfig(
        image_size=sizes["size"], patch_size=g.patch, num_frames=g.num_frames, tubelet_size=2,
        hidden_size=g.dim, num_hidden_layers=g.depth, num_attention_heads=g.heads, intermediate_size=g.mlp_dim,
        decoder_hidden_size=dim, decoder_num_hidden_layers=depth, decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * dim, use_mean_pooling=False, layer_norm_eps=1e-6,
    )  # fmt: skip
    return VideoMAEForPreTraining(config).train()


def pretraining(setting: Setting) -> tuple[Steps, dict[str, float]]:
    """name -> (FLOPs, step), and the losses of both implementations with the same weights."""
    sizes, device, clips = setting.sizes, setting.device, setting.batch
    spec = get_modality("rgb").spec()
    g, (width, depth, heads) = make_encoder_config(sizes, spec), sizes["decoder"]
    d = DecoderConfig(width, depth, heads, width // heads, 4 * width)
    theirs = huggingface(sizes, g)
    ours = VideoMAE(g, d)
    state = from_huggingface(theirs.state_dict())
    ours.load_state_dict({k: state[k] for k in ours.state_dict()})  # raises where one is missing
    ours, theirs = ours.to(device), theirs.to(device)
    x = torch.randn(clips, 3, g.num_frames, g.height, g.width).to(device)
    visible = mask(g, 0.9, setting)
    removed = masked_indices(visible, g.num_tokens)
    half = removed[:, torch.randperm(removed.shape[1])[: removed.shape[1] // 2].sort().values.to(device)]
    hidden = torch.ones(clips, g.num_tokens, dtype=torch.bool, device=device).scatter(1, visible, False)

    def our_loss(predict: Tensor | None) -> Tensor:
        prediction, index = ours(x, visible, predict)
        target = patch_targets(x, index, g.grid, target="norm_pix")
        constant_baseline_loss(target, g.channels)  # logged by every run
        return reconstruction_loss(prediction, target)

    def their_loss() -> Tensor:
        return theirs(x.transpose(1, 2), bool_masked_pos=hidden).loss

    with torch.no_grad():
        losses = {"ours": float(our_loss(None)), "transformers": float(their_loss())}
    n, all_, some = visible.shape[1], removed.shape[1], half.shape[1]
    theirs_full = pretrain_flops(g, d, n, all_)
    theirs_full += 2 * (g.num_tokens - n) * g.patch_dim * g.dim * 2  # transformers embeds the removed patches too
    return {
        "pretrain, transformers": (clips * theirs_full, stepper(theirs, their_loss, setting)),
        "pretrain, full decoder": (
            clips * pretrain_flops(g, d, n, all_),
            stepper(ours, lambda: our_loss(None), setting),
        ),
        "pretrain, decoder_mask_ratio=0.5": (
            clips * pretrain_flops(g, d, n, some),
            stepper(ours, lambda: our_loss(half), setting),
        ),
    }, losses


def distillation(setting: Setting, folder: Path) -> tuple[Steps, dict[str, float]]:
    """name -> (FLOPs, step), and the losses with teachers and with cached features on the same mask."""
    sizes, clips = setting.sizes, setting.batch
    specs = {name: get_modality(name).spec() for name in BUILTIN_MODALITIES}
    encoder_configs = {m: make_encoder_config(sizes, s) for m, s in specs.items()}
    teachers = {m: Encoder(g) for m, g in encoder_configs.items()}
    module = MMDistill(teachers, specs, Optimization(1e-9)).train().to(setting.device)
    t, (h, w) = sizes["frames"], sizes["size"]
    batch = {
        "rgb": torch.randint(0, 256, (clips, t, h, w + 14, 3), dtype=torch.uint8),
        "flow": torch.randn(clips, t, 2, h, w + 14).half(),
        "skeleton": torch.rand(clips, t, 2, 17, 3) * h,
        "visible": mask(encoder_configs["rgb"], 0.75, setting),
        "crop_box": torch.tensor([[0.0, 7, h, w, 0]]).expand(clips, -1),
        "index": torch.arange(clips),
    }
    batch = module.transfer_batch_to_device(batch, torch.device(setting.device), 0)
    cache = TeacherCache(
        folder, num_draws=1, num_clips=clips, widths={m: g.dim for m, g in encoder_configs.items()}, key={}
    )
    cache.add(0, batch["index"], module.targets(batch))
    cache.write(0)
    cache.open(0)
    cache.is_cached = lambda epoch: True  # type: ignore[method-assign]
    rgb_only = {k: v for k, v in batch.items() if k not in ("flow", "skeleton")}

    def loss(cache: TeacherCache | None) -> Tensor:
        module.cache = cache
        found = module.losses(rgb_only if cache else batch)
        return torch.stack([value for value, _ in found.values()]).sum()

    with torch.no_grad():
        losses = {"uncached": float(loss(None)), "cached": float(loss(cache))}
    trainable = torch.nn.ModuleDict({"student_rgb": module.student_rgb, "cmt": module.cmt})
    n = batch["visible"].shape[1]
    return {
        "distill": (
            clips * distill_flops(encoder_configs, n, cached=False),
            stepper(trainable, lambda: loss(None), setting),
        ),
        "distill, teacher_cache": (
            clips * distill_flops(encoder_configs, n, cached=True),
            stepper(trainable, lambda: loss(cache), setting),
        ),
    }, losses


def product(setting: Setting) -> tuple[int, Callable[[], float]]:
    """Consecutive square matrix products that take about as long as a training step."""
    size, times = (256, 1) if setting.tiny else (2048, 12) if setting.device == "cpu" else (8192, 10)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    a, b, out = torch.randn(3, size, size, dtype=dtype, device=setting.device).unbind()

    def step() -> float:
        for _ in range(times):
            torch.mm(a, b, out=out)
        return float(out[0, 0])

    return 2 * size**3 * times, step


# Processes -----------------------------------------------------------------------------------------------------------


def our_steps(setting: Setting, folder: Path) -> tuple[Steps, dict[str, float]]:
    """All steps that run in a process with our settings, and the losses."""
    pretrain, losses = pretraining(setting)
    pretrain[f"{DEFAULT_PROCESS}, tune_malloc"] = pretrain.pop(DEFAULT_PROCESS)
    distill, more = distillation(setting, folder)
    return {"matrix products": product(setting), **pretrain, **distill}, losses | more


def serve(pipe: Connection, setting: Setting, ours: bool, folder: Path) -> None:
    """Serve steps in this process: send their FLOPs and losses, then run each requested step and send its seconds."""
    torch.set_flush_denormal(True)
    if ours:
        tune_malloc()
    torch.manual_seed(0)
    if ours:
        steps, losses = our_steps(setting, folder)
    else:
        steps, losses = {DEFAULT_PROCESS: pretraining(setting)[0][DEFAULT_PROCESS]}, {}
    pipe.send(({name: flops for name, (flops, _) in steps.items()}, losses))
    while name := pipe.recv():
        began = time.perf_counter()
        steps[name][1]()
        pipe.send(time.perf_counter() - began)


def measure(setting: Setting, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Median seconds and rate of each step; each round times all steps once, after a first round that is not counted.

    Returns:
        {step: {gflop, seconds, gflop_per_s}}, and the losses.
    """
    spawn = multiprocessing.get_context("spawn")
    flops: dict[str, int] = {}
    losses: dict[str, float] = {}
    asked: dict[str, Connection] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ours in (True, False):
            here, there = spawn.Pipe()
            spawn.Process(target=serve, args=(there, setting, ours, Path(folder)), daemon=True).start()
            there.close()  # otherwise the end of the process is not noticed here
            own, found = here.recv()
            flops, losses, asked = flops | own, losses | found, asked | dict.fromkeys(own, here)
        seconds: dict[str, list[float]] = {name: [] for name in flops}
        for number in range(rounds + 1):
            for name, pipe in asked.items():
                pipe.send(name)
                took = pipe.recv()
                if number:
                    seconds[name].append(took)
        for pipe in set(asked.values()):
            pipe.send("")
    return {
        name: {"gflop": n / 1e9, "seconds": (s := statistics.median(seconds[name])), "gflop_per_s": n / 1e9 / s}
        for name, n in flops.items()
    }, losses


# Report --------------------------------------------------------------------------------------------------------------


def targets(found: dict[str, dict[str, float]]) -> list[tuple[str, float, str, float]]:
    """The ratios as (name, value, relation, bound)."""
    seconds = {name: row["seconds"] for name, row in found.items()}
    reference, rate = seconds[DEFAULT_PROCESS], found["matrix products"]["gflop_per_s"]
    return [
        ("pretrain, full decoder / transformers, time", seconds["pretrain, full decoder"] / reference, "<=", 0.8),
        (
            "pretrain, decoder_mask_ratio=0.5 / transformers",
            seconds["pretrain, decoder_mask_ratio=0.5"] / reference,
            "<=",
            0.5,
        ),
        ("distill / matrix products, rate", found["distill"]["gflop_per_s"] / rate, ">=", 0.8),
        ("distill, teacher_cache / distill, time", seconds["distill, teacher_cache"] / seconds["distill"], "<=", 0.6),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="clips per step")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    args = parser.parse_args()
    setting = Setting(args.tiny, args.device, args.batch, args.precision)
    found, losses = measure(setting, args.rounds)
    rows = targets(found)
    if args.json:
        print(json.dumps({"steps": found, "targets": rows, "losses": losses, "threads": torch.get_num_threads()}))
        return 0
    print(f"{setting.describe()}, medians of {args.rounds} rounds")
    print(f"{'':36}{'GFLOP':>9}{'seconds':>10}{'GFLOP/s':>10}")
    for name, row in found.items():
        print(f"{name:36}{row['gflop']:>9.1f}{row['seconds']:>10.3f}{row['gflop_per_s']:>10.1f}")
    for name, value, relation, bound in rows:
        is_met = value <= bound if relation == "<=" else value >= bound
        target = f" (target {relation} {bound}: {'met' if is_met else 'missed'})"
        print(f"{name}: {value:.2f}{target if setting.has_targets else ''}")
    ratio = found["pretrain, full decoder"]["seconds"] / found[f"{DEFAULT_PROCESS}, tune_malloc"]["seconds"]
    print(f"pretrain, full decoder / transformers in a process with our settings, time: {ratio:.2f}")
    print(f"same weights and mask: loss {losses['ours']:.6f}, transformers {losses['transformers']:.6f}")
    print(f"same mask: loss {losses['uncached']:.6f}, with cached features {losses['cached']:.6f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
