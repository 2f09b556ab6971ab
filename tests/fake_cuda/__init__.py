"""A fake CUDA for tests on a machine without a GPU: torch's C++ holds true CUDA tensors, whose memory lies in the CPU's.

    with fake_cuda() as fake:  # an H200
        x = torch.ones(3, device="cuda")  # x.device, dispatch, autograd, autocast and errors are CUDA's

Python's ``torch.cuda`` stays as it is and checks its arguments. Below it ``torch._C`` answers as a CUDA build does
(bindings.py), and a device guard, hooks, an allocator and a kernel for every aten operator are registered for CUDA (cpp/): the
kernel checks what CUDA checks, then runs the CPU's on the same memory. Triton kernels run on the simulator (tests/ptxsim),
backward passes on the autograd engine's device thread. A process of its own gets it by ``environment()``.

What it cannot show: how long anything takes; that work is asynchronous (a missing wait between streams, memory reused too
early, copies from pageable memory that come late); bits of CUDA's own kernels, atomics, TF32 and cuDNN; which operators have no
CUDA kernel or dtype; limits of launches from libraries; fused attention (products and a softmax stand for it); fragmentation;
NCCL and peer access; Inductor's code (its backend is replaced by aot_eager); AMD's kernels.
"""

from __future__ import annotations

from .fake import FakeCuda, environment, fake_cuda, installed
from .parameters import Parameters

__all__ = ["FakeCuda", "Parameters", "environment", "fake_cuda", "installed"]
