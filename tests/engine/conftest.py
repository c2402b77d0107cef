"""The base models that several files of this folder train."""

import pytest

from tests.engine.small_models import write_family


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return the folder of a tiny base of each family, written once a file of tests."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_family(family, folder / family) for family in ("llama", "qwen2", "gpt2")}
