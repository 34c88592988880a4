"""The command line: parse, call the library, print. One module for each verb."""

from factpatch.cli.app import main

__all__ = ["main"]
