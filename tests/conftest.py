"""One thread, and the Triton interpreter where there is no GPU: both before anything imports triton."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit runs
os.environ.pop("FASTREFINE_BACKEND", None)
