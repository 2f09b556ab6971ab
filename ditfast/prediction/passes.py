"""What plain torch makes of the fused ops: chains of kernels, each a pass over memory."""

from __future__ import annotations

from typing import NamedTuple


class Pass(NamedTuple):
    """Over tensors of the op's size, as ``ditfast.flops.operations`` counts them; the backward's kernels in one."""

    tensors: int  # read and written
    kernels: int = 1
    back_tensors: int = 0
    back_kernels: int = 1
    norm: bool = False


NORM = Pass(2, back_tensors=3, back_kernels=2, norm=True)
SCALE = Pass(2, kernels=2, back_tensors=6, back_kernels=4)  # 1 + scale is a kernel of its own
SHIFT = Pass(2, back_tensors=1, back_kernels=1)
GATE = Pass(2, back_tensors=6, back_kernels=3)
RESIDUAL = Pass(3, back_tensors=3)
GELU = Pass(2, back_tensors=3)
COPY = Pass(2, back_tensors=2)
ROW_OPS = {
    "layer_norm_modulate": (NORM, SCALE, SHIFT),
    "gated_residual": (GATE, RESIDUAL),
    "gated_residual_layer_norm_modulate": (GATE, RESIDUAL, NORM, SCALE, SHIFT),
}
# Of whole images, or timesteps: kernels of torch's chain, and passes of one kernel that reads and writes all once.
SMALL_OPS = {
    "unpatchify": (1, 2),
    "timestep_embedding": (10, 1),
    "classifier_free_guidance": (6, 2),
    "denoise_update": (12, 4),
}
# By the names of ``ditfast.flops.operations``, where more than one kernel starts.
EAGER_KERNELS = {"timestep's features": 11, "timestep": 4, "scale": 2, "linear_unpatchify": 2}
FUSED_KERNELS = {"timestep's features": 2, "timestep": 4}
EAGER_BACK_KERNELS = {"norm": 2, "scale": 4, "gate": 3, "attention": 3}
LINEAR_BACK_KERNELS = 3  # of input, weight and bias
