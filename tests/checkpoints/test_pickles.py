"""Files of torch.save that hold more than tensors, or are pickled otherwise: read, and nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import os
import pathlib
import pickle
import posixpath
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import same_weights, saved, small, training_checkpoint, weights_of

from ditfast import CheckpointError, load_checkpoint

STATE = weights_of(small())
MARK = "the-pickle-ran"


def omegaconf_of(values: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config pickled under OmegaConf's names, with the state that its own has."""
    base, nodes, containers = (types.ModuleType(f"omegaconf.{name}") for name in ("base", "nodes", "dictconfig"))
    for module in (types.ModuleType("omegaconf"), base, nodes, containers):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def made(module: types.ModuleType, name: str, **state: object) -> Any:
        kind = vars(module).setdefault(name, type(name, (), {"__module__": module.__name__}))
        instance = kind()
        vars(instance).update(state)
        return instance

    def node(value: object) -> Any:
        metadata = made(base, "Metadata", ref_type=Any, object_type=dict, resolver_cache=collections.defaultdict(dict))
        if isinstance(value, dict):
            content = {key: node(inner) for key, inner in value.items()}
            return made(containers, "DictConfig", _metadata=metadata, _parent=None, _content=content)
        return made(nodes, "AnyNode", _metadata=metadata, _val=value)

    return node(values)


BESIDE: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "numpy-scalars": lambda _: {"fid": np.float64(2.27), "step": np.int64(7), "best": np.bool_(True), "name": np.str_("x")},
    "numpy-rng": lambda _: np.random.RandomState(0).get_state(),
    "numpy-array": lambda _: np.arange(3.0),
    "path": lambda _: [pathlib.Path("results/000.pt"), pathlib.PureWindowsPath("C:\\results")],
    "namespace": lambda _: argparse.Namespace(model="DiT-S/2", out=pathlib.Path("results"), lr=np.float32(1e-4)),
    "omegaconf": lambda patch: omegaconf_of({"optimizer": {"lr": 1e-4}, "name": "x"}, patch),
    "containers": lambda _: [collections.defaultdict(list, a=[1]), collections.deque([1]), {1, 2}, frozenset({3}), b"bytes"],
    "times": lambda _: [datetime.datetime(2026, 1, 2), datetime.timedelta(1)],
    "torch": lambda _: [torch.float16, torch.Size([2]), torch.device("cuda:0"), torch.get_rng_state()],
}
PROTOCOLS: list[dict[str, Any]] = [
    *({"pickle_protocol": protocol} for protocol in (2, 3, 4, 5)),
    *({"pickle_protocol": protocol, "_use_new_zipfile_serialization": False} for protocol in (2, 4)),
]


def ids(options: dict[str, Any]) -> str:
    return f"{'legacy-' if len(options) > 1 else ''}protocol{options['pickle_protocol']}"


@pytest.mark.parametrize("options", PROTOCOLS, ids=ids)
def test_protocols(options: dict[str, Any], tmp_path: Path) -> None:
    path = saved({"ema": STATE, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "x.pt", **options)
    assert same_weights(load_checkpoint(path, config=small()).state_dict(), STATE)


@pytest.mark.parametrize("options", PROTOCOLS[::2], ids=ids)
@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_the_weights(
    kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        path = saved({"model": STATE, "beside": BESIDE[kind](patch)}, tmp_path / "x.pt", **options)
    assert same_weights(load_checkpoint(path, config=small()).state_dict(), STATE)


def test_parameters_and_views_keep_their_values(tmp_path: Path) -> None:
    packed = torch.cat([value.flatten() for value in STATE.values()])
    parts = packed.split([value.numel() for value in STATE.values()])
    views = {name: part.view(value.shape) for (name, value), part in zip(STATE.items(), parts, strict=True)}
    views["final_layer.linear.bias"] = torch.nn.Parameter(views["final_layer.linear.bias"])
    path = saved(collections.OrderedDict(views), tmp_path / "x.pt", pickle_protocol=4)
    assert same_weights(load_checkpoint(path, config=small()).state_dict(), STATE)


def test_values_among_the_weights_that_are_none_are_left_out_aloud(tmp_path: Path) -> None:
    path = saved({**STATE, "step": np.int64(3), "out": pathlib.Path("results")}, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=r"x\.pt: left out, as they are no weights of a DiT: step, out$"):
        model = load_checkpoint(path, config=small())
    assert same_weights(model.state_dict(), STATE)


class Call:
    """A pickle that calls something where it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def custom(value: object) -> object:
    os.mkdir(MARK)
    return value


CODE: dict[str, tuple[Callable[[], object], str]] = {
    "system": (lambda: Call(os.mkdir, MARK), r"\w+\.mkdir"),
    "eval": (lambda: Call(eval, f"__import__('os').mkdir('{MARK}')"), r"\w+\.eval"),
    "getattr": (lambda: Call(getattr, "text", "upper"), r"\w+\.getattr"),
    "module": (lambda: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "own-function": (lambda: Call(custom, 1), r"\S+custom"),
}


@pytest.mark.parametrize("options", PROTOCOLS[::2], ids=ids)
@pytest.mark.parametrize("kind", CODE)
def test_no_code_runs(kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, named = CODE[kind]
    monkeypatch.chdir(tmp_path)
    path = saved({"model": STATE, "args": argparse.Namespace(), "code": build()}, tmp_path / "x.pt", **options)
    with pytest.raises(CheckpointError, match=f"refused: it holds {named}, expected tensors"):
        load_checkpoint(path, config=small())
    assert not (tmp_path / MARK).exists()


def test_values_that_are_inert_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path's or an array's own constructor is not called with what a file says."""

    def called(*_: object) -> None:
        raise AssertionError("it ran")

    path = saved({"model": STATE, "out": pathlib.PurePosixPath("a"), "fid": np.float64(1)}, tmp_path / "x.pt")
    monkeypatch.setattr(pathlib.PurePosixPath, "__new__", called)
    load_checkpoint(path, config=small())


@pytest.mark.parametrize(
    ("state", "named"),
    [
        pytest.param({"__setstate__": 1}, "a function with a state", id="function"),
        pytest.param((None, {"__defaults__": (1,)}), "a function with a state", id="slots"),
    ],
)
def test_nothing_of_torch_can_be_changed(state: object, named: str, tmp_path: Path) -> None:
    """A pickle's BUILD on what it may call would change that for the whole process."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    value = pickle.dumps(state, 2)[2:-1]
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))
    zipped = saved({"model": 1}, tmp_path / "x.pt")
    path = with_pickle(zipped, b"\x80\x02" + b"cargparse\nNamespace\n0" + rebuild + value + b"b.")
    with pytest.raises(CheckpointError, match=f"refused: it holds {named}, expected tensors"):
        load_checkpoint(path, config=small())
    assert before == (torch._utils._rebuild_tensor_v2.__defaults__, vars(torch._utils._rebuild_tensor_v2))


def with_pickle(path: Path, content: bytes) -> Path:
    """A file of torch.save whose pickle is another."""
    import zipfile

    with zipfile.ZipFile(path) as before:
        entries = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(path, "w") as after:
        for name, entry in entries.items():
            after.writestr(name, content if name.endswith("data.pkl") else entry)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_is_named(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps(STATE, protocol))
    with pytest.raises(CheckpointError, match=r"refused: it was written by pickle\.dump, .*expected .* torch\.save"):
        load_checkpoint(tmp_path / "x.pt", config=small())


def test_a_forced_weights_only_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    load_checkpoint(saved({"model": STATE}, tmp_path / "x.pt"), config=small())
    with pytest.raises(CheckpointError, match=r"refused: .* TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        load_checkpoint(saved({"model": STATE, "out": pathlib.Path("x")}, tmp_path / "x.pt"), config=small())


def test_functions_by_number_are_refused(tmp_path: Path) -> None:
    copyreg.add_extension("posixpath", "join", 240)
    try:
        path = saved({"model": STATE, "join": posixpath.join}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="refused: it holds the extension 240"):
            load_checkpoint(path, config=small())
    finally:
        copyreg.remove_extension("posixpath", "join", 240)


# ------------------------------------------------------------------------------------------------ heads
def arguments_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    return {
        "namespace": lambda: {"args": argparse.Namespace(num_heads=12, lr=np.float64(1e-4))},
        "dict": lambda: {"config": {"model": {"num_heads": 12}}},
        "omegaconf": lambda: {"cfg": omegaconf_of({"data": {"size": 8}, "model": {"params": {"num_heads": 12}}}, monkeypatch)},
        "lightning": lambda: {"hyper_parameters": {"n_heads": 12}},
    }[kind]()


@pytest.mark.parametrize("kind", ["namespace", "dict", "omegaconf", "lightning"])
@pytest.mark.parametrize("width", [384, 48], ids=["a-paper's-width", "another-width"])
def test_heads_are_those_of_the_saved_arguments(width: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(hidden_size=width, num_heads=12)
    with monkeypatch.context() as patch:
        path = saved({"ema": weights_of(config), **arguments_of(kind, patch)}, tmp_path / "x.pt")
    assert load_checkpoint(path).config == config
    with pytest.raises(CheckpointError, match=r"config: got num_heads 4 where the checkpoint says 12$"):
        load_checkpoint(path, config=small(hidden_size=width, num_heads=4))


def test_heads_without_arguments_are_the_papers_or_the_callers() -> None:
    state = weights_of(small(hidden_size=384, num_heads=6))
    assert load_checkpoint(training_checkpoint(state, state)).config.num_heads == 6
    assert load_checkpoint(state, config=small(hidden_size=384, num_heads=12)).config.num_heads == 12


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"num_heads": 7}, "num_heads: the saved arguments say 7, which does not divide the width 384; give config="),
        (
            {"model": {"num_heads": 6, "n_heads": 12}},
            "num_heads: the saved arguments say 6 and 12; give config=",
        ),
    ],
    ids=["no-divisor", "several"],
)
def test_arguments_that_tell_no_heads(arguments: dict[str, object], fault: str) -> None:
    content = {"ema": weights_of(small(hidden_size=384, num_heads=6)), "args": arguments}
    with pytest.raises(CheckpointError, match=fault):
        load_checkpoint(content)


@pytest.mark.parametrize(
    "arguments",
    [
        {"vae": {"num_heads": 1}},
        {"encoder": {"model": {"num_heads": 12}}},
        {"num_heads": True},
        {"num_heads": [3, 6]},
        {},
        None,
    ],
    ids=["vae", "encoder", "bool", "list", "empty", "none"],
)
def test_heads_of_other_models_are_passed_over(arguments: dict[str, object]) -> None:
    state = weights_of(small(hidden_size=384, num_heads=6))
    assert load_checkpoint({"ema": state, "args": arguments}).config.num_heads == 6


def test_nearer_arguments_win() -> None:
    content = {
        "ema": weights_of(small(hidden_size=384, num_heads=6)),
        "args": {"num_heads": 12, "encoder": {"num_heads": 6}, "heads": None},
    }
    assert load_checkpoint(content).config.num_heads == 12
