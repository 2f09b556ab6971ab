"""OpenVINO as a rival on CPU: the reference model converted, quantised if asked, and compiled for torch's thread count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HINTS = {"fp32": "f32", "bf16": "bf16"}
CALIBRATION_SAMPLES = 4
TIMESTEPS = 1000

Inputs = tuple[Tensor, Tensor, Tensor]


class InOpenVino:
    """An fp32 ``nn.Module`` of (x, t, y) in OpenVINO; converts and compiles in the first call, for that call's shapes.

    Returns fp32 in memory that the next call overwrites. Raises ValueError for a dtype that OpenVINO has no CPU hint for.
    """

    def __init__(self, model: Callable[[], nn.Module], dtype_name: str, classes: int, *, int8: bool):
        if dtype_name not in HINTS:
            raise ValueError(f"dtype: got {dtype_name}, expected {' or '.join(HINTS)} for OpenVINO on CPU")
        self.model, self.dtype_name, self.classes, self.int8 = model, dtype_name, classes, int8
        self.request: Any = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        arguments = (x.float(), t, y)
        if self.request is None:
            self.request = self._compiled(arguments).create_infer_request()
        arrays = [argument.numpy() for argument in arguments]
        return torch.from_numpy(self.request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    def _compiled(self, inputs: Inputs) -> Any:
        import openvino

        with torch.inference_mode(False), torch.no_grad():
            example = tuple(part.clone() for part in inputs)
            converted = openvino.convert_model(self.model(), example_input=example, input=[part.shape for part in inputs])
        if self.int8:
            converted = self._quantized(converted, inputs[0])
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self.dtype_name],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.Core().compile_model(converted, "CPU", settings)

    def _quantized(self, converted: Any, x: Tensor) -> Any:
        import nncf

        generator = torch.Generator().manual_seed(2)

        def sample() -> list[Any]:
            latents = torch.randn(x.shape, generator=generator)
            t = torch.randint(TIMESTEPS, (len(x),), generator=generator)
            y = torch.randint(self.classes, (len(x),), generator=generator)
            return [latents.numpy(), t.numpy(), y.numpy()]

        samples = nncf.Dataset([sample() for _ in range(CALIBRATION_SAMPLES)])
        return nncf.quantize(converted, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_SAMPLES)
