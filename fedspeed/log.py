"""The logger of FedSpeed: lines on stderr that begin with `fedspeed:`, errors with `fedspeed: error:`. Set up
here only.

What a command was asked for goes to stdout (`cli.output`), and progress is shown by `monitor.progress`.
"""

import logging
import sys


class _Lines(logging.Handler):
    """Writes a record as one line to what sys.stderr is at that moment, at once and in one piece."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "error: " if record.levelno >= logging.ERROR else ""
        sys.stderr.write(f"fedspeed: {mark}{record.getMessage()}\n")
        sys.stderr.flush()


def _logger() -> logging.Logger:
    logger = logging.getLogger("fedspeed")
    logger.setLevel(logging.INFO)
    logger.propagate = (
        False  # DeepSpeed and transformers set handlers of their own on the root, which would say it twice
    )
    logger.handlers = [_Lines()]
    return logger


LOG = _logger()
