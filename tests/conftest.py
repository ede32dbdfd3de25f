"""One thread a process: workers with more disturb each other. Without a GPU kernels are interpreted."""

import os
from contextlib import suppress

import torch

with suppress(ImportError):  # a GPU machine may lack it
    import hypothesis

    hypothesis.settings.register_profile("tvmatch", deadline=None)  # other work may run beside the tests
    hypothesis.settings.load_profile("tvmatch")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined
