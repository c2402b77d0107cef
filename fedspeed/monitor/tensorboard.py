"""Our own TensorBoard event file, with the round on the x-axis.

DeepSpeed's monitor writes on rank 0 of every torch world, that is once per cluster into one folder. The event
format is little more than protobuf, so it is written with TensorBoard's own record writer: without torch,
without a thread, and with a file name that holds no host name. A round is one event, so a crash leaves all of
its values or none.
"""

import time
from pathlib import Path

from fedspeed.monitor.records import ClientRecord, RoundRecord
from fedspeed.monitor.visibility import visible

OWN_FILES = "events.out.tfevents.*.fedspeed"  # readers look for "tfevents" in the name


def scalars(record: RoundRecord) -> dict[str, float]:
    """Tag -> value. What was not measured has no tag; per-client tags exist only if the record names
    clients.
    """
    values = _tagged(record, "")
    for client in record.per_client:
        values |= _tagged(client, f"client_{client.client}/")
    return values


def _tagged(record: RoundRecord | ClientRecord, before: str) -> dict[str, float]:
    """The values of a record that have a tag, behind `before`."""
    values = {}
    for metric in record.metrics():
        value = getattr(record, metric.name)
        is_told = metric.tag and value is not None and (metric.tag_from is None or value >= metric.tag_from)
        if is_told:
            values[before + metric.tag] = value / metric.tag_scale
    return values


class TensorBoardWriter:
    """One event file in `folder` for this start of the run.

    Args:
        resume_after_round: rounds up to here stay; what earlier starts wrote for later ones is hidden by a
            session mark, which tells every reader of the folder to drop steps from there on. 0 is a fresh
            start and removes our earlier files: the mark would hide their numbers, but not their text.
        config_text: the resolved configuration, shown under Text; written when the folder has no round to
            continue.
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
        """Write one round; a TensorBoard that watches the folder sees it when this returns."""
        event = self._proto.Event(step=record.round)
        for tag, value in scalars(visible(record, self._routing_mode)).items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._write(event)
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _next_file(folder: Path) -> Path:
    """Readers take the files of a folder in the order of their names, so a new one must sort last even if the
    clock went back.
    """
    earlier = [int(path.name.split(".")[3]) for path in folder.glob(OWN_FILES)]
    return (
        folder
        / f"events.out.tfevents.{max([int(time.time()), *(stamp + 1 for stamp in earlier)]):010d}.fedspeed"
    )


def _text_event(tag: str, text: str):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    event = event_pb2.Event(step=0)
    shown = "".join(
        f"    {line}\n" for line in text.splitlines()
    )  # the page renders Markdown; indented text is left as it is
    event.summary.value.add(
        tag=tag,
        metadata=create_summary_metadata(
            display_name=tag, description="the resolved configuration of the run"
        ),
        tensor=TensorProto(dtype=DT_STRING, string_val=[shown.encode()]),
    )
    return event
