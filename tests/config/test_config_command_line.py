"""Faults of the command line are reported together with those of the configuration."""

import pytest

from fedspeed.cli import main
from fedspeed.config.load import repeated_keys


@pytest.fixture
def path(tmp_path):
    """Write a configuration with a fault in line 4; return its path."""
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  base: m\ntrain:\n  lr: fast\n", encoding="utf-8")
    return path


def test_a_misspelt_option_hides_no_fault_of_the_configuration(path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "--config", str(path), "--jsno", "train.clip=x"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert "unrecognized arguments: --jsno\n" in said
    assert f"{path}:4: train.lr is 'fast'" in said and "command line: train.clip is 'x'" in said


def test_a_key_that_is_given_twice_is_refused(path, capfd):
    assert main(["run", "--config", str(path), "train.clip=1", "--dry-run", "train.clip=2"]) == 2
    said = capfd.readouterr().err
    assert "command line: train.clip is given 2 times (train.clip=1, train.clip=2); leave one of them" in said
    assert f"{path}:4: train.lr is 'fast'" in said


def test_different_keys_are_not_given_twice():
    assert repeated_keys(["train.lr=1", "train.clip=1", "federation.method.name=stack"]) == []
