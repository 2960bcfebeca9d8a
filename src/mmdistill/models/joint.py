"""The network of joint pretraining: a masked autoencoder with a classifier of the labeled source.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.2). The classifier's parameters are named ``fc_norm.*``
and ``head_action.*``. Shapes: see `mmdistill.models.videomae`; S clips of the source, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE


class JointVideoMAE(VideoMAE):
    """A `VideoMAE` whose encoder also feeds a classifier of `num_classes`, with `dropout` before its last layer.

    The encoder and the decoder get the same initial weights as those of a `VideoMAE`.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        decoder: DecoderConfig,
        *,
        num_classes: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(encoder, decoder, drop_path=drop_path)
        self.dropout = dropout
        self.fc_norm = nn.LayerNorm(encoder.dim, eps=encoder.layer_norm_eps)
        self.head_action = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head_action.weight, std=0.02)
        nn.init.zeros_(self.head_action.bias)

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits: mean over the tokens, LayerNorm, dropout in training mode, linear layer. (S, Lv, D) -> (S, K)."""
        feature = F.dropout(self.fc_norm(tokens.mean(dim=1)), self.dropout, self.training)
        logits: Tensor = self.head_action(feature)
        return logits

    def forward(  # type: ignore[override]  # three values with a source
        self, x: Tensor, visible: Tensor, predict: Tensor | None = None, *, num_source: int = 0
    ) -> tuple[Tensor, ...]:
        """As `VideoMAE.forward`; with `num_source` = S also the logits (S, K) of the first S clips.

        Without a removed token nothing is predicted: the predictions and their indices are empty, (B, 0, P) and (B, 0).
        """
        if not num_source:
            return super().forward(x, visible, predict)
        tokens = self.encoder(x, visible)
        logits = self.classify(tokens[:num_source])
        if visible.shape[1] == self.encoder.config.num_tokens:
            return tokens.new_empty(len(x), 0, self.encoder.config.patch_dim), visible[:, :0], logits
        return *self.decode(tokens, visible, predict), logits
