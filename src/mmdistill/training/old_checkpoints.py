"""Training states of older versions, converted to the layout of `Training.state_dict`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.architecture import encoder_config_from_meta
from mmdistill.config import to_plain

# Names in checkpoints of commit ae7d5c0 and earlier -> names now
_NAMES = {
    "learned": "weight_compat", "order": "data_order",
    "clips": "num_clips", "accumulate": "accumulate_grad_batches", "batches": "batches_per_epoch",
    "trivial_sum": "constant_baseline_sum", "unusable": "num_skipped_batches",
}  # fmt: skip


def _rename(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(key, key): value for key, value in stored.items()}


def upgrade_pretrain_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a pretraining checkpoint of any version."""
    if "progress" not in stored:
        return dict(stored)
    stored = _rename(stored)
    progress, order = _rename(stored["progress"]), _rename(stored.get("data_order", {}))
    compat, clips_per_batch = stored.get("weight_compat", {}), order.get("global_batch", 1)
    num_clips = (progress["batch"] - progress.get("num_skipped_batches", 0)) * clips_per_batch
    sums = {name: progress[f"{name}_sum"] * clips_per_batch for name in ("loss", "constant_baseline")}
    state = {
        "epoch": progress["epoch"],
        "batch": progress["batch"],
        "sums": {"loss": sums["loss"], "constant_baseline_loss": sums["constant_baseline"]} if num_clips else {},
        "num_clips": num_clips,
        "losses": {path: loss for path, loss in stored.get("saved", {}).items() if "-step=" not in Path(path).name},
        "skipped_steps": stored.get("skipped_steps", 0),
        "weight_compat": {**compat, **to_plain(encoder_config_from_meta(compat))} if compat else {},
        "data_order": order,
    }
    return {**state, "step": stored["step"]} if "step" in stored else state


def upgrade_distill_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a distillation checkpoint of any version, with the state of `EpochCheckpoints` as it is now."""
    callbacks = dict(content.get("callbacks") or {})
    stored, meta = callbacks.get("EpochCheckpoints", {}), content.get("mmdistill") or {}
    if "epoch" in stored:
        return content
    order = _rename(content.get("DistillData", {}))
    means = callbacks.pop("EpochMeans", {"names": [], "sums": []})
    totals = [sum(column) for column in zip(*filter(None, means["sums"]), strict=True)]  # over ranks
    names = [name.replace("trivial_loss", "constant_baseline_loss") for name in means["names"]]
    callbacks["EpochCheckpoints"] = {
        # a checkpoint without a position was written at the end of an epoch
        "epoch": order.pop("epoch", int(content.get("epoch", -1)) + 1),
        "batch": order.pop("batch", 0),
        "step": int(content.get("global_step", 0)),
        "sums": dict(zip(names, totals[:-1], strict=True)) if totals else {},
        "num_clips": totals[-1] if totals else 0,
        **{key: dict(stored.get(key, {})) for key in ("losses", "validations")},
        **{key: int(meta.get(key, 0)) for key in ("skipped_steps", "overflow_steps")},
        "data_order": order,
    }
    return {**content, "callbacks": callbacks}
