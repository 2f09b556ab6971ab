import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import small
from foreign import diffusers
from support import randomize
from tiny_vae import saved, tiny

from ditfast import DiT
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.images import to_pixels
from ditfast.sampling import Sampler, sample
from ditfast.sampling.painter import Painter
from ditfast.threads import one_thread
from ditfast.vae import VAEError, decode, draw_latents, encode_moments, image_size, latent_shape, load_vae, scaling


@pytest.mark.parametrize("inside", ["", "vae"], ids=["model", "pipeline"])
def test_a_folder_is_loaded(inside: str, tmp_path: Path) -> None:
    saved(tmp_path / inside)
    vae = load_vae(tmp_path)
    expected = tiny().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())
    assert not vae.training
    assert image_size(vae, 8) == 16


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_scaled_and_images_clamped(shift: float | None) -> None:
    vae = tiny(scaling_factor=0.5, shift_factor=shift).eval()
    latents = torch.randn(2, 4, 8, 6) * 3
    images = decode(vae, latents)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + (shift or 0.0)).sample
    assert images.shape == (2, 3, 16, 12)
    assert expected.abs().max() > 1 == images.abs().max()
    assert torch.allclose(images, expected.clamp(-1, 1), atol=1e-5)


def test_an_image_does_not_depend_on_how_many_there_are() -> None:
    vae, latents = tiny().eval(), torch.randn(5, 4, 8, 8)
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with one_thread():
        for size in (1, 2, 3):
            seen.clear()
            whole = decode(vae, latents, size)
            assert seen == [size] * -(-5 // size)
            for count in (1, 4):
                assert torch.equal(decode(vae, latents[:count], size), whole[:count])


def test_moments_are_those_of_the_encoder() -> None:
    vae, images = tiny().eval(), torch.rand(3, 3, 16, 12) * 2 - 1
    moments = encode_moments(vae, images, 2)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist
    assert moments.shape == (3, 8, 8, 6)
    assert torch.allclose(moments, torch.cat([expected.mean, expected.std], 1), atol=1e-6)
    assert not moments.requires_grad
    assert not moments.is_inference()


def test_moments_do_not_depend_on_how_many_images_there_are() -> None:
    vae, images = tiny().eval(), torch.rand(5, 3, 16, 16) * 2 - 1
    with one_thread():
        whole = encode_moments(vae, images, 3)
        for count in (1, 4):
            assert torch.equal(encode_moments(vae, images[:count], 3), whole[:count])


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_drawn_and_scaled(shift: float | None) -> None:
    vae = tiny(scaling_factor=0.5, shift_factor=shift).eval()
    mean, std, noise = torch.randn(2, 4, 8, 8), torch.rand(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    latents = draw_latents(torch.cat([mean, std], 1), noise, **scaling(vae))
    assert torch.allclose(latents, (mean + std * noise - (shift or 0.0)) * 0.5)
    with torch.no_grad():
        expected = vae.decode(mean + std * noise).sample.clamp(-1, 1)
    assert torch.allclose(decode(vae, latents), expected, atol=1e-5)


def test_the_shape_of_latents() -> None:
    assert latent_shape(tiny(), 16) == (4, 8, 8)


def test_no_latents_no_images() -> None:
    assert decode(tiny(), torch.empty(0, 4, 8, 8), 2).shape == (0, 3, 16, 16)


def test_a_painter_decodes() -> None:
    model = randomize(DiT(small())).eval()
    vae, schedule = tiny().eval(), steps(GaussianDiffusion("3"), "ddpm")
    paint = Painter(Sampler(model, schedule, seed=1), lambda image: image % 10, cfg_scale=2.0, vae=vae)
    done: list[float] = []
    pixels = paint.paint(range(3, 6), done.append)
    latents = sample(model, schedule, torch.tensor([3, 4, 5]), cfg_scale=2.0, seed=1, images=[3, 4, 5])
    assert pixels.shape == (3, *paint.image_shape) == (3, 16, 16, 3)
    assert (pixels == to_pixels(decode(vae, latents))).all()
    assert done == [1.0, 1.0, 1.0]


def test_what_is_not_finite_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(3, 1, 8, 8)
    images[1, 0, 2, 3] = torch.inf
    monkeypatch.setattr(Sampler, "__call__", lambda *arguments, **options: images)
    paint = Painter(Sampler(DiT(small(in_channels=1)), steps(GaussianDiffusion("3"), "ddpm")), lambda image: 0)
    with pytest.raises(FloatingPointError, match="image 11 came out infinite or NaN"):
        paint.paint(range(10, 13))


# ------------------------------------------------------------------------------------------------ errors
def test_other_channels_are_refused() -> None:
    with pytest.raises(VAEError, match="vae: decodes 4 channels, but the model makes 8"):
        decode(tiny(), torch.zeros(1, 8, 8, 8))


@pytest.mark.parametrize("pixels", [0, 7])
def test_pixels_that_make_no_whole_latents_are_refused(pixels: int) -> None:
    with pytest.raises(VAEError, match=f"vae: encodes multiples of 2 pixels, got {pixels}"):
        latent_shape(tiny(), pixels)


@pytest.mark.parametrize("name", ["./missing", "missing", "/missing/folder", "a/b/c/d", "file"])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(VAEError, match=f"^vae: {name}: there is no such folder$"):
        load_vae(name)


@pytest.mark.parametrize(("name", "options"), [("a/b", {}), ("a/b/vae", {"subfolder": "vae"})])
def test_a_hub_that_is_not_there(name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def offline(place: str, **given: str) -> None:
        seen.append((place, given))
        raise OSError(f"{place} is out of reach\nand three more lines")

    monkeypatch.setattr(diffusers().AutoencoderKL, "load_config", offline)
    with pytest.raises(VAEError) as caught:
        load_vae(name)
    assert seen == [("a/b", options)]
    assert "the hub did not give it: a/b is out of reach (without a network: `hf download a/b --local-dir" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(VAEError, match="needs diffusers: pip install diffusers"):
        load_vae("owner/name")


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = saved(tmp_path).glob("*.safetensors")
    state = load_file(file)
    del state["decoder.conv_out.bias"]
    save_file(state, file)
    with pytest.raises(VAEError, match=r"its weights lack 1, such as decoder\.conv_out\.bias"):
        load_vae(tmp_path)


def test_damaged_weights_and_other_classes_are_refused(tmp_path: Path) -> None:
    (file,) = saved(tmp_path / "damaged").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(VAEError, match="damaged: cannot be loaded: "):
        load_vae(tmp_path / "damaged")
    config = saved(tmp_path / "other") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    with pytest.raises(VAEError, match="got a UNet2DModel, expected an AutoencoderKL"):
        load_vae(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VAEError, match="empty: cannot be loaded: "):
        load_vae(tmp_path / "empty")
