"""What tests of adapters share."""

import pytest

from tests.tiny import write_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Write a Llama of two blocks; give its folder."""
    return write_llama(
        tmp_path_factory.mktemp("base") / "llama",
        hidden=32,
        layers=2,
        vocab=64,
        intermediate=48,
        heads=2,
        kv_heads=1,
    )
