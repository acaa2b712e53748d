"""One thread a process: pytest-xdist already uses the cores, and spinning threads cost minutes."""

import torch

torch.set_num_threads(1)
