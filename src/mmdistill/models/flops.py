"""Floating-point operations (FLOPs) of the networks, per clip: those of matrix products, 2 per multiply-add.

The backward pass of a product has two products: the gradients of both factors. Norms, activations, sums and means are
not counted. Shapes: see `mmdistill.models.videomae`.
"""

from mmdistill.models.videomae import DecoderConfig, EncoderConfig


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """The product of matrices (rows, inputs) and (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def encoder_flops(g: EncoderConfig, num_tokens: int) -> int:
    """The forward pass of an encoder on Lv visible tokens."""
    return _embedding_flops(g, num_tokens) + g.depth * _block_flops(g, num_tokens)


def encoder_training_flops(g: EncoderConfig, num_tokens: int, *, recomputes: bool = False) -> int:
    """Forward and backward pass of an encoder. Its input needs no gradient.

    With `recomputes` the backward pass repeats the forward pass of each block (activation checkpointing) up to its last
    product, whose result is not needed.
    """
    repeated = _block_flops(g, num_tokens) - linear_flops(num_tokens, g.mlp_dim, g.dim) if recomputes else 0
    return 2 * _embedding_flops(g, num_tokens) + g.depth * (3 * _block_flops(g, num_tokens) + repeated)


def decoder_flops(g: EncoderConfig, d: DecoderConfig, num_visible: int, num_predicted: int) -> int:
    """The forward pass of a decoder with its input layer and its prediction head; the backward pass has twice as many.

    `num_visible` is Lv, `num_predicted` is Lp.
    """
    layers = linear_flops(num_visible, g.dim, d.dim) + linear_flops(num_predicted, d.dim, g.patch_dim)
    return layers + d.depth * _block_flops(d, num_visible + num_predicted)


def _embedding_flops(g: EncoderConfig, num_tokens: int) -> int:
    return linear_flops(num_tokens, g.patch_dim, g.dim)


def _block_flops(g: EncoderConfig | DecoderConfig, num_tokens: int) -> int:
    """The forward pass of a block: query, key and value; two products of the attention; its last layer; MLP."""
    inner = g.heads * g.head_dim
    attention = linear_flops(num_tokens, g.dim, 3 * inner) + 2 * linear_flops(num_tokens, inner, num_tokens)
    mlp = linear_flops(num_tokens, g.dim, g.mlp_dim) + linear_flops(num_tokens, g.mlp_dim, g.dim)
    return attention + linear_flops(num_tokens, inner, g.dim) + mlp
