"""Settings every test shares: one thread a process (two processes share two cores) and a fixed
hypothesis profile."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("thermo", deadline=None, derandomize=True)
settings.load_profile("thermo")
