"""Imports DeepSpeed with a faked GPU and without a CUDA toolkit, as with torch from pip, and prints its accelerator."""

import sys

import torch
import torch.utils.cpp_extension

for loaded in list(sys.modules):  # by the process that has forked this one
    if loaded.partition(".")[0] == "deepspeed":
        del sys.modules[loaded]
torch.utils.cpp_extension.CUDA_HOME = None
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1

from deepspeed.accelerator import get_accelerator  # noqa: E402

print(get_accelerator()._name)
