"""What a pretraining run starts from: VideoMAE weights to initialise from."""

from dataclasses import replace

from mmdistill.checkpoint import Checkpoint, CheckpointError, LoadReport, read_checkpoint
from mmdistill.checkpoint.load import load_into, select_encoder
from mmdistill.models.videomae import Encoder


def load_videomae(encoder: Encoder, path: str) -> LoadReport:
    """Initialise an encoder from pretrained VideoMAE weights, also of another channel count. The decoder starts anew.

    The patch embedding is adapted by one rule: the mean over the source's channels, repeated for each channel of the
    encoder and scaled by (source channels / own channels), so that a clip with equal channels gives the same tokens.

    Raises:
        CheckpointError: the weights do not fit, with the list of tensors; the encoder is unchanged.
    """
    checkpoint = read_checkpoint(path)
    _check_sizes(encoder, checkpoint)
    state, note = dict(checkpoint.state_dict), None
    channels = encoder.config.channels
    for name in [k for k in state if k.endswith("patch_embed.proj.weight")]:
        source = state[name].shape[1]
        if source != channels:
            mean = state[name].float().mean(dim=1, keepdim=True).expand(-1, channels, -1, -1, -1)
            state[name] = (mean * (source / channels)).contiguous()
            note = (
                f"patch embedding adapted from {source} to {channels} channels: their mean, times {source}/{channels}"
            )
    notes = (*checkpoint.notes, note) if note else checkpoint.notes
    return load_into(encoder, replace(checkpoint, state_dict=state, notes=notes))


def _check_sizes(encoder: Encoder, checkpoint: Checkpoint) -> None:
    """One sentence where the widths or the depth differ, in place of the list of all tensors."""
    state = select_encoder(checkpoint, None)[0]
    embed, attention = state.get("patch_embed.proj.weight"), state.get("blocks.0.attn.proj.weight")
    if embed is None or attention is None:
        return  # not an encoder: the list says so
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    g = encoder.config
    found = (embed.shape[0], depth, attention.shape[1])
    if found != (g.dim, g.depth, g.heads * g.head_dim):
        raise CheckpointError(
            f"init_from: {checkpoint.path} has width {found[0]}, depth {found[1]}, heads x head width {found[2]}; this "
            f"model has {g.dim}, {g.depth}, {g.heads * g.head_dim}; set model=, or model.dim, model.depth, model.heads "
            "and model.head_dim"
        )
