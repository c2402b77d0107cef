"""The door: one module a command."""

from fedspeed.cli.command_line import main as main
