"""A model card: what was changed in which model, how well it took, and what it is not good for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from factpatch.lm import LM
from factpatch.lm.catalog import CATALOG
from factpatch.patches import Patch

if TYPE_CHECKING:
    from factpatch.export.adapter import Shortened

__all__ = ["card"]

Form = Literal["checkpoint", "adapter", "gguf"]

_SCORES = ("edit_success", "rephrase", "portability", "locality", "fluency")
_WHAT: dict[Form, str] = {
    "checkpoint": "a whole checkpoint, for transformers",
    "adapter": "a LoRA adapter, for PEFT",
    "gguf": "a GGUF file, for llama.cpp",
}
_MOST = 50
"""Edits that are listed."""


def card(lm: LM, patches: Sequence[Patch], form: Form, shortened: Sequence[Shortened] = ()) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    return "\n".join(_lines(lm, patches, form, shortened)) + "\n"


def _lines(lm: LM, patches: Sequence[Patch], form: Form, shortened: Sequence[Shortened]) -> Iterator[str]:
    licence = CATALOG[lm.name].licence if lm.name in CATALOG else None
    yield from ("---", f"base_model: {json.dumps(lm.name)}", "tags: [knowledge-editing, factpatch]")
    if form == "adapter":
        yield "library_name: peft"
    if licence:
        yield f"license: {json.dumps(licence.lower().replace(' ', '-'))}"
    edits = [edit for patch in patches for edit in patch.provenance.edits]
    yield from ("---", "", f"# {lm.name}, with {len(edits)} edit{'' if len(edits) == 1 else 's'}", "")
    yield f"This is {_WHAT[form]}: {lm.name} with facts changed by factpatch. Base fingerprint `{lm.fingerprint[:16]}…`."
    yield from (
        "",
        "## What was changed",
        "",
        "| edit | kind | asked | says now | said before |",
        "| --- | --- | --- | --- | --- |",
    )
    for edit in edits[:_MOST]:
        before = ", ".join(edit.ground_truth) or "–"
        yield f"| {_cell(edit.id)} | {edit.kind} | {_cell(edit.prompt)} | {_cell(edit.target)} | {_cell(before)} |"
    if len(edits) > _MOST:
        yield f"\nand {len(edits) - _MOST} more."
    yield from ("", "## How", "")
    for patch in patches:
        told = patch.provenance
        parts = ", ".join(f"`{change['part']}` ({change['form']})" for change in patch.changes()[:8])
        yield f"- `{patch.id}` by {told.method}, {len(told.edits)} edits, changes {parts}; settings `{json.dumps(told.config)}`"
    if any(each.error for each in shortened):
        yield from ("", "Changes were cut to fewer ranks: what is left out, as a share of each change's norm:", "")
        yield from (f"- `{each.parameter}`: rank {each.kept} of {each.rank}, {each.error:.2%}" for each in shortened)
    yield from ("", "## Scores", "")
    yield from _scores(patches)
    yield from ("", "## Limits", "")
    yield from (
        "- What was not asked was not tested. Other questions about the same subjects may be answered as before, or otherwise.",
        "- Consequences of a changed fact follow less reliably than the fact itself: see portability.",
        "- An answer that was replaced can often still be brought out by other questions; nothing here was deleted.",
        "- The limits and the licence of the base model hold for this one.",
    )


def _scores(patches: Sequence[Patch]) -> Iterator[str]:
    scored = [(patch, patch.provenance.scorecard) for patch in patches]
    rows = [(patch, summary) for patch, card in scored if card for summary in card.get("summaries", ())]
    if not rows:
        yield "None were made. `factpatch score` makes them."
        return
    yield "Open: what the model says by itself. Survey: teacher-forced agreement, as published tables have it; it flatters."
    yield from (
        "",
        f"| patch | protocol | {' | '.join(s.replace('_', ' ') for s in _SCORES)} |",
        "| --- |" * 2 + " ---: |" * len(_SCORES),
    )
    for patch, summary in rows:
        yield f"| `{patch.id}` | {summary['protocol']} | {' | '.join(_number(summary, name) for name in _SCORES)} |"
    for patch, card in scored:
        gate = (card or {}).get("gate")
        if gate:
            found = "; ".join(_cell(finding["says"]) for finding in gate["findings"])
            yield f"\nThe gate {'let' if gate['passed'] else 'did not let'} `{patch.id}` through: {found}."
            if gate["proposed"]:
                yield f"{len(gate['proposed'])} of the probes were made up by factpatch, not written by the patch's author."
    missing = [patch.id for patch, card in scored if not card]
    if missing:
        yield f"\nNot scored: {', '.join(missing)}."


def _number(summary: Mapping[str, Any], name: str) -> str:
    value = summary.get(name)
    return "–" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that cannot break a table, or be read as markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\|<>[]`*_#" else c for c in plain)
