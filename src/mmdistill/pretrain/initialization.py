"""Initialize a pretraining from VideoMAE weights (``init_from``)."""

from mmdistill.checkpoint import Checkpoint, CheckpointError, LoadReport, open_checkpoint
from mmdistill.checkpoint.errors import name_setting
from mmdistill.checkpoint.load import select_encoder
from mmdistill.models.videomae import Encoder


def load_videomae(encoder: Encoder, path: str) -> LoadReport:
    """Initialize an encoder from VideoMAE weights. The decoder keeps its random initialization.

    Models fine-tuned with mean pooling have no norm after the last block. The encoder then keeps its new norm.

    If the numbers of channels differ, the patch embedding becomes its mean over the source channels, repeated for each
    own channel and scaled by (source channels / own channels). A clip with equal channels then gives the same tokens.

    The caller logs the report.

    Raises:
        CheckpointError: the weights do not fit. The message lists the tensors; the encoder is unchanged.
    """
    with name_setting("init_from"):
        checkpoint = open_checkpoint(path)
        _check_sizes(encoder, checkpoint)
    state, notes = dict(checkpoint.state_dict), []
    channels = encoder.config.channels
    for name in [k for k in state if k.endswith("patch_embed.proj.weight")]:
        source = state[name].shape[1]
        if source != channels:
            mean = state[name].float().mean(dim=1, keepdim=True).expand(-1, channels, -1, -1, -1)
            state[name] = (mean * (source / channels)).contiguous()
            notes.append(
                f"patch embedding adapted from {source} to {channels} channels: mean over channels, scaled by "
                f"{source}/{channels}"
            )
    config, _ = checkpoint.find_encoder_config(None, heads=encoder.config.heads)
    if not config.final_norm:
        notes.append("no norm after the last block in the file; encoder.norm is new (weight 1, bias 0)")
    if encoder.config.pos_embed == "sincos_separable" != config.pos_embed:
        notes.append(f"pos_embed is {config.pos_embed} in the file and sincos_separable here")
    allowed = () if config.final_norm else ("norm.weight", "norm.bias")
    return checkpoint.load_into(encoder, state_dict=state, notes=notes, allow_missing=allowed, log_report=False)


def _check_sizes(encoder: Encoder, checkpoint: Checkpoint) -> None:
    """Raise a one-line error if width, depth or heads differ, instead of listing all tensors."""
    state = select_encoder(checkpoint.state_dict, None, checkpoint.path).tensors
    embed, attention = state.get("patch_embed.proj.weight"), state.get("blocks.0.attn.proj.weight")
    if embed is None or attention is None:
        return  # not an encoder: `Checkpoint.load_into` lists the tensors
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    g = encoder.config
    sizes, own_sizes = (embed.shape[0], depth, attention.shape[1]), (g.dim, g.depth, g.heads * g.head_dim)
    if sizes != own_sizes:
        raise CheckpointError(
            f"init_from: {checkpoint.path} has width {sizes[0]}, depth {sizes[1]}, heads x head width {sizes[2]}; this "
            f"model has {own_sizes[0]}, {own_sizes[1]}, {own_sizes[2]}; set model=NAME, or model.dim, model.depth, "
            "model.heads and model.head_dim"
        )
