"""Zip files (NumPy's ``.npz``, PyTorch's ``.pt``), read within bounds."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

_SLACK = 64 << 20
_RATIO = 20


def members(path: str | Path) -> dict[str, bytes]:
    """Name → content, checksums verified.

    Raises:
        ValueError: it is no zip file, or a damaged one, or would unpack to more than 64 MiB and 20 times its own size,
            which numbers don't and a zip bomb does.
    """
    with open(path, "rb") as file:
        size = Path(path).stat().st_size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if len({entry.filename for entry in entries}) < len(entries):
                    raise ValueError("it holds two files of one name.")
                if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                    raise ValueError("it is compressed in a way that is not read.")
                if sum(entry.compress_size for entry in entries) > size:
                    raise ValueError("it says that it holds more than it does.")
                if sum(entry.file_size for entry in entries) > _SLACK + _RATIO * size:
                    raise ValueError(f"it would unpack to more than {_RATIO} times its size.")
                return {entry.filename: archive.read(entry) for entry in entries}
        except (
            zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, RuntimeError, OverflowError, OSError,
            ValueError,
        ) as error:  # fmt: skip
            # zipfile says what is wrong with a forged archive in each of these ways
            raise ValueError(f"{path} is no complete zip file ({error}).") from error
