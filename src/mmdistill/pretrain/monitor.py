"""What a pretraining reports on held-out clips: few-shot score, reconstruction loss, collapse indicators.

Shapes: B batch, N removed tokens, P values of a token, C channels, D width of the feature.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdistill.builders import check_pooling, configured_pooling, make_clip_dataset
from mmdistill.config import PretrainConfig, modality_specs, removes_no_token
from mmdistill.errors import format_count
from mmdistill.fewshot.errors import FeatureError
from mmdistill.modalities import preprocess_clips
from mmdistill.models.targets import patch_targets
from mmdistill.models.videomae import Encoder, VideoMAE
from mmdistill.training.monitoring import (
    METRIC,
    FewshotClips,
    describe_held_out,
    encode_clips,
    eval_mode,
    held_out_data,
    held_out_metrics,
    make_fewshot_clips,
    select_positions,
    try_on_all_ranks,
)
from mmdistill.training.run import Training


class Monitor:
    """The clips of the validations of a pretraining. Collective.

    A reason why there are no such clips is logged at the start, and the training continues. `learned` are the labeled
    sources, see `make_fewshot_clips`.

    Raises:
        ConfigError: the encoder does not support the pooling.
    """

    def __init__(
        self, config: PretrainConfig, training: Training, encoder: Encoder, learned: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.config, self.training = config, training
        self.pooling = configured_pooling(config)
        check_pooling(self.pooling, encoder, config.modality)
        self.spec = modality_specs(config.data_module)[config.modality]
        self.reconstructs = not removes_no_token(config.data_module)
        self.few_shot = try_on_all_ranks(lambda: make_fewshot_clips(config, config.modality, learned))
        self.held_out = try_on_all_ranks(
            lambda: make_clip_dataset(
                held_out_data(config.data_module),
                (config.modality,),
                training=False,
                masked=True,
                seed=config.seed,
                needs_motion=self.pooling.name == "motion",
            )
        )

    @property
    def summary(self) -> str:
        """The lines about the validations at the start of a run."""
        if isinstance(self.few_shot, str):
            few_shot = f"no {METRIC}: {self.few_shot}"
        else:
            few_shot = self.few_shot.summary(self.config)
        return f"\n{few_shot}" + (f"\nno held-out clips: {self.held_out}" if isinstance(self.held_out, str) else "")

    def measure(self, model: VideoMAE) -> dict[str, float]:
        """Compute and log the metrics of the epoch; the mode of the model is restored. Collective."""
        # eager: other batch sizes would compile the encoder again
        with eval_mode(model), torch.compiler.set_stance("force_eager"):
            return self._measure_held_out(model) | self._measure_few_shot(model)

    def _measure_held_out(self, model: VideoMAE) -> dict[str, float]:
        """The metrics of `held_out_metrics`; empty if there are no clips or one cannot be read."""
        if isinstance(self.held_out, str):
            return {}
        positions = select_positions(len(self.held_out))

        def encode(batch: Mapping[str, Tensor]) -> list[Tensor]:
            x, visible = self._input(model, batch), batch["visible"].to(self.training.run.process.device)
            values = list(reconstruction_sums(model, x, visible, self.spec.target)) if self.reconstructs else []
            return [self._embed(model, x, batch, visible), *values]

        found = encode_clips(
            self.held_out,
            positions,
            encode,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
        )
        if isinstance(found, str):
            self._log(f"held-out loss unknown: {found}")
            return {}
        features, *values = found
        metrics = held_out_metrics(features, merge_sums(*values) if values else None)
        source = held_out_data(self.config.data_module).fewshot_eval_json_path
        self._log(f"{describe_held_out(metrics)} ({format_count(len(positions), 'clip')} of {source})")
        return metrics

    def _measure_few_shot(self, model: VideoMAE) -> dict[str, float]:
        """``val_top1_action`` of whole clips; empty if there are no clips or one cannot be read."""
        if not isinstance(self.few_shot, FewshotClips):
            return {}
        clips: list[int] = self.few_shot.clips.tolist()
        found = encode_clips(
            self.few_shot.dataset,
            clips,
            lambda batch: [self._embed(model, self._input(model, batch), batch, None)],
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
        )
        try:
            if isinstance(found, str):
                raise FeatureError(found)
            value = self.few_shot.score(dict(zip(clips, found[0].numpy(), strict=True)))
        except FeatureError as error:
            self._log(f"{METRIC} unknown: {error}")
            return {}
        self._log(self.few_shot.describe(value))
        return {METRIC: value}

    def _input(self, model: VideoMAE, batch: Mapping[str, Tensor]) -> Tensor:
        """Model input (B, C, T, h, w), float32."""
        clip, g = batch[self.config.modality].to(self.training.run.process.device), model.encoder.config
        return preprocess_clips(clip, batch["crop_box"], self.spec, (g.height, g.width))

    def _embed(self, model: VideoMAE, x: Tensor, batch: Mapping[str, Tensor], visible: Tensor | None) -> Tensor:
        """The feature of the clips, (B, D)."""
        dtype = next(model.parameters()).dtype
        return model.encoder.embed(x.to(dtype), visible, self.pooling, batch.get("motion"))

    def _log(self, text: str) -> None:
        self.training.log.info(f"epoch {self.training.state.epoch}: {text}")


def reconstruction_sums(model: VideoMAE, x: Tensor, visible: Tensor, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of each clip, over its removed tokens: the mean squared error (B,), and by channel the mean and the mean square.

    float64: (B,), (B, C), (B, C). Under ZeRO stage 3 all ranks call this together.
    """
    g = model.encoder.config
    prediction, removed = model(x.to(next(model.parameters()).dtype), visible)
    wanted = patch_targets(x, removed, g.grid, target=target).double()
    errors = (prediction.double() - wanted).square().mean(dim=(1, 2))
    values = wanted.unflatten(2, (g.channels, -1))  # (B, N, C, P / C)
    return errors, values.mean(dim=(1, 3)), values.square().mean(dim=(1, 3))


def merge_sums(errors: Tensor, means: Tensor, squares: Tensor) -> tuple[float, float]:
    """The loss over all clips, and that of the best constant per channel, from `reconstruction_sums` of equal sizes."""
    variances = squares.double().mean(dim=0) - means.double().mean(dim=0).square()
    return float(errors.double().mean()), float(variances.mean())
