"""The dtypes of weights and of products, by the names that commands give them."""

import torch

INT8 = "int8"  # of products on the CPU engine; weights stay in one of the others
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
