"""Our own TensorBoard event file, with the round on the x-axis.

DeepSpeed's monitor writes on rank 0 of every torch world, which would be once per cluster into one folder.
The event format is simple protobuf, so events are written with TensorBoard's record writer: without torch,
without a thread, and with a file name that contains no host name. A round is one event, so that a crash
leaves all of its values or none.
"""

import time
from pathlib import Path
from typing import Any

from fedspeed.monitor.records import ClientRecord, RoundRecord
from fedspeed.monitor.visibility import visible

OWN_FILES = "events.out.tfevents.*.fedspeed"  # readers look for "tfevents" in the name


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return the values of a record by tag.

    A value that was not measured has no tag; clients have tags only if the record contains them.
    """
    values = _tagged(record, "")
    for client in record.per_client:
        values |= _tagged(client, f"client_{client.client}/")
    return values


def _tagged(record: RoundRecord | ClientRecord, prefix: str) -> dict[str, float]:
    """Return the values of a record by tag, with a prefix."""
    values = {}
    for metric in record.metrics():
        value = getattr(record, metric.name)
        if metric.tag and value is not None and (metric.tag_from is None or value >= metric.tag_from):
            values[prefix + metric.tag] = value / metric.tag_scale
    return values


class TensorBoardWriter:
    """The event file of this start of the run.

    Args:
        folder: of the event files of all starts. resume_after_round: the last round that is kept. Later
            rounds of earlier starts are hidden by a session mark, after which readers drop earlier values of
            the same steps. With 0, a fresh start, our earlier files are removed, because the mark would hide
            their numbers but not their text.
        config_text: the resolved configuration, shown under Text; written at a fresh start only.
    """

    def __init__(self, folder: Path, resume_after_round: int, routing_mode: str, config_text: str):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto = event_pb2
        self._routing_mode = routing_mode
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume_after_round:
            for path in folder.glob(OWN_FILES):
                path.unlink()
        self._records = RecordWriter(open(_next_file(folder), "xb"))  # noqa: SIM115 (closed by close)
        first_step = resume_after_round + 1 if resume_after_round else 0
        self._write(event_pb2.Event(step=first_step, file_version="brain.Event:2"))
        self._write(
            event_pb2.Event(
                step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            )
        )
        if not resume_after_round:
            self._write(_text_event("config", config_text))
        self._records.flush()

    def round(self, record: RoundRecord) -> None:
        """Write one round, which a TensorBoard that watches the folder can read as soon as this returns."""
        event = self._proto.Event(step=record.round)
        for tag, value in scalars(visible(record, self._routing_mode)).items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._write(event)
        self._records.flush()

    def close(self) -> None:
        """Close the event file."""
        self._records.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _next_file(folder: Path) -> Path:
    """Return a name for a new event file that sorts last even if the clock was set back, because readers take
    the files in the order of their names.
    """
    earlier = [int(path.name.split(".")[3]) for path in folder.glob(OWN_FILES)]
    return (
        folder
        / f"events.out.tfevents.{max([int(time.time()), *(stamp + 1 for stamp in earlier)]):010d}.fedspeed"
    )


def _text_event(tag: str, text: str) -> Any:
    """Return an event that TensorBoard shows under Text, indented because the page renders Markdown."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    event = event_pb2.Event(step=0)
    shown = "".join(f"    {line}\n" for line in text.splitlines())
    event.summary.value.add(
        tag=tag,
        metadata=create_summary_metadata(
            display_name=tag, description="the resolved configuration of the run"
        ),
        tensor=TensorProto(dtype=DT_STRING, string_val=[shown.encode()]),
    )
    return event
