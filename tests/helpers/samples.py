"""What many tests write: tars of given members, small pictures."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_tar(
    path: Path, files: dict[str, bytes] | Iterable[tuple[str, bytes]], tar_format: int = tarfile.DEFAULT_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def picture(seed: int) -> bytes:
    """A JPEG of 32 x 24 px, noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
