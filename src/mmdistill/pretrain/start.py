"""What a pretraining run starts from: a checkpoint to continue, or VideoMAE weights to initialise from."""

from pathlib import Path

from mmdistill.checkpoint import LoadReport, load_weights, newest_complete, read_checkpoint
from mmdistill.config import PretrainConfig
from mmdistill.models.videomae import VideoMAE


def find_resume(config: PretrainConfig, run_dir: Path) -> Path | None:
    """The checkpoint that `resume` means: a path as given, or with ``auto`` the newest whole one of this run's folder.

    ``auto`` without any checkpoint starts from scratch, which is what the first start of a requeued job needs.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        return newest_complete(run_dir / "checkpoints")
    path = Path(config.resume).expanduser()
    if not path.exists():
        raise ValueError(f"resume={path} does not exist; give a checkpoint directory, or resume=auto")
    return path


def load_videomae(model: VideoMAE, path: str) -> LoadReport:
    """Initialise from pretrained VideoMAE weights of another channel count.

    The patch embedding is adapted by one rule: the mean over the source's input channels, repeated for each channel of
    the model and scaled by (source channels / own channels), so that a clip with equal channels gives the same tokens.
    The decoder's head is left as initialised if its size differs; both are said in the report.
    """
    source = read_checkpoint(path)
    weight = source.state_dict["encoder.patch_embed.proj.weight"]
    channels = model.encoder.geometry.channels
    state = dict(source.state_dict)
    if weight.shape[1] != channels:
        mean = weight.float().mean(dim=1, keepdim=True).expand(-1, channels, -1, -1, -1)
        state["encoder.patch_embed.proj.weight"] = (mean * (weight.shape[1] / channels)).contiguous()
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    missing = set(model.encoder.state_dict()) ^ set(encoder)
    if missing:
        raise ValueError(f"pretrain={path}: encoder tensors do not fit this model: {', '.join(sorted(missing)[:8])}")
    return load_weights(model.encoder, path)
