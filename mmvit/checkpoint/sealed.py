"""Folders with the SHA-256 of their files, written last and verified on reading."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from data_tools.core.errors import CheckpointError, ResourceError
from data_tools.core.files import make_folder

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
SLACK = 2**16  # bytes, for the small files next to the tensors
_NO_DIGEST = "0" * 64


class OtherVersionError(CheckpointError):
    """An intact folder of another format version, which this version cannot read."""


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model; raises CheckpointError with the first missing, unexpected or misshapen one."""
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the model: {str(error).splitlines()[1].strip()}",
            where=where,
            note="they belong to another architecture",
            hint="use the config that the weights were trained with",
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_for(groups: Iterable[Mapping[str, Tensor]], final: Path) -> Iterator[None]:
    """Create the parent folder of `final` and check its free space, for a block that writes the tensors there.

    Raises:
        ResourceError: there is not enough space, or the block could not write them.
    """
    needed = sum(tensor.nbytes for group in groups for tensor in group.values()) + SLACK
    free = 0
    try:
        make_folder(final.parent)
        free = shutil.disk_usage(final.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{final.name} cannot be written: {error}",
            where=str(final),
            note=f"it needs {needed:,} bytes, and {free:,} are free; nothing saved earlier is lost",
            hint="free some space and run the same command again",
        ) from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; tensors that share memory are written once per name."""
    separate: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        separate[key] = value.clone() if place in places else value.contiguous()
        places.add(place)
    save_file(separate, path)
    with contextlib.suppress(OSError):  # some file systems have no modes
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it readable by the owner only


def write_sealed(path: Path, tree: Mapping[str, Any]) -> None:
    """Write JSON that contains the SHA-256 of its own text, computed with zeros in place of the digest."""
    text = json.dumps({**tree, "sha256": _NO_DIGEST}, indent=1)
    path.write_text(text.replace(_NO_DIGEST, hashlib.sha256(text.encode()).hexdigest()))


def read_sealed(path: Path, *kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read a file that `write_sealed` wrote, with exactly the keys of one of `kinds`; the oldest have no digest.

    Every version computes the digest in this way, so that a damaged file is not mistaken for one of another version,
    nor the other way round.
    """
    folder = path.parent.name
    try:
        text = path.read_text()
        tree = json.loads(text)
        digest = tree.pop("sha256", None)
        intact = digest is None or hashlib.sha256(text.replace(digest, _NO_DIGEST).encode()).hexdigest() == digest
        version = tree["format_version"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete ({path.name} is missing)", where=str(path)) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged ({path.name} cannot be read)", where=str(path)) from error
    if intact and version != FORMAT_VERSION:
        raise OtherVersionError(
            f"{folder} has format version {version}, not {FORMAT_VERSION}",
            where=str(path),
            note="nothing was changed",
            hint="use the version of mmvit that wrote it",
        )
    if not intact or {key: type(value) for key, value in tree.items()} not in kinds:
        raise CheckpointError(
            f"{folder} is damaged ({path.name} is truncated or changed)",
            where=str(path),
            hint='if you edited it by hand, also remove its line "sha256"' if not intact else None,
        )
    return cast(dict[str, Any], tree)


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file by name."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def verify_files(folder: Path, digests: Mapping[str, str], required: str) -> None:
    """Verify files, including `required`, against their SHA-256; raises CheckpointError with the first that differs."""
    for name, digest in {required: None, **digests}.items():
        path = folder / name
        try:
            intact = Path(name).name == name and file_sha256(path) == digest  # no file of another folder
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder.name} is incomplete ({name} is missing)", where=str(path)) from error
        except OSError as error:
            raise unreadable(path, error) from error
        if not intact:
            raise CheckpointError(f"{folder.name} is damaged ({name} is truncated or changed)", where=str(path))


def unreadable(path: Path, error: OSError) -> ResourceError:
    """Return the error for a file that the disk cannot read: it may be intact, so it must not be skipped."""
    return ResourceError(
        f"{path.name} cannot be read: {error.strerror or error}",
        where=str(path),
        note="nothing was changed",
        hint="check the disk, then run again",
    )
