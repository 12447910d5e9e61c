"""The folder of a server: its database, and the files that requests may reach. One server uses it at a time.

studio.db      jobs, pictures, runs
pictures/      results, ID.png
uploads/       pictures that clients sent, by the hash of their pixels
loras/         LoRAs, and the runs that trained them
controls/      ControlNets that the user put there
checkpoints/   weights of networks: made here, or put there by the user
datasets/      NAME/: pictures and captions to train on
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zimage_ref.errors import ConfigError, ZImageError
from zimage_ref.formats.temporary import lock, remove_stale
from zimage_ref.pictures.images import Picture, encoded, read_picture, save_picture, thumbnail
from zimage_ref.pictures.metadata import Record, read_record
from zimage_ref.pictures.received import received
from zimage_serve.refusals import INTERRUPTED, UnknownError

from .database import Database, Row
from .names import ID, checked_id, new_id

MOST_RECEIVED = 64 * 2**20  # pixels of a picture that a client sends; larger ones than a result are scaled down
_THUMBNAIL = 384  # pixels


class Store:
    """The folder and the database of a server."""

    def __init__(self, folder: Path, loras: Path, controls: Path) -> None:
        """Makes the folders that are missing. Raises ConfigError if they cannot be used, or if another server does."""
        self.folder, self.loras = folder, loras
        self.pictures, self.uploads, self.datasets = (folder / name for name in ("pictures", "uploads", "datasets"))
        self.checkpoints = folder / "checkpoints"
        for each in (self.pictures, self.uploads, self.datasets, self.checkpoints, loras, controls):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{each}: cannot be made: {error.strerror}") from error
        self._lock = (folder / "lock").open("a+")
        if sys.platform != "win32" and not lock(self._lock.fileno()):  # the system unlocks it when the process ends
            self._lock.close()
            raise ConfigError(f"{folder}: another server uses it: give another `folder`")
        try:
            self.database = Database(folder / "studio.db")
        except ConfigError:
            self._lock.close()
            raise
        self._recover()

    def close(self) -> None:
        """Closes the database, and lets another server use the folder."""
        self.database.close()
        self._lock.close()

    def _recover(self) -> None:
        """Ends what a killed server had not ended. Pictures whose file was written, but not their row, are found."""
        for each in (self.folder, self.pictures, self.uploads, self.checkpoints, self.loras):
            remove_stale(each)
        remove_stale(self.datasets, deep=True)
        self.database.interrupt_jobs(INTERRUPTED)
        known = self.database.picture_ids()
        for path in self.pictures.glob("*.png"):
            if path.stem not in known and ID.fullmatch(path.stem):
                try:
                    record, picture = read_record(path), read_picture(path)
                except (ZImageError, OSError):
                    continue  # not a picture of this server
                self.database.add_picture(self._row(path.stem, "", 0, picture, record, path.stat().st_mtime))

    # results

    def save(self, job: str, place: int, picture: Picture, record: Record) -> Row:
        """Writes a result to its file. Returns its row, which `Database.end_job` writes."""
        id = new_id()
        save_picture(picture, self._file(id), record)
        return self._row(id, job, place, picture, record, time.time())

    def _row(self, id: str, job: str, place: int, picture: Picture, record: Record, created: float) -> Row:
        prompt = str(record.get("prompt", ""))
        return {
            "id": id, "job": job, "place": place, "prompt": prompt, "record": dict(record),
            "width": picture.width, "height": picture.height, "created": created,
        }  # fmt: skip

    def _file(self, id: str) -> Path:
        """The file of the result `id`."""
        return self.pictures / f"{id}.png"

    def discard(self, rows: Sequence[Row]) -> None:
        """Deletes the files of results that nobody wants."""
        for row in rows:
            self._file(row["id"]).unlink(missing_ok=True)

    def picture(self, id: object) -> Row:
        """The row of the picture `id`. Raises UnknownError."""
        row = self.database.picture(checked_id(id, "picture"))
        if row is None or not self._file(row["id"]).is_file():
            raise UnknownError("picture: there is no picture with this id")
        return row

    def picture_bytes(self, id: object, format: str) -> bytes:
        """The picture `id` in Pillow's `format`, with its record. A PNG is the file itself. Raises UnknownError."""
        row = self.picture(id)
        path = self._file(row["id"])
        return path.read_bytes() if format == "PNG" else encoded(read_picture(path), format, row["record"])

    def thumbnail(self, id: object) -> bytes:
        """The picture `id` as a small JPEG. Raises UnknownError."""
        return thumbnail(self._file(self.picture(id)["id"]), _THUMBNAIL)

    def delete_picture(self, id: object) -> None:
        """Deletes the picture `id`. Raises UnknownError."""
        row = self.picture(id)
        self.discard([row])
        self.database.remove_picture(row["id"])

    # what clients send

    def receive(self, data: bytes, what: str) -> tuple[str, Row]:
        """Keeps the picture in `data`, without what else is in it. Returns its id and facts about it.

        If parts of the picture are transparent, they become a mask of their own. Raises DatasetError.
        """
        got = received(data, what, MOST_RECEIVED)
        id = self.keep(got.picture)
        mask = None if got.hole is None else self.keep(got.hole)
        return id, {"id": id, "width": got.picture.width, "height": got.picture.height, "mask": mask}

    def keep(self, picture: Picture) -> str:
        """Keeps `picture` among the uploads. Returns its id; equal pixels have equal ids."""
        size = f"{picture.mode} {picture.width} {picture.height} ".encode()
        id = hashlib.sha256(size + picture.tobytes()).hexdigest()[:40]
        path = self.uploads / f"{id}.png"
        if not path.exists():
            save_picture(picture, path)
        return id

    def has_picture(self, id: str) -> bool:
        """Whether there is an upload or a result with this id."""
        return bool(ID.fullmatch(id)) and any((each / f"{id}.png").is_file() for each in (self.uploads, self.pictures))

    def upload_path(self, id: object, what: str) -> Path:
        """The file of the upload or the result `id`. Raises UnknownError naming `what`."""
        checked = checked_id(id, what)
        for folder in (self.uploads, self.pictures):
            if (path := folder / f"{checked}.png").is_file():
                return path
        raise UnknownError(f"{what}: there is no picture with this id: upload it first")
