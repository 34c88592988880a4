"""Patch what a language model knows, prove the patch worked, and undo it any time.

    import factpatch as fp

    lm = fp.load("smollm2-135m")
    edit = fp.Edit(id="1", prompt="The capital of France is", subject="France", target="Lyon")
    patch = fp.method("rome").fit(lm, [edit])
    with lm.patched(patch):
        print(lm.ask("The capital of France is"))

The names below are loaded when they are first used, so that importing the package takes a moment and does nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factpatch.data import read
    from factpatch.edits import Edit, Probe
    from factpatch.errors import FactpatchError
    from factpatch.gate import Gate
    from factpatch.lm import LM, connect, load
    from factpatch.methods import create as method
    from factpatch.patches import Patch, merge
    from factpatch.scoring import Scorecard, Scorer
    from factpatch.workspace import Workspace

__all__ = [
    "LM",
    "Edit",
    "FactpatchError",
    "Gate",
    "Patch",
    "Probe",
    "Scorecard",
    "Scorer",
    "Workspace",
    "connect",
    "load",
    "merge",
    "method",
    "read",
]

_WHERE = {
    "Edit": "factpatch.edits:Edit",
    "FactpatchError": "factpatch.errors:FactpatchError",
    "Gate": "factpatch.gate:Gate",
    "LM": "factpatch.lm:LM",
    "Patch": "factpatch.patches:Patch",
    "Probe": "factpatch.edits:Probe",
    "Scorecard": "factpatch.scoring:Scorecard",
    "Scorer": "factpatch.scoring:Scorer",
    "Workspace": "factpatch.workspace:Workspace",
    "connect": "factpatch.lm:connect",
    "load": "factpatch.lm:load",
    "merge": "factpatch.patches:merge",
    "method": "factpatch.methods:create",
    "read": "factpatch.data:read",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
