"""Evaluation pixels are open_clip's; training pixels follow from the random state and each change does what it says."""

import dataclasses
import io
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import ExifTags, Image
from timm.data.auto_augment import rand_augment_transform

from data_tools.sample.decode import ImageError, Jpeg, decode_image, read_image
from mmvit.config.validate import validate
from mmvit.data import transforms
from mmvit.data.transforms import (
    AugmentConfig,
    eval_pixels,
    train_pixels,
    train_pixels_from_bytes,
)

NOTHING = AugmentConfig(crop_area=None)
EVERYTHING = AugmentConfig([0.5, 1.0], [0.7, 1.3], 30.0, 0.1, 0.3, 0.3, 0.3, 0.1)
CHANGES = {
    "crop_area": [0.3, 0.5],
    "zoom": [0.5, 0.7],
    "rotate": 45.0,
    "shift": 0.3,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.9,
    "hue": 0.4,
    "flip": 1.0,
    "rand_augment": [2, 9],
    "timm_augment": "rand-m9-n3-p1-mstd0.5-inc1",
    "erase": 1.0,
}

# Side 4 of `pattern`, as they were before there was a faster way, and the next number from the random state.
GOLDEN = [
    (
        "default",
        (72, 72),
        "50a954b865a25ab67a9367a88c8277952778897e5da2767e9aa46f7fcd728083857c7d8785827f73757f8285867c7c87",
        910331,
    ),
    (
        "default",
        (90, 61),
        "4db654935db64ba46fae48b180a04db722649d744e94887f7fb7658bb0a85e8a8a7387848a82748a718b7e767b788c79",
        843099,
    ),
    (
        "quickstart",
        (72, 72),
        "44a353a45ea153ad769260a9858171972268877d5d9b787999a3697bbd70787f807a7984837e7c72707d7f7d7f787b84",
        199714,
    ),
    (
        "quickstart",
        (90, 61),
        "5c81866b707c8a657b758d5e83718e5c257c7e795b9179798c8c787eab757d817b7c7b83837c7b7f7a7d7c75767d7c7c",
        199714,
    ),
    (
        "everything",
        (72, 72),
        "f5f5587633a24c8b4dab4789749b5771f5f5936133747f735fa766749ea46269f5f57577727a618161846d6d67746d78",
        825922,
    ),
    (
        "everything",
        (90, 61),
        "335978603c6873534d73674d587a534f575c65613e6568583f7260584e735a5c5b655859595f5e5d6652675f67516660",
        404750,
    ),
    (
        "nothing",
        (72, 72),
        "4ba956b75fa359b6759665a88886759625728b7e599f787d97a76e7fcc787d83837d7e8788817f7473808284847c7d87",
        211119,
    ),
    (
        "nothing",
        (90, 61),
        "6188876a71808d647f7792618b72946229867f7c58957b7d8c907c83b67c81847e807f87877f7f817e80807878807f81",
        211119,
    ),
    (
        "colour",
        (72, 72),
        "93b65563b0b33f75c0a523a6e15d3bbf4593aa636abe6b91aa9a6793b65f83827aaa448a849643a9b155887695679063",
        912987,
    ),
    (
        "colour",
        (90, 61),
        "c0645db5bf5a5dcbc3367ec6ab1eaea254cc56929c9c7271b66a9355866f8c66906f61b5b03d988c8f5499875f8f65b9",
        912987,
    ),
]
SETTINGS = {
    "default": AugmentConfig(),
    "quickstart": AugmentConfig(None, [0.9, 1.1], 5.0, 0.04, 0.1, 0.1, 0.15),
    "everything": EVERYTHING,
    "nothing": NOTHING,
    "colour": AugmentConfig([0.3, 0.5], hue=0.4),
}


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([7 * x + y, 3 * y + x * x // 9, 11 * x + 5 * y], axis=2).astype(np.uint8))


def photos() -> dict[str, Image.Image]:
    """Real photographs, which come with scikit-learn and matplotlib."""
    places = [
        ("sklearn", "datasets/images/china.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ]
    return {Path(path).stem: read_image(Path(find_spec(package).origin).parent / path) for package, path in places}


def mosaic(photo: Image.Image, width: int, height: int) -> Image.Image:
    """A photo of any size, as sharp in each pixel as the small one: mirrored as often as it takes."""
    values = np.asarray(photo)
    for axis in (0, 1):
        values = np.concatenate([values, np.flip(values, axis)], axis)
    return Image.fromarray(np.tile(values, (2, 2, 1))[:height, :width])


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=87, subsampling=2, **options)
    return file.getvalue()


def other(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {"turned": {"exif": exif}, "CMYK": {}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    image.convert("CMYK" if kind == "CMYK" else "RGB").save(
        file, kind if kind in ("PNG", "WEBP") else "JPEG", **options
    )
    return file.getvalue()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At which reductions JPEGs are decoded."""
    found = []
    plain = Jpeg.decode
    monkeypatch.setattr(Jpeg, "decode", lambda self, s, **options: found.append(s) or plain(self, s, **options))
    return found


def changed(image: Image.Image, config: AugmentConfig, seed: int = 0, size: int = 32) -> np.ndarray:
    return train_pixels(image, size, config, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("width", "height"),
    [(300, 200), (200, 300), (97, 31), (31, 97), (224, 224), (225, 224), (50, 333), (10, 13), (1, 40), (33, 32)],
)
@pytest.mark.parametrize("size", [32, 47, 224])
def test_eval_pixels_are_those_of_open_clip(width: int, height: int, size: int):
    image = noise(width, height)
    pipeline = image_transform(size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = (pipeline(image) * 255).round().to(torch.uint8).numpy()
    assert expected.shape == (3, size, size)
    assert np.array_equal(eval_pixels(image, size), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "turned", "CMYK"])
def test_pixels_of_files_are_those_of_open_clip(kind: str):
    photo = photos()["china"]
    data = jpeg(photo) if kind == "JPEG" else other(photo, kind)
    pipeline = image_transform(224, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.transpose(Image.Transpose.ROTATE_270) if kind == "turned" else image
    expected = (pipeline(image) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(eval_pixels(decode_image(data), 224), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "turned", "CMYK"])
def test_what_is_no_plain_jpeg_is_exact_in_the_fast_way(kind: str):
    data = other(photos()["flower"], kind)
    found = [
        train_pixels_from_bytes(data, 96, EVERYTHING, np.random.default_rng(0), fast=fast) for fast in (True, False)
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_fast_way_turns_as_the_exact_one(orientation: int):
    """Each turn of EXIF, also where a JPEG is decoded at an eighth of its size; blue is where a viewer shows it."""
    left = np.zeros((256, 320, 3), np.uint8)
    left[:, :160, 2] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = jpeg(Image.fromarray(left), exif=exif)
    blue = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]
    half = {"left": np.s_[:, :14], "right": np.s_[:, 18:], "top": np.s_[:14], "bottom": np.s_[18:]}[blue]
    for fast in (True, False):
        found = train_pixels_from_bytes(data, 32, NOTHING, np.random.default_rng(0), fast=fast)
        assert found[2].mean() == pytest.approx(127.5, abs=8)
        assert found[2][half].mean() > 240


@pytest.mark.parametrize("fast", [True, False])
def test_a_bad_picture_is_named(fast: bool):
    for data in (jpeg(noise(64, 64))[:-300], b"no picture"):
        with pytest.raises(ImageError) as caught:
            train_pixels_from_bytes(data, 32, NOTHING, np.random.default_rng(0), fast=fast, where="a.tar/key7")
        assert caught.value.where == "a.tar/key7"


@pytest.mark.parametrize("shape", [(1, 65_500), (65_500, 1)])
def test_a_long_line_is_no_bomb(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Resized whole, it would have 67 million pixels; its middle is like the middle of open_clip's."""
    sizes = []
    plain = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or plain(self, size, *rest))
    data = jpeg(Image.linear_gradient("L").convert("RGB").resize(shape))
    expected = eval_pixels(Image.open(io.BytesIO(data)).convert("RGB"), 32)
    assert np.abs(expected.astype(int) - 127).max() <= 2
    assert max(width * height for width, height in sizes[1:]) < 300 * 32 * 32


@pytest.mark.parametrize(("setting", "shape", "pixels", "following"), GOLDEN)
def test_pixels_stay_what_they_were(setting: str, shape: tuple[int, int], pixels: str, following: int):
    rng = np.random.default_rng((1, 2, 3))
    found = train_pixels(pattern(*shape), 4, SETTINGS[setting], rng)
    expected = np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(3, 4, 4)
    assert np.abs(found.astype(int) - expected).max() <= 1  # the last digit is the processor's
    assert rng.integers(10**6) == following


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_training_pixels_from_bytes_are_those_of_the_decoded_picture(setting: str):
    data = jpeg(photos()["china"])
    found = train_pixels_from_bytes(data, 96, SETTINGS[setting], np.random.default_rng(0), fast=False)
    image = Image.open(io.BytesIO(data))
    assert np.array_equal(found, train_pixels(image, 96, SETTINGS[setting], np.random.default_rng(0)))


@pytest.mark.parametrize("config", [AugmentConfig(), EVERYTHING, AugmentConfig([0.2, 0.4], flip=0.5), NOTHING])
@pytest.mark.parametrize("photo_size", [(500, 375), (1600, 1200), (403, 1597)])
def test_fast_training_draws_the_same(config: AugmentConfig, photo_size: tuple[int, int]):
    """The same part, the same changes: only the arithmetic differs, and the place by less than a pixel."""
    data = jpeg(mosaic(photos()["flower"], *photo_size))
    for seed in range(3):
        states = [np.random.default_rng(seed) for _ in range(2)]
        fast, exact = (
            train_pixels_from_bytes(data, 128, config, rng, fast=way)
            for way, rng in zip((True, False), states, strict=True)
        )
        assert distance(fast, exact) <= 6
        assert distance(fast, np.roll(exact, 8, axis=2)) > 2 * distance(fast, exact)
        assert states[0].bit_generator.state == states[1].bit_generator.state


@pytest.mark.parametrize(("size", "expected"), [(336, 2), (310, 2), (224, 4), (155, 4), (130, 8), (1000, 1)])
def test_a_jpeg_is_decoded_no_smaller_than_is_needed(size: int, expected: int, scales: list[int]):
    data = jpeg(Image.new("RGB", (1600, 1200)))
    config = AugmentConfig([0.85, 0.9])  # at least 1043 px high
    for seed in range(10):
        train_pixels_from_bytes(data, size, config, np.random.default_rng(seed))
    assert set(scales) == {expected}


def test_every_size_comes_out_of_every_part():
    """The factor of a resize never falls short of a pixel."""
    for out in (1, 7, 32, 150, 224):
        for part in (out, *range(out, 4 * out, max(1, out // 20))):
            for shrink in (1, 2, 4, 8):
                rows = np.full((-(-part // shrink), 1, 3), 9, np.uint8)
                resized = transforms._resize(rows, (part / shrink, 1.0), (out, 1))
                assert resized.shape == (out, 1, 3)
                assert (resized == 9).all()


def test_the_same_random_state_gives_the_same_pixels():
    image = noise(60, 40)
    first = changed(image, EVERYTHING, seed=1)
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, changed(image, EVERYTHING, seed=1))
    assert not np.array_equal(first, changed(image, EVERYTHING, seed=2))


def test_without_changes_it_is_a_plain_resize():
    image = noise(60, 40)
    plain = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(changed(image, NOTHING), plain)
    unchanged = np.asarray(noise(32, 32)).transpose(2, 0, 1)
    assert np.array_equal(changed(noise(32, 32), NOTHING), unchanged)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_changes_the_picture(name: str):
    image = noise(48, 48)
    config = AugmentConfig(**{"crop_area": None} | {name: CHANGES[name]})
    assert not np.array_equal(changed(image, config), changed(image, NOTHING))


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_in_from_outside_is_white(seed: int):
    config = AugmentConfig(crop_area=None, zoom=[0.5, 0.7], rotate=180.0, shift=0.1)
    assert (changed(Image.new("RGB", (48, 64), "white"), config, seed) == 255).all()
    black = changed(Image.new("RGB", (48, 64), "black"), config, seed)
    assert (black[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert (black[:, 16, 16] == 0).all()


def test_zoom_rotation_and_shift_move_as_they_say():
    """A black square in the middle: how large it gets, where its centre goes."""
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (24, 24, 40, 40))
    dark = 255.0 - changed(image, NOTHING, size=64)[0]
    zoomed = 255.0 - changed(image, AugmentConfig(None, zoom=[2.0, 2.0]), size=64)[0]
    assert zoomed.sum() / dark.sum() == pytest.approx(4, rel=0.02)
    turned = 255.0 - changed(image, AugmentConfig(None, rotate=90.0), size=64)[0]
    assert turned.sum() / dark.sum() == pytest.approx(1, rel=0.05)
    for seed in range(5):
        shifted = 255.0 - changed(image, AugmentConfig(None, shift=0.25), seed, size=64)[0]
        centre = [np.average(np.arange(64), weights=shifted.sum(axis=axis)) for axis in (0, 1)]
        assert np.abs(np.array(centre) - 31.5).max() <= 16.5


def test_a_crop_keeps_the_asked_share_of_the_area():
    """Two ramps show how much of each side is left."""
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8), (200, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=2))
    for seed in range(20):
        x, y, _ = changed(image, AugmentConfig([0.25, 0.25]), seed).astype(float)
        share = (np.ptp(x) / 255) * (np.ptp(y) / 255)
        assert share == pytest.approx(0.25, rel=0.15)


def test_grey_has_no_colour_to_change():
    grey = Image.new("RGB", (32, 32), (120, 120, 120))
    for name in ("saturation", "hue"):
        assert (changed(grey, AugmentConfig(**{"crop_area": None, name: CHANGES[name]})) == 120).all()


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (2, 3), (33, 5000)])
def test_extreme_shapes_come_through(shape: tuple[int, int]):
    data = jpeg(noise(*shape))
    assert eval_pixels(decode_image(data), 32).shape == (3, 32, 32)
    for seed in range(5):
        assert changed(noise(*shape), EVERYTHING, seed).shape == (3, 32, 32)
        rng = np.random.default_rng(seed)
        assert train_pixels_from_bytes(data, 32, AugmentConfig(), rng).shape == (3, 32, 32)


@pytest.mark.parametrize("fast", [True, False])
def test_flip_changes_left_and_right(fast: bool):
    data = jpeg(photos()["china"])
    draw = lambda flip, seed: train_pixels_from_bytes(  # noqa: E731
        data, 32, AugmentConfig(None, flip=flip), np.random.default_rng(seed), fast=fast
    )
    plain = draw(None, 0)
    assert np.array_equal(draw(1.0, 0), plain[:, :, ::-1])
    torch.from_numpy(draw(1.0, 0))  # which takes no array that runs backwards
    assert 5 <= sum(np.array_equal(draw(0.5, seed), plain) for seed in range(20)) <= 15


def test_rand_augment_follows_from_the_random_state_alone():
    """And leaves the random states of torch and numpy as they are."""
    image, config = pattern(48, 48), AugmentConfig(None, rand_augment=[2, 9])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [changed(image, config, seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(7)
    again = [changed(image, config, seed) for seed in range(8)]
    assert np.array_equal(first, again)
    assert len({pixels.tobytes() for pixels in first}) >= 6


def test_rand_augment_grows_with_its_magnitude():
    image = photos()["china"]
    plain = changed(image, NOTHING)
    none, weak, strong = (
        np.mean([distance(changed(image, AugmentConfig(None, rand_augment=r), s), plain) for s in range(30)])
        for r in ([0, 9], [2, 3], [2, 25])
    )
    assert none == 0 < weak < strong


DEIT = AugmentConfig(None, timm_augment="rand-m9-mstd0.5-inc1")


def timm_pixels(seed: int, notation: str = "rand-m9-mstd0.5-inc1") -> bytes:
    return transforms._timm_augment(pattern(48, 48), notation, np.random.default_rng(seed)).tobytes()


def test_timm_augment_follows_from_the_random_state_alone():
    """And leaves the random states of Python, numpy and torch as they are, even where timm fails.

    The function itself is called, for the checks of annotations draw from Python's.
    """
    states = lambda: [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: E731
    before = states()
    first = [timm_pixels(seed) for seed in range(12)]
    assert states() == before
    with pytest.raises(AssertionError, match="Unknown RandAugment"):
        timm_pixels(0, "rand-x9")
    assert states() == before
    random.seed(7)
    np.random.seed(7)
    assert first == [timm_pixels(seed) for seed in range(12)]
    assert len(set(first)) >= 6  # a quarter stays as it is


def test_timm_augment_is_that_of_timm():
    """Same draws, same pixels; with the fill and the resampling of DeiT's released training."""
    image = photos()["china"].resize((64, 64))
    theirs = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    )
    before = random.getstate(), np.random.get_state()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rng.uniform(-1, 1, size=4)  # for the colours, which are off
        first, second = rng.integers(2**32, size=2).tolist()
        random.seed(first)
        np.random.seed(second)
        expected = np.asarray(theirs(image)).transpose(2, 0, 1)
        assert np.array_equal(changed(image, DEIT, seed, size=64), expected)
    random.setstate(before[0])
    np.random.set_state(before[1])


def test_erasing_makes_one_rectangle_noise():
    """Of 1/50 to 1/3 of the area, three times as long as wide at most, in the colours of ImageNet."""
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    noise, shares = [], []
    for seed in range(200):
        found = changed(image, AugmentConfig(None, erase=1.0), seed, size=64)
        erased = (found != np.array([0, 0, 255])[:, None, None]).any(axis=0)
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.29 <= height / width <= 3.45
        assert erased.sum() >= 0.99 * height * width - 1  # by chance a pixel may be as it was
        shares.append(height * width / 64**2)
        noise.append(found[:, erased])
    assert 0.018 <= min(shares) < 0.05
    assert 0.3 < max(shares) <= 0.345
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    values = np.concatenate(noise, axis=1).astype(float)
    assert np.abs(values.mean(axis=1) - [124, 116, 104]).max() < 3
    assert np.abs(values.std(axis=1) - [58, 57, 57]).max() < 4
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.02  # each pixel and channel by itself


def test_erasing_comes_last_and_as_often_as_it_says():
    image, rest = photos()["china"].resize((96, 64)), {"crop_area": [0.5, 1.0], "flip": 0.5, "hue": 0.1}
    plain = [changed(image, AugmentConfig(**rest), seed) for seed in range(400)]
    found = [changed(image, AugmentConfig(**rest, erase=0.25), seed) for seed in range(400)]
    different = [(one != other).any(axis=0) for one, other in zip(plain, found, strict=True)]
    count = sum(bool(each.any()) for each in different)
    assert abs(count - 100) < 4 * 75**0.5
    assert max(each.mean() for each in different) < 0.4
    assert np.array_equal(found[3], changed(image, AugmentConfig(**rest, erase=0.25), 3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3)])
def test_nothing_is_erased_where_no_rectangle_fits(shape: tuple[int, int]):
    rows = np.zeros((*shape, 3), np.uint8)
    for seed in range(20):
        assert transforms._erase(rows, np.random.default_rng(seed)).shape == rows.shape
    assert not rows.any()


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (AugmentConfig(rand_augment=[2]), "rand_augment"),
        (AugmentConfig(rand_augment=[0, 9]), "rand_augment"),
        (AugmentConfig(rand_augment=[2, 31]), "rand_augment[1]"),
        (AugmentConfig(timm_augment="randaug"), "timm_augment"),
        (AugmentConfig(timm_augment="rand-m9-x3"), "timm_augment"),
        (AugmentConfig(timm_augment="augmix-m5"), "timm_augment"),
        (AugmentConfig(timm_augment=""), "timm_augment"),
        (AugmentConfig(flip=1.5), "flip"),
        (AugmentConfig(erase=-0.1), "erase"),
    ],
)
def test_changes_that_there_are_not_name_their_key(config: AugmentConfig, key: str):
    (problem,) = validate(AugmentConfig, dataclasses.asdict(config), strict=True)[1]
    assert problem.key == key
    assert problem.what.startswith(f"{key} ")


@pytest.mark.parametrize("notation", ["rand-m9-mstd0.5-inc1", "rand", "rand-m15-n2-p0.3-mmax30-mstd101-inc0"])
def test_what_passes_the_check_is_known_to_timm(notation: str):
    config = AugmentConfig(rand_augment=[2, 9], timm_augment=notation, flip=0.5, erase=0.25)
    assert validate(AugmentConfig, dataclasses.asdict(config), strict=True)[1] == []
    assert rand_augment_transform(notation, {}).ops
