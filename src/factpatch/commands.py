"""Commands as a message tells them: fit to be typed as they stand."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["typed", "typed_in"]


def typed(*words: object) -> str:
    """A command to be typed, fit for a shell also where a path has spaces; of this program, or where it lies if none finds it."""
    own = Path(sys.argv[0])
    program = str(own) if own.name == "factpatch" and not shutil.which("factpatch") else "factpatch"
    return shlex.join([program, *map(str, words)])


def typed_in(workspace: Path, command: str, *words: object) -> str:
    """The same of a command about a workspace, which is named unless it is the folder one is in."""
    return typed(command, *(["-C", workspace] if workspace != Path() else []), *words)
