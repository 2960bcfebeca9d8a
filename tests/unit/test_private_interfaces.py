"""One test per private or semi-public interface of a library that this package uses; see pyproject.toml for the bounds.

A failing test names the interface that changed and the module that uses it. Nothing is trained. Attributes that exist
only in a running engine are looked up in the source of their class.
"""

import importlib
import inspect
import io
import multiprocessing.util
import pickle
import re
import zipfile
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.launcher.api import LaunchConfig
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mmdistill.distributed.launch import KILL_TIMEOUT_S


def _source_mentions(owner: Any, *names: str) -> None:
    source = inspect.getsource(owner)
    missing = [name for name in names if not re.search(rf"\b{name}\b", source)]
    assert not missing, f"{owner.__module__}.{owner.__qualname__} has no {', '.join(missing)}"


# torch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default_pg_timeout", "default_pg_nccl_timeout"])
def test_torch_default_pg_timeout(name: str) -> None:
    """distributed/process.py: timeout of the groups that DeepSpeed creates."""
    assert hasattr(torch.distributed.distributed_c10d, name)


def test_torch_loader_looks_at_its_workers() -> None:
    """data/dataloader.py: how often the loader looks whether its workers live."""
    _source_mentions(DataLoader.__iter__, "_get_iterator")
    _source_mentions(_MultiProcessingDataLoaderIter._try_get_data, "_data_queue", "timeout", "is_alive")


def test_torch_profiler_sees_all_threads() -> None:
    """training/step_trace.py: teachers may run in threads of `run_in_parallel`."""
    assert "profile_all_threads" in torch._C._profiler._ExperimentalConfig.__init__.__doc__


def test_multiprocessing_temporary_folder() -> None:
    """data/dataloader.py: the folder of the workers' sockets."""
    _source_mentions(multiprocessing.util.get_temp_dir, "_config", "tempdir")


def test_torch_elastic_agent_kills_after_its_timeout() -> None:
    """distributed/launch.py: signals that the agent leaves to the launcher, and its time limit after a failure."""
    assert "signals_to_handle" in inspect.signature(LaunchConfig).parameters
    for method in (SubprocessContext.close, SubprocessContext._close):
        assert inspect.signature(method).parameters["timeout"].default == KILL_TIMEOUT_S
    assert "self.close()" in inspect.getsource(SubprocessContext._poll)


def test_torch_dataloader_iterator_workers() -> None:
    """data/dataloader.py: the message about a dead worker."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    _source_mentions(_MultiProcessingDataLoaderIter, "_workers")
    iterator = iter(DataLoader(TensorDataset(torch.zeros(2)), num_workers=1))
    assert [worker.is_alive() for worker in iterator._workers] == [True]
    assert len(list(iterator)) == 2


def test_torch_adamw_step_supports_amp_scaling() -> None:
    """distill/module.py: a fused AdamW must not unscale fp16 gradients inside its step."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    assert optimizer._step_supports_amp_scaling is True
    _source_mentions(torch.amp.GradScaler.step, "_step_supports_amp_scaling")


def test_torch_optimizer_step_can_be_shadowed() -> None:
    """training/nonfinite.py: `skip_optimizer_step` replaces the method on the instance."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    calls: list[str] = []
    optimizer.step = lambda *_: calls.append("shadow")  # type: ignore[method-assign,assignment]
    optimizer.step()
    del optimizer.step  # type: ignore[method-assign]
    optimizer.step()
    assert calls == ["shadow"]


def test_torch_zip_layout() -> None:
    """checkpoint/formats/torch_zip.py: one folder with data.pkl and uncompressed data/N."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file)
    with zipfile.ZipFile(file) as archive:
        names = {info.filename.partition("/")[2] for info in archive.infolist()}
        assert {"data.pkl", "data/0", "byteorder", "version"} <= names
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.start_dir > 0


def test_torch_pickle_opcodes() -> None:
    """checkpoint/find.py: the epoch in the first bytes of a Lightning file; needs pickle protocol 2."""
    from mmdistill.checkpoint.find import _PICKLED_EPOCH

    file = io.BytesIO()
    torch.save({"epoch": 49, "global_step": 3}, file)
    with zipfile.ZipFile(file) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert content.startswith(pickle.PROTO + b"\x02")
    match = _PICKLED_EPOCH.search(content)
    assert match is not None
    assert match[1] == bytes([49])


# timm -----------------------------------------------------------------------------------------------------------------


def test_timm_block_computes_what_the_models_assume() -> None:
    """models/videomae.py: uses the block's parts without layer scale and drop path."""
    from timm.models.beit import Block

    torch.manual_seed(0)
    block = Block(16, 2, qkv_bias=True, mlp_ratio=2, attn_head_dim=8, drop_path=0.0).eval()
    assert {name for name, _ in block.named_children()} == {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
    assert (block.gamma_1, block.gamma_2) == (None, None)
    x = torch.randn(2, 5, 16)
    attended = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), attended + block.mlp(block.norm2(attended)))


def test_timm_attention_parameters() -> None:
    """models/attention.py: subclass that replaces `forward`."""
    from timm.models.beit import Attention

    attention = Attention(16, 2, qkv_bias=True, attn_head_dim=6)
    names = {name for name, _ in attention.named_parameters()}
    assert names == {"q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias"}
    assert attention.num_heads == 2
    assert list(inspect.signature(Attention.forward).parameters)[:3] == ["self", "x", "shared_rel_pos_bias"]


def test_timm_schedule_is_a_function_of_the_step() -> None:
    """training/optim.py: `lr_scale` of a param group, and updates in any order."""
    from timm.scheduler import CosineLRScheduler

    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.5)]
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    schedule = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.0, t_in_epochs=False)
    rates = []
    for step in (6, 1, 6):
        schedule.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == rates[2] != rates[1]
    assert rates[0][1] == pytest.approx(rates[0][0] / 2)


# Lightning ------------------------------------------------------------------------------------------------------------


def test_lightning_stateful_loader_check() -> None:
    """distill/callbacks.py: `ResumableLoader` has the methods that allow a resume inside an epoch."""
    from lightning_fabric.utilities.types import _Stateful

    from mmdistill.distill.callbacks import ResumableLoader

    assert isinstance(ResumableLoader(TensorDataset(torch.zeros(2))), _Stateful)
    assert not isinstance(DataLoader(TensorDataset(torch.zeros(2))), _Stateful)
    fit_loop = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    _source_mentions(type(fit_loop.epoch_loop), "_Stateful", "is_resumable_loader")


def test_lightning_signal_connector() -> None:
    """distill/trainer.py: disables Lightning's signal handlers."""
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert callable(trainer._signal_connector.register_signal_handlers)
    _source_mentions(pl.trainer.call._call_and_handle_interrupt, "_call_and_handle_interrupt")
    _source_mentions(pl.Trainer._run, "register_signal_handlers")


def test_lightning_precision_plugin_scaler() -> None:
    """distill/callbacks.py: the loss scale of fp16."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu")
    assert plugin.scaler is not None
    assert callable(plugin.scaler.get_scale)
    assert not hasattr(pl.plugins.precision.Precision(), "scaler")


def test_lightning_teacher_cache_calls() -> None:
    """distill/teacher_cache.py: computes features in the precision and on the device of a training step."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with trainer.precision_plugin.train_step_context():
        assert trainer.strategy.batch_to_device({"a": torch.zeros(1)})["a"].device.type == "cpu"


def test_lightning_callback_state_key_is_the_class_name() -> None:
    """distill/callbacks.py, training/old_checkpoints.py: checkpoints store callback states under these names."""
    assert pl.Callback().state_key == "Callback"


@pytest.mark.parametrize(
    "name",
    [
        "setup_environment",
        "_init_optimizers",
        "_initialize_deepspeed_train",
        "backward",
        "block_backward_sync",
        "optimizer_step",
        "optimizer_state",
        "lightning_module_state_dict",
        "load_model_state_dict",
        "load_optimizer_state_dict",
        "lightning_restore_optimizer",
        "handles_gradient_accumulation",
        "save_checkpoint",
        "load_checkpoint",
        "teardown",
    ],
)
def test_lightning_deepspeed_strategy_method(name: str) -> None:
    """distill/strategy.py: overridden methods of `DeepSpeedStrategy`."""
    from mmdistill.distill.strategy import SingleFileDeepSpeedStrategy

    base, own = getattr(DeepSpeedStrategy, name), getattr(SingleFileDeepSpeedStrategy, name)
    assert own is not base
    if callable(base):
        required = [
            p.name
            for p in inspect.signature(base).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        accepted = inspect.signature(own).parameters
        is_open = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in accepted.values())
        assert is_open or set(required) <= set(accepted), required


def test_lightning_deepspeed_strategy_attributes() -> None:
    """distill/strategy.py: the engine, the devices and the loss scaling of `DeepSpeedStrategy`."""
    _source_mentions(DeepSpeedStrategy, "deepspeed_engine", "_initialize_deepspeed_train", "_init_optimizers")
    assert DeepSpeedStrategy(config={}).parallel_devices is None


# DeepSpeed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "basic_optimizer",  # pretrain/trainer.py: the schedule's optimizer at stage 0
        "skipped_steps",  # pretrain/deepspeed.py, distill/callbacks.py: overflow accounting
        "param_names",  # checkpoint/deepspeed_engine.py: names of fp32 masters
        "checkpoint_engine",  # checkpoint/deepspeed_engine.py: replaced by the shim
    ],
)
def test_deepspeed_engine_attribute(name: str) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    _source_mentions(DeepSpeedEngine, name)


@pytest.mark.parametrize(
    "name",
    [
        "get_global_grad_norm",  # pretrain/trainer.py, distill/callbacks.py: the logged norm
        "set_gradient_accumulation_boundary",  # distill/strategy.py: Lightning decides when to step
        "zero_optimization_stage",  # checkpoint/deepspeed_engine.py
        "_copy_recovery_script",  # checkpoint/deepspeed_engine.py: replaced by a no-op
        "_get_all_ckpt_names",  # checkpoint/deepspeed_engine.py: replaced if the contents are resliced
        "_get_zero_param_shapes",  # checkpoint/deepspeed_engine.py: parameter groups of this run
        "destroy",  # distill/strategy.py: releases hooks and buffers
    ],
)
def test_deepspeed_engine_method(name: str) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert callable(getattr(DeepSpeedEngine, name))


def test_deepspeed_backward_can_leave_the_loss_unscaled() -> None:
    """distill/strategy.py: Lightning has already divided the loss by the number of batches."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    # its decorator hides the signature
    assert re.search(r"def backward\(self, loss[^)]*scale_wrt_gas", inspect.getsource(DeepSpeedEngine))


@pytest.mark.parametrize(
    "name", ["single_partition_of_fp32_groups", "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"]
)
def test_deepspeed_zero_1_and_2_optimizer(name: str) -> None:
    """distill/strategy.py, checkpoint/formats/deepspeed_zero.py: the partition and its moments."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    _source_mentions(DeepSpeedZeroOptimizer, name)


def test_deepspeed_zero_3_optimizer() -> None:
    """checkpoint/deepspeed_engine.py: sizes of the slices."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    _source_mentions(DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat")


def test_deepspeed_unfused_fp16_optimizer() -> None:
    """checkpoint/deepspeed_engine.py, checkpoint/formats/deepspeed_zero.py: fp32 masters of stage 0."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    _source_mentions(FP16_UnfusedOptimizer, "fp16_groups", "fp32_groups")


def test_deepspeed_overflow_checker() -> None:
    """pretrain/deepspeed.py: `has_overflow_serial` is replaced on the instance."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.utils import CheckOverflow

    _source_mentions(FP16_UnfusedOptimizer.step, "overflow_checker")
    _source_mentions(CheckOverflow.has_overflow, "has_overflow_serial")


def test_deepspeed_loss_scaler() -> None:
    """pretrain/deepspeed.py: an overflow at the minimum scale must not raise inside DeepSpeed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(1, scale_window=1, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    assert scaler.raise_error_at_min_scale is True
    _source_mentions(DynamicLossScaler.update_scale, "raise_error_at_min_scale")


def test_deepspeed_safe_state_functions() -> None:
    """distill/strategy.py: moments and weights of one parameter under ZeRO."""
    from deepspeed import utils

    for name in ("safe_get_full_optimizer_state", "safe_set_full_optimizer_state", "safe_set_full_fp32_param"):
        assert callable(getattr(utils, name))


def test_deepspeed_accelerators() -> None:
    """distributed/process.py: a CPU run on a machine with a GPU."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    assert callable(set_accelerator)
    assert isinstance(get_accelerator()._name, str)
    assert CPU_Accelerator()._name == "cpu"
    assert "_name" in inspect.getsource(CUDA_Accelerator)


def test_deepspeed_build_shm_op() -> None:
    """distributed/process.py `disable_shm_op`: the op that is compiled for CPU runs."""
    backend = importlib.import_module("deepspeed.comm.torch")
    assert callable(backend.build_shm_op)
    _source_mentions(backend.TorchBackend, "build_shm_op")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ],
)
def test_deepspeed_classes_in_optimizer_files(module: str, name: str) -> None:
    """checkpoint/deepspeed_engine.py: classes that its optimizer files contain."""
    assert isinstance(getattr(importlib.import_module(module), name), type)


# Hydra ----------------------------------------------------------------------------------------------------------------


def test_hydra_argument_parser() -> None:
    """cli/hydra_help.py: the options of a command line."""
    from hydra._internal.utils import get_args_parser

    options = get_args_parser().parse_args(["--help", "--config-name=x", "--config-dir=d", "--config-path=p", "a=1"])
    assert (options.help, options.config_name, options.config_dir, options.config_path) == (True, "x", "d", "p")
    assert options.overrides == ["a=1"]


def test_hydra_experimental_callback() -> None:
    """cli/sweep.py: records failed jobs of a sweep."""
    from hydra.experimental.callback import Callback

    assert list(inspect.signature(Callback.on_job_end).parameters)[:3] == ["self", "config", "job_return"]
    assert callable(Callback.on_multirun_end)
