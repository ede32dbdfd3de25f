"""One thread a process: workers with more disturb each other. Without a GPU kernels are interpreted."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined
