"""Figures for TensorBoard.

Written by the loop itself: torch's SummaryWriter has a thread that, on a full disk, prints a traceback while training
goes on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from saccade.errors import UserError


class Events:
    """A file of scalars. Opened at a later step, it takes the place of what an earlier file has from that step on."""

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)
            self.file = open(folder / f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}", "wb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None
        self.records = RecordWriter(self.file)
        self._write({"file_version": "brain.Event:2"})
        if step:
            self._write({"step": step, "session_log": SessionLog(status=SessionLog.START)})

    def add(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write({"step": step, "summary": summary})

    def flush(self) -> None:
        self._checked(self.file.flush)

    def close(self) -> None:
        self._checked(self.file.close)

    def _write(self, values: dict[str, Any]) -> None:
        record = Event(wall_time=time.time(), **values).SerializeToString()
        self._checked(lambda: self.records.write(record))

    def _checked(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}). The run ends here; free space, then "
                "continue with `saccade train --resume`"
            ) from None
