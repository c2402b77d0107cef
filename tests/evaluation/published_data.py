"""Published data for tests, where it is there."""

import pytest

from fedspeed.data.sources import data_folders
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext, entry_of, make_task


def published_task(name):
    """Return an evaluation task over its published data; skip the test where the data is absent."""
    context = TaskContext(name=name, options=entry_of(name).options, folders=tuple(data_folders()))
    try:
        return make_task(context)
    except DataError as error:
        pytest.skip(str(error))
