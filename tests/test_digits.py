from importlib import resources

import torch
from safetensors import safe_open

from ditfast import load_digits, reference


def test_checkpoint_is_small_and_in_official_layout() -> None:
    file = resources.files("ditfast.data") / "digits.safetensors"
    with resources.as_file(file) as path:
        assert path.stat().st_size <= 4_000_000
        with safe_open(path, framework="pt") as checkpoint:
            names = set(checkpoint.keys())
    assert names == set(reference.DiT(load_digits().config).state_dict())


def test_loads_ready_to_use() -> None:
    model = load_digits()
    assert not model.training
    assert model.pos_embed.dtype == torch.float32
    assert (model.config.input_shape, model.config.num_classes, model.config.null_class) == ((1, 8, 8), 10, 10)
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])).shape == (2, 2, 8, 8)
