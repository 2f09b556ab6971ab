"""The predicted time of a whole forward, or of a step of training: the sum over its operations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..config import TIMESTEP_FEATURES, DiTConfig
from ..flops import DeviceSpec, Op, operations
from ..problem import Problem
from . import kernel_times as times
from .assumptions import HOST_ATEN_US, HOST_LIBRARY_US, HOST_TRITON_US, STREAM, TORCH_NORM
from .passes import EAGER_BACK_KERNELS, EAGER_KERNELS, FUSED_KERNELS, LINEAR_BACK_KERNELS
from .problems import joint_backward, predicted_ms

FUSED_ROUTES = {
    "linear_gelu": ("triton", "cublaslt", "torch"),
    "attention": ("triton", "sdpa"),
    "cross_attention": ("triton", "sdpa"),
    "patch_embed": ("triton",),
    "linear_unpatchify": ("triton",),
}
ROW_OPS = ("layer_norm_modulate", "gated_residual_layer_norm_modulate")
HOST_US = {"torch": HOST_LIBRARY_US, "cublaslt": HOST_LIBRARY_US, "sdpa": HOST_LIBRARY_US, "triton": HOST_TRITON_US}


class PredictedOp(NamedTuple):
    """What each of ``times`` equal operations takes, with its backward in training."""

    name: str
    times: int
    route: str  # of ``ROUTES``
    ms: float  # on the device
    host_ms: float  # to launch its kernels, outside of CUDA graphs


def predicted_model_ms(
    config: DiTConfig,
    batch: int,
    dtype: torch.dtype,
    device: DeviceSpec,
    plan: str = "none",
    *,
    fused: bool = True,
    graph: bool = False,
) -> float:
    """Milliseconds of a forward, or of a step of training.

    Args:
        config: of the model.
        batch: images, on this device.
        dtype: of products.
        device: one of ``ditfast.flops.DEVICES``.
        plan: ``"none"``: a forward; ``"keep"``, ``"checkpoint"``: a step, as of ``ditfast.flops.operations``.
        fused: ditfast, each op on the route that is predicted to be fastest; else eager PyTorch.
        graph: replayed as a CUDA graph; else the host's launches take the time, where they take longer than the device.

    Raises:
        ValueError: there is no such plan, or the device's architecture is not known.
    """
    found = predicted_ops(config, batch, dtype, device, plan, fused=fused)
    # Python 3.12's sum rounds less often than that of 3.11; fsum gives the same bits in both.
    on_device = math.fsum(op.times * op.ms for op in found)
    return on_device if graph else max(on_device, math.fsum(op.times * op.host_ms for op in found))


def predicted_ops(
    config: DiTConfig, batch: int, dtype: torch.dtype, device: DeviceSpec, plan: str = "none", *, fused: bool = True
) -> list[PredictedOp]:
    """What ``predicted_model_ms`` adds up.

    Raises:
        ValueError: as ``predicted_model_ms``.
    """
    if device.arch not in STREAM:
        raise ValueError(f"device: got architecture {device.arch!r}, expected one of {', '.join(STREAM)}")
    model = _Model(config, batch, dtype, device, plan, fused)
    return [model.predicted(op) for op in operations(config, batch, dtype, plan, fused=fused)]


class _Model:
    def __init__(self, config: DiTConfig, batch: int, dtype: torch.dtype, device: DeviceSpec, plan: str, fused: bool):
        self.config, self.device, self.plan, self.fused = config, device, plan, fused
        self.training = plan != "none"
        self.tokens = config.num_tokens + (2 if config.conditioning == "in_context" else 0)
        self.rows = batch * self.tokens
        self.problems = self._problems(batch, dtype)

    def predicted(self, op: Op) -> PredictedOp:
        if self.fused and op.name in ROW_OPS:
            route, ms = "triton", self._rows_ms(op)
            return PredictedOp(op.name, op.times, route, ms, self._host_ms(op, route))
        if op.name in self.problems:
            route, ms = self._fastest(self.problems[op.name])
        else:
            route, ms = "torch", self._passes_ms(op)
        idle = self._kernels(op) - 1
        return PredictedOp(op.name, op.times, route, ms + idle * 1e3 * times.KERNEL, self._host_ms(op, route))

    def _fastest(self, problem: Problem) -> tuple[str, float]:
        attends = problem.op.endswith("attention")
        routes = FUSED_ROUTES.get(problem.op, ("torch",)) if self.fused else ("sdpa",) if attends else ("torch",)
        found = {route: predicted_ms(problem, route, self.device) for route in (*routes, "torch")}
        known = {route: ms for route, ms in found.items() if ms is not None}
        asked = {route: known[route] for route in routes if route in known} or known
        route = min(asked, key=lambda route: asked[route])
        return route, asked[route]

    def _rows_ms(self, op: Op) -> float:
        """The stream is fp32 in training, whatever the products are: what is moved, the operation says."""
        D = self.config.hidden_size
        kind = "training" if self.training else ""
        seconds = times.triton_rows(op.name, kind, self.rows, D, op.moved, self.device)
        forward = times.streamed(op.moved, self.device) if seconds is None else seconds
        if not self.training:
            return 1e3 * forward
        seconds = joint_backward(op.name, self.rows, self.tokens, D, op.back_moved, self.device)
        backward = times.streamed(op.back_moved, self.device) if seconds is None else seconds
        again = forward if self.plan == "checkpoint" and op.again else 0.0
        return 1e3 * (forward + backward + again)

    def _passes_ms(self, op: Op) -> float:
        forward = times.streamed(op.moved, self.device, TORCH_NORM if op.name == "norm" else 1.0)
        if not self.training:
            return 1e3 * forward
        backward = times.streamed(op.back_moved, self.device) if op.back_moved else 0.0
        again = forward if self.plan == "checkpoint" and op.again else 0.0
        return 1e3 * (forward + backward + again)

    def _kernels(self, op: Op) -> int:
        """Of its forward."""
        if op.name == "adaLN":
            return 2 if self.fused and not self.training else 2 * (self.config.depth + 1)
        return (FUSED_KERNELS if self.fused else EAGER_KERNELS).get(op.name, 1)

    def _host_ms(self, op: Op, route: str) -> float:
        """An op of ditfast has Python around its first kernel; backwards and passes of torch have none."""
        first = HOST_US[route] if self.fused and op.name in (*self.problems, *ROW_OPS) else HOST_ATEN_US
        forward = first + (self._kernels(op) - 1) * HOST_ATEN_US
        if not self.training:
            return 1e-3 * forward
        again = forward if self.plan == "checkpoint" and op.again else 0.0
        if route == "triton":
            return 1e-3 * (forward + HOST_TRITON_US + again)
        kernels = LINEAR_BACK_KERNELS if op.back_macs else int(op.back_moved > 0)
        return 1e-3 * (forward + EAGER_BACK_KERNELS.get(op.name, kernels) * HOST_ATEN_US + again)

    def _problems(self, batch: int, dtype: torch.dtype) -> dict[str, Problem]:
        """By the names of ``ditfast.flops.operations``."""
        config, rows, training = self.config, self.rows, self.training
        D, hidden, patches = config.hidden_size, config.mlp_hidden_size, batch * config.num_tokens
        values = config.in_channels * config.patch_size**2
        vectors = config.depth * config.modulation_vectors + (2 if config.modulation_vectors else 0)
        gelu_inside = self.fused and not training
        H, d = config.num_heads, config.head_dim
        first, last = ("patch_embed", "linear_unpatchify") if gelu_inside else ("linear", "linear")
        found = {
            "timestep's features": ("linear", batch, (D, TIMESTEP_FEATURES)),
            "timestep": ("linear", batch, (D, D)),
            "adaLN": ("linear", batch, (vectors * D, D)),
            "patch_embed": (first, patches, (D, values)),
            "qkv": ("linear", rows, (3 * D, D)),
            "attention": ("attention", rows, (self.tokens, H, d)),
            "proj": ("linear", rows, (D, D)),
            "fc1": ("linear_gelu" if gelu_inside else "linear", rows, (hidden, D)),
            "fc2": ("linear", rows, (D, hidden)),
            "cross q": ("linear", rows, (D, D)),
            "cross kv": ("linear", 2 * batch, (2 * D, D)),
            "cross-attention": ("cross_attention", rows, (self.tokens, 2, H, d)),
            "cross proj": ("linear", rows, (D, D)),
            "linear_unpatchify": (last, patches, (config.patch_out_features, D)),
        }
        return {name: Problem(op, dtype, count, sizes, training) for name, (op, count, sizes) in found.items()}
