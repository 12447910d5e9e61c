"""The content of a file as it was when it was first read, however late it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from zimage_ref.errors import FormatError, reason

from .reading import read_bytes


class Content:
    """The bytes of a file and their digest. The bytes are kept until `forget`; later they are read and compared."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.digest = path, hashlib.sha256(data).hexdigest()  # SHA-256 in hexadecimal
        self._kept: bytes | None = data

    def read(self) -> bytes:
        """The bytes that belong to the digest. Raises FormatError if the file has changed, or cannot be read again."""
        if self._kept is not None:
            return self._kept
        try:
            data = read_bytes(self.path)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot be opened: {reason(error)}") from error
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise FormatError(f"{self.path}: was changed after it was checked: start again")
        return data

    def forget(self) -> None:
        """Frees the memory of the bytes."""
        self._kept = None
