"""The command line: verbs, and how their answers are shown."""

from tutelage.cli.app import main

__all__ = ["main"]
