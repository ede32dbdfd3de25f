"""One thread a process: parallel test workers with more disturb each other."""

import torch

torch.set_num_threads(1)
