"""Pictures that follow a picture: both engines, the official pipeline, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import controls, tiny
from support.daily import daily
from support.networks import BACKENDS, mlx_only, pipeline
from support.parity import assert_parity

from zimage_cli.app import main
from zimage_ref import BackendError, ConfigError, GenerateConfig
from zimage_ref.generation.control import Control
from zimage_ref.generation.jobs import Request
from zimage_ref.generation.starts import starts_of
from zimage_ref.memory import FAST, LoadedModel, generation_stages
from zimage_ref.model.flow import starting_noise
from zimage_ref.pictures.images import read_picture
from zimage_ref.pictures.maps import map_of
from zimage_ref.pictures.metadata import read_record

PROMPT, SIZE = "a red fox in the snow", (80, 48)
NOISE = starting_noise(3, (16, SIZE[1] // 8, SIZE[0] // 8))[None]
MAP, PHOTO = tiny.photograph(*SIZE, seed=7), tiny.photograph(*SIZE, seed=8)
MASK = Image.fromarray(np.pad(np.full((20, 36), 255, np.uint8), ((10, 18), (20, 24))))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nets")
    return {name: controls.write(folder / name, config) for name, config in controls.SMALL.items()}


def drawn(pipe: Any, **options: Any) -> np.ndarray:
    made: np.ndarray = pipe(PROMPT, width=SIZE[0], height=SIZE[1], steps=3, output="array", **options)[0]
    return made


@every_backend
def test_it_acts_only_with_a_scale_and_from_start_to_end(
    backend: str, model_dir: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, path = pipeline(backend, model_dir), nets["2.1"]
    plain = drawn(pipe)
    np.testing.assert_array_equal(drawn(pipe, control=[(path, MAP, 0.0)]), plain)
    follows = drawn(pipe, control=[(path, MAP, 1.0)])
    assert np.abs(follows - plain).max() > 0.02
    np.testing.assert_array_equal(drawn(pipe, control=str(path), control_image=MAP), follows)
    # no step of three lies within half a step
    np.testing.assert_array_equal(drawn(pipe, control=[(path, MAP, 1.0)], control_start=0.4, control_end=0.6), plain)
    first = drawn(pipe, control=[(path, MAP, 1.0)], control_end=0.34)
    assert not np.array_equal(first, plain) and not np.array_equal(first, follows)
    other = nets["1.0"]
    assert not np.array_equal(drawn(pipe, control=[(other, MAP, 1.0)]), follows)
    np.testing.assert_array_equal(drawn(pipe, control=[(path, MAP, 1.0)]), follows)


def test_the_steps_in_which_it_acts() -> None:
    sigmas = (1.0, 0.9, 0.75, 0.5, 0.0)
    for start, end, expected in ((0, 1, [1, 1, 1, 1]), (0.25, 1, [0, 1, 1, 1]), (0, 0.5, [1, 1, 0, 0])):
        control = Control(None, MAP, 1.0, start, end)  # type: ignore[arg-type]  # the file is not asked
        assert [control.acts(sigma, sigmas) for sigma in sigmas[:-1]] == list(map(bool, expected))
        assert control.acts(0.8, sigmas) == bool(expected[1])  # within a step


@mlx_only
@pytest.mark.parametrize("variant", daily(controls.SMALL, "1.0", "2.1"))
def test_engines_agree_with_guidance_and_a_mask(variant: str, model_dir: Path, nets: dict[str, Path]) -> None:
    options = {"control": [(nets[variant], MAP, 0.8)], "guidance": 2.0, "init_image": PHOTO, "mask": MASK}
    expected, actual = (drawn(pipeline(backend, model_dir), **options) for backend in ("numpy", "mlx"))
    assert_parity(actual, expected, "picture")


@every_backend
def test_the_mask_is_an_input_of_the_network(backend: str, model_dir: Path, nets: dict[str, Path]) -> None:
    pipe = pipeline(backend, model_dir)
    (request,) = pipe.plan([GenerateConfig(PROMPT, control=str(nets["2.1"]), control_image=MAP, width=SIZE[0],
                                           height=SIZE[1], init_image=PHOTO, mask=MASK)])  # fmt: skip
    context = request.control.context(lambda pixels: np.asarray(pipe.encode(pixels)), request.picture, request.mask)
    assert context.shape == (1, 33, 6, 10)
    white = np.asarray(MASK)[::8, ::8] > 0
    np.testing.assert_array_equal(context[0, 16], ~white)
    kept = np.asarray(PHOTO, np.float32).transpose(2, 0, 1) / 127.5 - 1
    latents = np.asarray(pipe.encode((kept * (np.asarray(MASK) == 0))[None]))
    np.testing.assert_allclose(context[:, 17:], latents, atol=1e-6)


@every_backend
def test_a_batch_is_its_pictures(backend: str, model_dir: Path, nets: dict[str, Path]) -> None:
    pipe, control = pipeline(backend, model_dir), [(nets["2.0"], MAP, 0.9)]
    prompts = [PROMPT, "soft waves and more, of another length than the first " * 3]
    options: dict[str, Any] = {"width": 64, "height": 48, "steps": 2, "output": "array", "control": control}
    together = pipe(prompts, guidance=1.5, seed=4, **options)
    for i, prompt in enumerate(prompts):
        assert_parity(together[i], pipe(prompt, guidance=1.5, seed=4 + i, **options)[0], "picture")


def test_a_picture_is_encoded_once_for_pictures_that_follow_it_in_other_steps(
    model_dir: Path, nets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAP.save(tmp_path / "map.png")
    pipe, encoded = pipeline("numpy", model_dir), []
    encode = pipe.encode
    monkeypatch.setattr(pipe, "encode", lambda pixels, tiles: encoded.append(pixels.shape) or encode(pixels, tiles))
    given: dict[str, Any] = {"width": 64, "height": 48, "steps": 2, "control": str(nets["1.0"])}
    changes = ({}, {"control_end": 0.5}, {"control_start": 0.5}, {"control_kind": "gray"}, {"init_image": PHOTO})
    configs = [GenerateConfig(PROMPT, control_image=str(tmp_path / "map.png"), **given | change) for change in changes]
    starts = starts_of(pipe, pipe.plan(configs))
    assert starts[0] is starts[1] is starts[2] and len(encoded) == 1 + 1 + 2
    assert starts[3] is not starts[2] and starts[4].latents is not None


@mlx_only
@pytest.mark.parametrize("variant", daily(["1.0", "2.1"], "2.1"))
def test_memory_modes_change_nothing(variant: str, model_dir: Path, nets: dict[str, Path]) -> None:
    control = [(nets[variant], MAP, 1.0)]
    fast, lean, stream = (
        drawn(pipeline("mlx", model_dir, **mode), control=control) for mode in ({}, {"lean": True}, {"stream": True})
    )
    np.testing.assert_array_equal(stream, lean)
    assert_parity(lean, fast, "picture")


@mlx_only
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16"},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"quantize": 8, "group_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_other_precisions(settings: dict[str, Any], model_dir: Path, nets: dict[str, Path]) -> None:
    control = [(nets["2.1"], MAP, 1.0)]
    exact, other = (drawn(pipeline("mlx", model_dir, **each), control=control) for each in ({}, settings))
    assert np.abs(exact - other).mean() < 0.02
    assert np.abs(exact - drawn(pipeline("mlx", model_dir))).mean() > 0.02


def test_memory_counts_its_weights(model_dir: Path, nets: dict[str, Path]) -> None:
    pipe, options = pipeline("numpy", model_dir), {"width": 48, "height": 48}
    plain, follows = (
        pipe.plan([GenerateConfig(PROMPT, **options, **given)])
        for given in ({}, {"control": str(nets["2.1"]), "control_image": MAP})
    )
    model = Path(nets["2.1"], "diffusion_pytorch_model.safetensors").stat().st_size
    for lean in (True, False):
        before, after = (denoise_weights(pipe, requests, lean) for requests in (plain, follows))
        assert 0.98 * model < after - before <= model


def denoise_weights(pipe: Any, requests: Any, lean: bool) -> int:
    control = requests[0].control
    folder = control.file.beside(pipe.folder) if control else pipe.folder
    return generation_stages(LoadedModel(folder, "float32"), FAST, (48, 48), 1, lean)[1].weights


def test_wrong_options(model_dir: Path, nets: dict[str, Path], tmp_path: Path) -> None:
    def config(**options: Any) -> GenerateConfig:
        return GenerateConfig(PROMPT, **options)

    given = {"control": "n", "control_image": MAP}
    for options, fact in (
        ({"control": "net"}, "`control` needs `control_image`"),
        ({"control_image": MAP}, "`control_image` needs `control`"),
        ({"control_end": 0.5}, "`control_end` needs `control`"),
        ({**given, "control_start": 0.5, "control_end": 0.5}, "must be below `control_end`"),
        ({**given, "control_kind": "depth"}, "this map is not made here: give one"),
        ({**given, "control_kind": "cany"}, "'cany' is unknown: known are none, canny, gray"),
        ({**given, "control": "n:-1"}, "n: ControlNet scale -1 must be at least 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=fact):
            config(**options)
    pipe = pipeline("numpy", model_dir)
    with pytest.raises(ConfigError, match="must be one ControlNet"):
        pipe(PROMPT, control=[("a", MAP, 1.0), ("b", MAP, 1.0)])
    wide = controls.write(tmp_path / "wide", controls.VARIANTS["2.1"])
    with pytest.raises(ConfigError, match="wide: is a ControlNet of refiner blocks 2, the transformer has 1"):
        pipe(PROMPT, control=[(wide, MAP, 1.0)])


def test_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    square = Image.fromarray(np.pad(np.full((16, 16, 3), 250, np.uint8), ((8, 8), (8, 8), (0, 0))))
    assert map_of(square, "none") is square
    gray = np.asarray(map_of(PHOTO, "gray"))
    assert (gray[..., 0] == gray[..., 2]).all() and gray.std() > 5
    pytest.importorskip("cv2", reason="opencv is not installed (extra `control`)")
    edges = np.asarray(map_of(square, "canny"))[..., 0] > 0
    ring = np.zeros((32, 32), bool)
    ring[7:25, 7:25] = True
    ring[10:22, 10:22] = False
    assert edges.sum() >= 48 and not (edges & ~ring).any()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(BackendError, match=r"edges need OpenCV: pip install 'zimage-mlx\[control\]'"):
        map_of(square, "canny")


def test_the_command_and_its_record(model_dir: Path, nets: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    PHOTO.save(tmp_path / "photo.png")
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    command = ["generate", "--backend", "numpy", "--steps", "2", "--no-thumbnail"]
    assert not main([*command, "--model-dir", str(model_dir), "--prompt", PROMPT, "--control", f"{nets['lite']}:0.7",
                     "--control-image", str(tmp_path / "photo.png"), "--control-kind", "gray", "--save-control",
                     "--output", str(out)])  # fmt: skip
    assert "2.1 lite: 1 block," in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert read_picture(out).size == SIZE
    np.testing.assert_array_equal(read_picture(tmp_path / "out.control.png"), np.asarray(map_of(PHOTO, "gray")))
    record = read_record(out)
    assert record["control"] == f"{nets['lite']}:0.7" and len(str(record["control_image_sha256"])) == 16
    assert not main([*command, "--from-image", str(out), "--output", str(again)])
    assert "is not the same" not in capsys.readouterr().err
    np.testing.assert_array_equal(read_picture(again), read_picture(out))
    controls.write(nets["lite"], controls.SMALL["lite"], salt="other")
    assert not main([*command, "--from-image", str(out), "--output", str(again), "--overwrite"])
    controls.write(nets["lite"], controls.SMALL["lite"])
    assert f"{nets['lite']}: is not the same" in " ".join(capsys.readouterr().err.split())


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("guidance", [0.0, 2.5])
@pytest.mark.parametrize("variant", controls.SMALL)
def test_official_pictures(
    variant: str, guidance: float, model_dir: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    official = pytest.importorskip("support.official", reason="diffusers is not installed (extra `oracle`)")
    torch = pytest.importorskip("torch")
    theirs = official.control_pipeline(model_dir, nets[variant])
    expected = theirs(
        [PROMPT], width=SIZE[0], height=SIZE[1], output_type="np", control_image=MAP, num_inference_steps=3,
        controlnet_conditioning_scale=0.8, guidance_scale=guidance, negative_prompt=["soft waves"],
        latents=torch.from_numpy(NOISE),
    ).images[0]  # fmt: skip
    options = {"guidance": guidance, "negative_prompt": "soft waves"} if guidance else {"guidance": 0.0}
    for backend in ("numpy", "mlx"):
        actual = drawn(pipeline(backend, model_dir), control=[(nets[variant], MAP, 0.8)], latents=NOISE, **options)
        assert_parity(actual, expected, "official picture")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", ["2.0", "2.1"])
def test_official_inpainting(
    variant: str, model_dir: Path, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, only the network knows the mask; here, the kept part is put back after each step, too: not for this."""
    official = pytest.importorskip("support.official", reason="diffusers is not installed (extra `oracle`)")
    torch = pytest.importorskip("torch")
    theirs = official.control_pipeline(model_dir, nets[variant], inpaint=True)
    expected = theirs(
        [PROMPT], width=SIZE[0], height=SIZE[1], output_type="latent", control_image=MAP, image=PHOTO, mask_image=MASK,
        num_inference_steps=3, controlnet_conditioning_scale=0.8, guidance_scale=0.0, latents=torch.from_numpy(NOISE),
    ).images[0]  # fmt: skip
    monkeypatch.setattr(Request, "latent_mask", lambda request, h, w: None)
    for backend in ("numpy", "mlx"):
        actual = pipeline(backend, model_dir)(
            PROMPT, width=SIZE[0], height=SIZE[1], steps=3, guidance=0.0, output="latents", latents=NOISE,
            init_image=PHOTO, mask=MASK, control=[(nets[variant], MAP, 0.8)],
        )[0]  # fmt: skip
        assert_parity(actual, expected.float().numpy(), "official picture")
