"""The logger of FedSpeed: lines on stderr that begin with `fedspeed:`, errors with `fedspeed: error:`.

It is configured here only. Characters that a terminal would obey are escaped, whoever wrote them. The result
of a command goes to stdout (`cli.output`); `monitor.progress` displays progress.
"""

import logging
import sys

from fedspeed.text_safety import visible


class _Lines(logging.Handler):
    """Writes each record as one line to the current sys.stderr, in one piece and without buffering."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "error: " if record.levelno >= logging.ERROR else ""
        sys.stderr.write(f"fedspeed: {mark}{visible(record.getMessage())}\n")
        sys.stderr.flush()


def _logger() -> logging.Logger:
    logger = logging.getLogger("fedspeed")
    logger.setLevel(logging.INFO)
    # DeepSpeed and transformers add handlers to the root logger, which would print each line again.
    logger.propagate = False
    logger.handlers = [_Lines()]
    return logger


LOG = _logger()
