"""``from_pretrained``, ``save_pretrained`` and the Hub, whose calls are stubs here."""

from __future__ import annotations

import json
import sys
import types
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import known_width, same_weights, saved, small, weights_of
from torch import nn

from ditfast import CheckpointError, DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.checkpoints.files import OFFICIAL_FILE, WEIGHTS_FILE

EXPRESSIBLE, OTHER = small(num_classes=1000), small(input_size=(8, 12))


def loaded(config: DiTConfig, seed: int = 0) -> DiT:
    return load_checkpoint(weights_of(config, seed=seed), config=config)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize(
    ("config", "file"), [(EXPRESSIBLE, WEIGHTS_FILE), (OTHER, OFFICIAL_FILE)], ids=["diffusers layout", "official layout"]
)
def test_a_folder_gives_the_model_back(config: DiTConfig, file: str, tmp_path: Path) -> None:
    model = loaded(config)
    assert model.save_pretrained(tmp_path / "new" / "folder") is None
    assert names(tmp_path / "new" / "folder") == {file, "config.json"}
    again = DiT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == config
    assert same_weights(again.state_dict(), model.state_dict())
    assert not again.training


@pytest.mark.parametrize("then", [EXPRESSIBLE, OTHER], ids=["diffusers layout", "official layout"])
def test_saving_again_replaces_the_model_and_nothing_else(then: DiTConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    loaded(OTHER if then is EXPRESSIBLE else EXPRESSIBLE).save_pretrained(tmp_path)
    model = loaded(then, seed=1)
    for _ in range(2):
        model.save_pretrained(str(tmp_path), safe_serialization=True, save_function=torch.save)
    assert names(tmp_path) == {"config.json", "notes.txt", WEIGHTS_FILE if then is EXPRESSIBLE else OFFICIAL_FILE}
    assert same_weights(DiT.from_pretrained(str(tmp_path)).state_dict(), model.state_dict())


def test_saving_over_shards_removes_them_and_nothing_else(tmp_path: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    outside = tmp_path / "outside.safetensors"
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (outside, *(folder / name for name in (*shards, "other.safetensors", "notes.txt"))):
        path.write_text("x")
    listed = [*shards, "../outside.safetensors", "notes.txt", WEIGHTS_FILE]
    index = {"weight_map": {str(k): name for k, name in enumerate(listed)}}
    (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    loaded(EXPRESSIBLE).save_pretrained(folder)
    assert names(folder) == {"config.json", "notes.txt", "other.safetensors", WEIGHTS_FILE}
    assert outside.exists()
    assert DiT.from_pretrained(folder).config == EXPRESSIBLE


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path: Path) -> None:
    loaded(OTHER).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = loaded(EXPRESSIBLE)
    with torch.no_grad():
        broken.pos_embed[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: not finite pos_embed"):
        broken.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CheckpointError, match=r"file: cannot be written: .*File exists"):
        loaded(OTHER).save_pretrained(tmp_path / "file")


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    loaded(OTHER).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("name", "value"), [("push_to_hub", True), ("safe_serialization", False), ("variant", "fp16")])
def test_arguments_that_need_more_are_named(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: got .*, expected no such argument.*PyTorchModelHubMixin"):
        DiT(OTHER).save_pretrained(tmp_path / "x", **{name: value})
    assert not (tmp_path / "x").exists()


def test_a_run_of_the_trainer_and_a_pipelines_subfolder(tmp_path: Path) -> None:
    model = loaded(OTHER)
    save_checkpoint(model, tmp_path / "model.safetensors")  # as the Trainer names it
    assert DiT.from_pretrained(tmp_path).config == OTHER
    loaded(EXPRESSIBLE).save_pretrained(tmp_path / "pipeline" / "transformer")
    for subfolder in (None, "transformer"):
        assert DiT.from_pretrained(tmp_path / "pipeline", subfolder=subfolder).config == EXPRESSIBLE
    assert DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_arguments_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^torch_dtype: got torch.float16 beside dtype=bf16, expected one of them"):
        DiT.from_pretrained(tmp_path, dtype="bf16", torch_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^revision: got 'main', expected None, as .* is a local path"):
        DiT.from_pretrained(tmp_path, revision="main")


# ------------------------------------------------------------------------------------------------ subclasses
class Plain(DiT):
    pass


class WithHead(DiT):
    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.register_buffer("scale", torch.tensor(7.0), persistent=False)


def test_a_subclass_is_returned(tmp_path: Path) -> None:
    state = weights_of(known_width())
    model = Plain.from_pretrained(saved(state, tmp_path / "x.pt"), dtype="bf16")
    assert type(model) is Plain
    assert model.source is not None
    assert (model.dtype, model.training, model.source.path) == (torch.bfloat16, False, str(tmp_path / "x.pt"))
    assert same_weights(model.state_dict(), {name: value.bfloat16() for name, value in state.items()})
    assert type(Plain.from_name("DiT-S/8", depth=1)) is Plain


def test_parameters_that_a_subclass_adds_are_fresh(tmp_path: Path) -> None:
    path = saved(weights_of(known_width()), tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=r"^WithHead: not in the checkpoint, so fresh: head\.weight, head\.bias$"):
        model = WithHead.from_pretrained(path, dtype="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.scale == 7
    assert model.head.weight.isfinite().all()
    assert model.head.weight.std() > 0


# ------------------------------------------------------------------------------------------------ the Hub
class Repository:
    """The files of one repository, fetched as ``snapshot_download`` fetches them."""

    def __init__(self, source: Path, cache: Path):
        self.source, self.cache = source, cache
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if repo_id != "owner/model":
            raise FileNotFoundError(f"404 Client Error.\n\nRepository Not Found for {repo_id}")
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                (self.cache / name).write_bytes(path.read_bytes())
        return str(self.cache)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(tmp_path / "repository", tmp_path / "cache")
    stub = types.ModuleType("huggingface_hub")
    stub.snapshot_download = made.snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def fetched(repository: Repository) -> set[str]:
    return {path.relative_to(repository.cache).as_posix() for path in repository.cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["", "transformer"], ids=["a model", "a pipeline"])
def test_an_id_fetches_the_model_alone(place: str, repository: Repository) -> None:
    model, folder = loaded(EXPRESSIBLE), repository.source / place
    model.save_pretrained(folder)
    for name in ("vae/diffusion_pytorch_model.safetensors", "samples.png", "model_index.json"):
        (repository.source / name).parent.mkdir(exist_ok=True)
        (repository.source / name).write_text("not fetched")
    (folder / "diffusion_pytorch_model.bin").write_text("not fetched beside safetensors")
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_text("not fetched unless asked for")
    again = DiT.from_pretrained("owner/model", revision="main", local_files_only=True, num_classes=1000)
    assert same_weights(again.state_dict(), model.state_dict())
    prefix = f"{place}/" if place else ""
    assert fetched(repository) == {f"{prefix}{WEIGHTS_FILE}", f"{prefix}config.json"}
    options = {"revision": "main", "local_files_only": True, "force_download": False, "token": None, "cache_dir": None}
    assert repository.calls == [{"repo_id": "owner/model", **options}]


def test_pickles_where_there_is_nothing_else_and_variants(repository: Repository) -> None:
    loaded(EXPRESSIBLE).save_pretrained(folder := repository.source / "transformer")
    state = dict(weights_of(EXPRESSIBLE))
    (folder / WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert DiT.from_pretrained("owner/model", variant="fp16", subfolder="transformer").config == EXPRESSIBLE
    from ditfast.checkpoints.layouts import to_diffusers

    torch.save(to_diffusers(state), folder / "diffusion_pytorch_model.bin")
    assert same_weights(DiT.from_pretrained("owner/model").state_dict(), state)
    assert len(repository.calls) == 3  # one for the variant; safetensors were asked for first, and there are none


def test_an_official_folder_of_a_hub_mixin(repository: Repository) -> None:
    loaded(OTHER).save_pretrained(repository.source)
    assert DiT.from_pretrained("owner/model").config == OTHER


def test_ids_that_cannot_be_fetched(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"^owner/none: there is no such .* cannot be fetched .*: 404 Client Error\.$"):
        DiT.from_pretrained("owner/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"^owner/model: there is no such file .*: pip install huggingface_hub$"):
        DiT.from_pretrained("owner/model")


@pytest.mark.parametrize("path", ["owner/model.pt", "./model", "a/b/c", "/owner/model", "model"])
def test_paths_are_no_ids(path: str, repository: Repository) -> None:
    with pytest.raises(CheckpointError, match=f"^{path}: there is no such file or folder$"):
        DiT.from_pretrained(path)
    assert repository.calls == []


def test_a_folder_here_is_no_id(repository: Repository) -> None:
    loaded(OTHER).save_pretrained("owner/model")
    assert DiT.from_pretrained("owner/model").config == OTHER
    assert repository.calls == []


# ------------------------------------------------------------------------------------------------ huggingface_hub's mixin
@pytest.mark.parametrize("config", [EXPRESSIBLE, OTHER], ids=["diffusers layout", "official layout"])
def test_the_hubs_mixin_writes_its_card_and_uploads(config: DiTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    uploads: list[set[str]] = []

    class Api:
        def __init__(self, token: str | None = None): ...

        def create_repo(self, repo_id: str, **options: object) -> types.SimpleNamespace:
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **options: object) -> str:
            uploads.append(names(Path(folder_path)))
            return "the commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)

    class Model(DiT, hub.PyTorchModelHubMixin):  # type: ignore[misc,name-defined]
        pass

    model = Model(config).eval()
    model.save_pretrained(tmp_path / "x")
    expected = {"README.md", "config.json", WEIGHTS_FILE if config is EXPRESSIBLE else OFFICIAL_FILE}
    assert names(tmp_path / "x") == expected
    assert model.push_to_hub("owner/model") == "the commit"
    assert model.save_pretrained(tmp_path / "y", push_to_hub=True, repo_id="owner/model") == "the commit"
    assert uploads == [expected, expected]
    again = Model.from_pretrained(tmp_path / "x")
    assert type(again) is Model
    assert again.config == config
    assert same_weights(again.state_dict(), model.state_dict())


def test_a_folder_that_the_hubs_mixin_wrote_alone(tmp_path: Path) -> None:
    """The mixin before DiT writes ``config.json`` and unnamed weights by itself."""
    import dataclasses
    import json

    from safetensors.torch import save_file

    state = weights_of(OTHER)
    save_file(state, tmp_path / OFFICIAL_FILE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(OTHER)))
    model = DiT.from_pretrained(tmp_path)
    assert model.config == OTHER
    assert same_weights(model.state_dict(), state)


def test_the_hubs_mixin_knows_the_configs_class() -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Model(hub.PyTorchModelHubMixin, DiT):  # type: ignore[misc,name-defined]
        pass

    assert Model._hub_mixin_init_parameters["config"].annotation is DiTConfig


# ------------------------------------------------------------------------------------------------ small things
def test_device_and_dtype_are_what_inputs_need() -> None:
    model = DiT(OTHER)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.to("meta").device == torch.device("meta")


@pytest.mark.parametrize("enable", ["enable_gradient_checkpointing", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("disable", ["disable_gradient_checkpointing", "gradient_checkpointing_disable"])
def test_gradient_checkpointing_has_its_usual_names(enable: str, disable: str) -> None:
    model = DiT(OTHER)
    assert not model.is_gradient_checkpointing
    getattr(model, enable)()
    assert model.is_gradient_checkpointing
    assert model.checkpoint_activations
    assert not DiT(OTHER).is_gradient_checkpointing
    getattr(model, disable)()
    assert not model.checkpoint_activations
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing


def test_a_model_shows_its_config_and_its_modules() -> None:
    first, *modules = repr(Plain(OTHER)).splitlines()
    assert first == f"Plain({OTHER!r}"
    assert eval(first.removeprefix("Plain("), {"DiTConfig": DiTConfig}) == OTHER
    assert modules[0] == "  (x_embedder): PatchEmbed("
    assert modules[-1] == ")"
    assert len(modules) < 50
    assert f"(0): DiT({OTHER!r}" in repr(nn.Sequential(DiT(OTHER)))
