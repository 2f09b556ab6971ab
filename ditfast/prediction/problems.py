"""The predicted time of one op on one route."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from ..flops import DeviceSpec
from ..problem import SIZES, Problem
from . import kernel_times as times
from .assumptions import TORCH_NORM
from .passes import COPY, GELU, RESIDUAL, ROW_OPS, SMALL_OPS, Pass

ROUTES = ("torch", "triton", "cublaslt", "sdpa", "flash")
FP32 = 4  # bytes
JOINT_KINDS = {"layer_norm_modulate": "norm", "gated_residual": "gate", "gated_residual_layer_norm_modulate": "joint"}
ROW_TENSORS = {"layer_norm_modulate": (2, 3), "gated_residual": (3, 3), "gated_residual_layer_norm_modulate": (4, 6)}
VECTORS = {"layer_norm_modulate": 2, "gated_residual": 1, "gated_residual_layer_norm_modulate": 3}
ROWS_OF_A_PARTIAL = ((16384, 32), (4096, 16), (1024, 8), (0, 4))  # as kernels.joint_backward.rows_per_program
Seconds = float | None


@functools.lru_cache(4096)
def predicted_ms(problem: Problem, route: str, device: DeviceSpec) -> float | None:
    """Milliseconds on the device, as inside a CUDA graph: what the host takes to launch is not in it.

    Args:
        problem: with ``training`` forward and backward together.
        route: ``"torch"``: plain torch, the library's products and a chain of passes; ``"triton"``: our kernels;
            ``"cublaslt"``: the library's product with GELU in its epilogue (``linear_gelu``); ``"sdpa"``, ``"flash"``:
            torch's and flash-attn's attention.
        device: one of ``ditfast.flops.DEVICES``.

    Returns:
        None where nothing is predicted: a route that the op does not have, fp32 products in Triton, an architecture or a
        head dim that was not counted.

    Raises:
        ValueError: no such op or route, or not the sizes that the op has.
    """
    if problem.op not in SIZES:
        raise ValueError(f"op: got {problem.op!r}, expected one of {', '.join(SIZES)}")
    if route not in ROUTES:
        raise ValueError(f"route: got {route!r}, expected one of {', '.join(ROUTES)}")
    if len(problem.sizes) != len(SIZES[problem.op]):
        raise ValueError(f"sizes: got {problem.sizes}, expected {', '.join(SIZES[problem.op])}")
    if device.arch not in times.STREAM:
        return None
    seconds = _FAMILIES[problem.op](problem, route, device)
    return None if seconds is None else 1e3 * seconds


def _row_op(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    op, rows, (T, D) = problem.op, problem.rows, problem.sizes
    tensor, vector = rows * D * problem.dtype.itemsize, rows / T * D * problem.dtype.itemsize
    if route == "torch":
        found = [_passed(one, tensor, device) for one in ROW_OPS[op]]
        found += [_passed_back(one, tensor, device) for one in ROW_OPS[op] if problem.training]
        return math.fsum(found)
    if route != "triton":
        return None
    forward, back = ROW_TENSORS[op]
    kind = "training" if problem.training and op != "gated_residual" else ""
    moved = forward * tensor + VECTORS[op] * vector
    return _sum(
        times.triton_rows(op, kind, rows, D, moved, device),
        joint_backward(op, rows, T, D, back * tensor + VECTORS[op] * vector, device) if problem.training else 0.0,
    )


def joint_backward(op: str, rows: int, T: int, D: int, moved: float, device: DeviceSpec) -> Seconds:
    """Its rows, and the sums of the partial sums."""
    wanted = next(size for least, size in ROWS_OF_A_PARTIAL if rows >= least)
    size = min(wanted, 1 << (T - 1).bit_length())
    partials = 2 * VECTORS[op] * rows / size * D * FP32
    kind = JOINT_KINDS[op]
    return _sum(
        times.triton_rows("joint_backward", kind, rows, D, moved + partials / 2, device, programs_rows=size),
        times.streamed(partials / 2, device),
    )


def _linear(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    return _product("linear", problem, problem.sizes, route, device)


def _linear_gelu(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    hidden = _bytes(problem, problem.sizes[0])
    if route == "torch":
        return _sum(
            _product("linear", problem, problem.sizes, route, device),
            _passed(GELU, hidden, device),
            _passed_back(GELU, hidden, device) if problem.training else 0.0,
        )
    if route == "cublaslt":
        return None if problem.training else _product("linear", problem, problem.sizes, "torch", device)
    if problem.training:  # z is stored too; GELU's backward is a pass
        extra = times.streamed(4 * hidden, device)
        return _sum(_product("linear_gelu", problem, problem.sizes, route, device), extra)
    return _product("linear_gelu", problem, problem.sizes, route, device)


def _linear_gated_residual(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    """For gradients a linear and a ``gated_residual``, whatever the route; the gate is taken to be one vector a sample."""
    N, _ = problem.sizes
    if route == "torch" or (route == "triton" and problem.training):
        rest = Problem("gated_residual", problem.dtype, problem.rows, (1, N), problem.training)
        return _sum(_product("linear", problem, problem.sizes, route, device), _row_op(rest, route, device))
    return _product("linear_gated_residual", problem, problem.sizes, route, device, extra=_bytes(problem, N))


def _mlp(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    """In Triton without gradients fc2 is still the library's."""
    hidden, N, K = problem.sizes
    first, second = problem._replace(op="linear_gelu", sizes=(hidden, K)), problem._replace(op="linear", sizes=(N, hidden))
    if route not in ("torch", "triton"):
        return None
    return _sum(
        _linear_gelu(first, route, device),
        _linear(second, route if problem.training else "torch", device),
    )


def _product(
    kernel: str, problem: Problem, sizes: tuple[int, ...], route: str, device: DeviceSpec, extra: float = 0.0
) -> Seconds:
    """With its two gradients and the bias's, in training."""
    M, (N, K), dtype = problem.rows, sizes, problem.dtype
    moved = (M * N + M * K + N * K) * dtype.itemsize
    if route == "torch":
        forward: Seconds = times.library_product(M, N, K, dtype, moved + extra, device)
        gradients = [times.library_product(*shape, dtype, moved, device) for shape in ((M, K, N), (N, K, M))]
    elif route == "triton":
        forward = times.triton_product(kernel, M, N, K, dtype, moved + extra, device)
        input_gradient = times.triton_product("input_gradient", M, K, N, dtype, moved, device)
        weight_gradient = times.triton_product("weight_gradient", N, K, M, dtype, moved, device)
        if input_gradient is None or weight_gradient is None:
            return None
        gradients = [input_gradient, weight_gradient]
    else:
        return None
    if not problem.training:
        return forward
    return _sum(forward, *gradients, times.streamed(M * N * dtype.itemsize, device))


def _attention(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    if problem.op == "attention":
        T, H, d = problem.sizes
        S = T
    else:
        T, S, H, d = problem.sizes
    samples, dtype = problem.rows // max(T, 1), problem.dtype
    moved = (2 * problem.rows + 2 * samples * S) * H * d * dtype.itemsize
    shape = (samples * H, T, S, d, dtype)
    if route == "triton":
        backward = times.triton_attention_backward(*shape, 2 * moved, device) if problem.training else 0.0
        return _sum(times.triton_attention(*shape, moved, device), backward)
    if route == "cublaslt" or (route == "flash" and dtype.itemsize == FP32):
        return None
    back = times.library_attention(*shape, 2 * moved, device, backward=True) if problem.training else 0.0
    return _sum(times.library_attention(*shape, moved, device), back)


def _end(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    """The first and last layer: products so thin that memory decides. In training each is taken for a linear in torch."""
    N, K = problem.sizes
    if route == "torch":
        seconds = _product("linear", problem, problem.sizes, route, device)
        if problem.op == "patch_embed":
            return _sum(seconds, _passed(COPY, _bytes(problem, N), device), _passed(RESIDUAL, _bytes(problem, N), device))
        norm = ROW_OPS["layer_norm_modulate"] if problem.op == "final_layer" else ()
        passes = [_passed(one, _bytes(problem, K), device) for one in norm]
        return _sum(seconds, *passes, _passed(COPY, _bytes(problem, N), device))
    if route != "triton" or problem.training:
        return None
    return times.streamed(_bytes(problem, N + K) + N * K * problem.dtype.itemsize, device)


def _small(problem: Problem, route: str, device: DeviceSpec) -> Seconds:
    """torch's chain takes each of its kernels a pass."""
    kernels, tensors = SMALL_OPS[problem.op]
    moved = _bytes(problem, math.prod(problem.sizes))
    if route == "torch":
        return kernels * times.streamed(2 * moved, device)
    return times.streamed(tensors * moved, device) if route == "triton" else None


def _bytes(problem: Problem, width: int) -> int:
    return problem.rows * width * problem.dtype.itemsize


def _passed(one: Pass, tensor: float, device: DeviceSpec) -> float:
    share = TORCH_NORM if one.norm else 1.0
    return times.streamed(one.tensors * tensor, device, share) + (one.kernels - 1) * times.KERNEL


def _passed_back(one: Pass, tensor: float, device: DeviceSpec) -> float:
    return times.streamed(one.back_tensors * tensor, device) + (one.back_kernels - 1) * times.KERNEL


def _sum(*parts: Seconds) -> Seconds:
    known = [part for part in parts if part is not None]
    return math.fsum(known) if len(known) == len(parts) else None


_FAMILIES: dict[str, Callable[[Problem, str, DeviceSpec], Seconds]] = {
    **dict.fromkeys(ROW_OPS, _row_op),
    "linear": _linear,
    "linear_gelu": _linear_gelu,
    "linear_gated_residual": _linear_gated_residual,
    "mlp": _mlp,
    "attention": _attention,
    "cross_attention": _attention,
    **dict.fromkeys(("patch_embed", "final_layer", "linear_unpatchify"), _end),
    **dict.fromkeys(SMALL_OPS, _small),
}
