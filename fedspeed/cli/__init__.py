"""The command line: one module per command."""

from fedspeed.cli.command_line import main as main
