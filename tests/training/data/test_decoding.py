"""What an image is: upright, of 8 bits, opaque unless four channels are asked for, and named when it cannot be read."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dmp.evaluation.images import open_images
from diffusers_dmp.training.data.decoding import check_background, open_image, probe_image, to_channels
from diffusers_dmp.training.data.images import load_images, to_tensors

UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)  # 2 high, 3 wide
ORIENTATION, AS_STORED = 0x0112, {  # what a camera stores, by the EXIF orientation that turns it upright
    1: UPRIGHT, 2: np.fliplr(UPRIGHT), 3: np.rot90(UPRIGHT, 2), 4: np.flipud(UPRIGHT), 5: UPRIGHT.T,
    6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT, 2).T, 8: np.rot90(UPRIGHT, -1),
}  # fmt: skip


def encode(image: PIL.Image.Image, kind: str = "png", **arguments) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return {"bytes": file.getvalue(), "path": None}


def pixels(encoded: dict, channels: int = 3, background: str = "white") -> np.ndarray:
    return np.asarray(open_image(encoded, channels, background))


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_images_are_turned_upright(kind, orientation):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    arguments = {"exif": exif} | ({"lossless": True} if kind == "webp" else {})
    stored = PIL.Image.fromarray(np.ascontiguousarray(AS_STORED[orientation]))
    stored = stored.convert("RGB") if kind == "webp" else stored
    np.testing.assert_array_equal(pixels(encode(stored, kind, **arguments), 1), UPRIGHT)


# More than 8 bits


@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=20))
@settings(max_examples=30)
def test_16_bits_are_scaled_by_their_range(values):
    deep = np.array([values], np.uint16)
    for kind in ("png", "tiff", "ppm"):  # of which Pillow opens the last with 32 bits
        found = pixels(encode(PIL.Image.fromarray(deep), kind), 1)
        np.testing.assert_array_equal(found, np.round(deep / 257))
    assert pixels(encode(PIL.Image.fromarray(deep)), 3).shape == (1, len(values), 3)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_16_bits_in_colour():
    rows = np.array([[[65535, 32768, 0], [256, 1000, 40000]]], ">u2")
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    scanlines = zlib.compress(b"\0" + rows.tobytes())
    file = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", scanlines) + png_chunk(b"IEND", b"")
    np.testing.assert_allclose(pixels({"bytes": file, "path": None}), rows / 257, atol=1)


def tiff(values: np.ndarray, bits: int, photometric: int) -> dict:
    """A grey TIFF written by hand, as microscopes write them: Pillow itself writes none of these."""
    data = values.tobytes()
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: values.shape[0], 279: len(data)}  # fmt: skip
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    start = 8 + len(data)
    return {
        "bytes": b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4),
        "path": None,
    }


def test_the_range_of_a_tiff():
    values = np.array([[0, 1000, 65535, 4095]], "<u2")
    np.testing.assert_array_equal(pixels(tiff(values, 16, photometric=1), 1), np.round(values / 257))
    np.testing.assert_array_equal(
        pixels(tiff(values, 16, photometric=0), 1), np.round(255 - values / 257)
    )  # white is 0
    twelve = tiff(np.array([[0x00, 0x0F, 0xFF]], np.uint8), 12, photometric=1)  # two pixels in three bytes
    twelve["bytes"] = twelve["bytes"].replace(struct.pack("<HHII", 256, 3, 1, 3), struct.pack("<HHII", 256, 3, 1, 2))
    np.testing.assert_array_equal(pixels(twelve, 1), [[0, 255]])


@pytest.mark.parametrize("mode, value, kind", [("I", 70_000, "32-bit integers"), ("F", 0.5, "floats")])
def test_what_has_no_known_white_is_refused(mode, value, kind):
    encoded = encode(PIL.Image.new(mode, (2, 2), value), "tiff")
    for read in (open_image, probe_image):
        with pytest.raises(ValueError, match=f"bytes without a name: it has {kind}, which do not say what white is"):
            read(encoded)


# Transparency


@pytest.mark.parametrize("mode, colour", [("RGBA", (0, 100, 200)), ("LA", (77,))])
@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_alpha_is_composited(mode, colour, alpha):
    encoded = encode(PIL.Image.new(mode, (2, 2), (*colour, alpha)))
    rgb = np.array(colour * (1 if len(colour) == 3 else 3), float)
    share = alpha / 255
    np.testing.assert_allclose(pixels(encoded)[0, 0], rgb * share + 255 * (1 - share), atol=1)
    np.testing.assert_allclose(
        pixels(encoded, 3, "#102030")[0, 0], rgb * share + np.array([16, 32, 48]) * (1 - share), atol=1
    )
    assert pixels(encoded, 4)[0, 0].tolist() == [*rgb, alpha]
    grey = pixels(encoded, 1)
    assert grey.shape == (2, 2) and grey[0, 0] == (255 if alpha == 0 else grey[0, 0])


def test_a_transparent_colour():
    for mode, key in (("L", 7), ("RGB", (1, 2, 3)), ("1", 0)):
        encoded = encode(PIL.Image.new(mode, (2, 2), key), transparency=key)
        assert (pixels(encoded) == 255).all() and (pixels(encoded, 3, "black") == 0).all(), mode
        assert pixels(encoded, 4)[0, 0, 3] == 0, mode


def test_palettes_with_transparency():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    assert pixels(encode(image)).tolist() == [[[200, 0, 0], [0, 200, 0]]]
    assert pixels(encode(image, transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    assert pixels(encode(image, transparency=bytes([255, 0]))).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    assert pixels(encode(image, "gif", transparency=0)).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_backgrounds_are_opaque_colours():
    check_background("white"), check_background("#102030"), check_background("hsl(0,100%,50%)")
    for background in ("#10203080", "no colour", "", None):
        with pytest.raises(ValueError, match="`background` to be a colour"):
            check_background(background)


# Other modes


@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16"]),
    data=st.binary(min_size=16, max_size=16),
    channels=st.sampled_from([1, 3, 4]),
    background=st.sampled_from(["white", "black", "#123456"]),
)  # fmt: skip
@settings(max_examples=80)
def test_every_mode_becomes_8_bits(mode, data, channels, background):
    """An opaque image has the colours that Pillow itself gives it, whatever the background."""
    bands = {"LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "RGBA": 4, "RGBX": 4, "CMYK": 4, "I;16": 2}
    image = PIL.Image.frombytes(mode, (2, 2), data[: 2 if mode == "1" else 4 * bands.get(mode, 1)])
    found = to_channels(image, channels, background)
    assert found.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels] and found.size == (2, 2)
    if not image.has_transparency_data and mode != "I;16":
        assert (
            found.convert("RGB").tobytes()
            == (image.convert("RGB") if channels != 1 else found.convert("RGB")).tobytes()
        )
        assert channels != 4 or found.getextrema()[-1] == (255, 255)


def test_cmyk_and_lab_have_their_colours():
    cmyk = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind, arguments in (("jpeg", {"quality": 100}), ("tiff", {})):
        np.testing.assert_allclose(pixels(encode(cmyk, kind, **arguments))[0, 0], [255, 0, 0], atol=3)
    to_lab = PIL.ImageCms.buildTransform(
        PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = PIL.ImageCms.applyTransform(PIL.Image.new("RGB", (2, 2), (200, 50, 100)), to_lab)
    np.testing.assert_allclose(pixels(encode(lab, "tiff"))[0, 0], [200, 50, 100], atol=3)


def test_the_first_frame_of_an_animation():
    frames = [PIL.Image.new("L", (4, 4), value) for value in (0, 255)]
    for kind in ("gif", "png", "tiff", "webp"):
        encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (pixels(encoded) == 0).all() and probe_image(encoded), kind
    assert not probe_image(encode(frames[0], "gif"))
    photo_and_depth = encode(frames[0], "mpo", save_all=True, append_images=frames[1:])
    assert not probe_image(photo_and_depth)  # as phones write them: no animation


# What cannot be read


def damaged(folder: Path) -> dict[str, str]:
    """Files that Pillow refuses in many ways, and what is said of each."""
    noise = PIL.Image.effect_noise((64, 64), 80)
    for kind in ("png", "jpg", "gif", "tif", "webp"):
        noise.convert("RGB").save(folder / f"half.{kind}")
        data = (folder / f"half.{kind}").read_bytes()
        (folder / f"half.{kind}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "page.jpg").write_text("\n<!DOCTYPE html><html></html>")
    (folder / "text.png").write_text("nothing")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(40))
    bomb = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bomb) + png_chunk(b"IDAT", zlib.compress(b""))
    )
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    said = {f"half.{kind}": "" for kind in ("png", "jpg", "gif", "tif", "webp")}
    return said | {
        "empty.png": "it is empty",
        "pointer.png": "it is a Git LFS pointer; `git lfs pull`",
        "page.jpg": "it is an HTML page",
        "phone.heic": "it is HEIC or AVIF",
        "text.png": "Pillow knows no such image",
        "bomb.png": "exceeds limit",
        "broken.png": "No such file",
    }


def test_what_cannot_be_read_is_named(tmp_path):
    for name, said in damaged(tmp_path).items():
        for read in (open_image, probe_image):
            with pytest.raises(ValueError, match=f"a readable image, but got .*{name}: .*{said}"):
                read({"bytes": None, "path": str(tmp_path / name)})


def test_entries_without_an_image():
    for encoded in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="but got no image: the entry is empty"):
            open_image(encoded)
    with pytest.raises(ValueError, match="12 bytes without a name: Pillow knows no such image"):
        open_image({"bytes": b"not an image", "path": None})


# The same everywhere


def test_training_and_evaluation_see_the_same(tmp_path):
    """A photo with an orientation and a transparent one with 16 bits beside it."""
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    PIL.Image.fromarray(np.ascontiguousarray(AS_STORED[6])).resize((8, 8), 0).save(tmp_path / "1.png", exif=exif)
    PIL.Image.new("RGBA", (8, 8), (1, 2, 3, 100)).save(tmp_path / "2.png")
    PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "3.png")
    (evaluated,) = open_images(tmp_path).batches(3)
    trained = torch.stack(to_tensors(load_images(str(tmp_path)), 8, 3)[:]["images"])
    np.testing.assert_allclose((trained.permute(0, 2, 3, 1) + 1) * 127.5, evaluated, atol=1e-4)
    assert evaluated[0, 0, 0, 0] == 10 and evaluated[0, -1, -1, 0] == 60
    assert evaluated[1, 0, 0].tolist() == [155, 156, 156] and evaluated[2].max() == 245
