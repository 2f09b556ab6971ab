"""Questions that the families ask about somebody else's modules."""

from __future__ import annotations

from torch import nn

from .home import Foreign, require


def check_layer_norm(norm: Foreign, name: str) -> None:
    require(type(norm) is nn.LayerNorm, f"{name} is a {type(norm).__name__}, expected a LayerNorm")
    require(norm.weight is None and norm.bias is None, f"{name} has a weight or a bias, expected a LayerNorm without")


def check_adaptive(modulation: Foreign, vectors: int, hidden_size: int, name: str) -> None:
    built = isinstance(modulation, nn.Sequential) and len(modulation) == 2 and type(modulation[0]) is nn.SiLU
    require(built, f"{name} is not SiLU and a linear")
    check_features(modulation[1], vectors * hidden_size, f"{name}.1")


def check_features(linear: Foreign, features: int, name: str) -> None:
    got = getattr(linear, "out_features", features)
    require(got == features, f"{name} returns {got} features, expected {features}")


def check_idle(module: Foreign, *names: str) -> None:
    """Optional children that would change the numbers unless they do nothing."""
    for name in names:
        child = getattr(module, name, None)
        require(is_idle(child), f"{name} is {child}, expected none")


def check_children(module: Foreign, known: set[str], name: str) -> None:
    unknown = sorted(child for child, part in module.named_children() if child not in known and not is_idle(part))
    require(not unknown, f"{name} also has {', '.join(unknown)}")


def is_idle(child: Foreign) -> bool:
    return child is None or type(child) is nn.Identity or (isinstance(child, nn.Dropout) and child.p == 0)


def has_children(module: nn.Module, *names: str) -> bool:
    return all(name in module._modules and module._modules[name] is not None for name in names)


def convolution_in(proj: object) -> Foreign:
    """Return the convolution that makes patches, or the one inside the adapter that replaced it; None if there is none."""
    parts = proj.modules() if isinstance(proj, nn.Module) else ()
    return next((part for part in parts if isinstance(part, nn.Conv2d)), None)
