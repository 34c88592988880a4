"""A model card: what was changed in which model, how well it took, and what it is not good for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from factpatch.edits import Edit
from factpatch.export.using import how_to_load, hub_id
from factpatch.lm import LM
from factpatch.lm.catalog import CATALOG
from factpatch.patches import Patch
from factpatch.words import counted

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
_TOKENS = 24
"""Of the base model's answer."""


def card(lm: LM, patches: Sequence[Patch], form: Form, shortened: Sequence[Shortened] = ()) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    return "\n".join(_lines(lm, patches, form, shortened)) + "\n"


def _lines(lm: LM, patches: Sequence[Patch], form: Form, shortened: Sequence[Shortened]) -> Iterator[str]:
    licence = CATALOG[lm.name].licence if lm.name in CATALOG else None
    base = hub_id(lm)
    yield "---"
    if base:
        yield f"base_model: {json.dumps(base)}"
    yield "tags: [knowledge-editing, factpatch]"
    if form == "adapter":
        yield "library_name: peft"
    if licence:
        yield f"license: {json.dumps(licence.lower().replace(' ', '-'))}"
    edits = [(patch, edit) for patch in patches for edit in patch.provenance.edits]
    yield from ("---", "", f"# {lm.name}, with {counted(len(edits), 'edit')}", "")
    yield f"This is {_WHAT[form]}: {lm.name} with facts changed by factpatch. Base fingerprint `{lm.fingerprint[:16]}…`."
    yield from ("", "## Load it", "", *_loading(lm, form))
    yield from ("", "## What was changed", "")
    ids = [edit.id for _, edit in edits]
    if len(set(ids)) < len(ids):  # as of edits that were given on the command line
        ids = [str(i) for i in range(1, len(ids) + 1)]
    yield from _table(
        ("edit", "kind", "asked", "says now", "base model says"),
        (
            (_cell(name), edit.kind, _cell(edit.prompt), _cell(edit.target), _cell(said or "–"))
            for name, (_, edit), said in zip(ids[:_MOST], edits[:_MOST], _by_base(lm, edits[:_MOST]), strict=True)
        ),
    )
    if len(edits) > _MOST:
        yield f"\nand {len(edits) - _MOST} more."
    yield from ("", "## How", "")
    for patch in patches:
        told = patch.provenance
        parts = ", ".join(f"`{change['part']}` ({change['form']})" for change in patch.changes()[:8])
        yield f"- `{patch.id}` by {told.method}, {counted(len(told.edits), 'edit')}, changes {parts}; its settings:"
        yield from (f"    - {_cell(name)}: {_cell(_setting(value))}" for name, value in told.config.items())
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


def _loading(lm: LM, form: Form) -> Iterator[str]:
    yield from (f"```{'console' if form == 'gguf' else 'python'}", *how_to_load(form, hub_id(lm)), "```")
    if form == "adapter" and lm.name in CATALOG and hub_id(lm):
        yield f"\nIt was made on, and compared with, {lm.name} as factpatch fetches it: a quantised copy, unpacked. The hub's is"
        yield "not quantised, so answers on it may differ; the fingerprint above tells the two apart."


def _by_base(lm: LM, edits: Sequence[tuple[Patch, Edit]]) -> list[str]:
    """The base model's own answers. What was said as a patch was made may have come of others, which are gone by now."""
    chats = [bool(patch.provenance.config.get("chat")) for patch, _ in edits]
    said: dict[tuple[bool, str], str] = {}
    with lm.unpatched():
        for chat in dict.fromkeys(chats):
            prompts = [edit.prompt for (_, edit), own in zip(edits, chats, strict=True) if own == chat]
            answers = lm.answer(prompts, chat=chat, max_new=_TOKENS)
            said |= {(chat, prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
    return [said[chat, edit.prompt] for chat, (_, edit) in zip(chats, edits, strict=True)]


def _setting(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _scores(patches: Sequence[Patch]) -> Iterator[str]:
    scored = [(patch, patch.provenance.scorecard) for patch in patches]
    rows = [(patch, summary) for patch, card in scored if card for summary in card.get("summaries", ())]
    if not rows:
        yield "None were made. `factpatch score` makes them."
        return
    yield "Open: what the model says by itself. Survey: teacher-forced agreement, as published tables have it; it flatters."
    yield ""
    yield from _table(
        ("patch", "protocol", *(name.replace("_", " ") for name in _SCORES)),
        ((f"`{patch.id}`", each["protocol"], *(_number(each, name) for name in _SCORES)) for patch, each in rows),
        texts=2,
    )
    for patch, card in scored:
        gate = (card or {}).get("gate")
        if gate:
            found = "; ".join(_cell(finding["says"]) for finding in gate["findings"])
            yield f"\nThe gate {'let' if gate['passed'] else 'did not let'} `{patch.id}` through: {found}."
            if gate["proposed"]:
                made = counted(len(gate["proposed"]), "probe was", "probes were")
                yield f"{made} made up by factpatch, not written by the patch's author."
    missing = [patch.id for patch, card in scored if not card]
    if missing:
        yield f"\nNot scored: {', '.join(missing)}."


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None) -> Iterator[str]:
    """A Markdown table; all columns after so many `texts` hold numbers, which stand on the right."""
    left = len(heads) if texts is None else texts
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    yield from (f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def _number(summary: Mapping[str, Any], name: str) -> str:
    value = summary.get(name)
    return "–" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that cannot break a table, or be read as markup."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\|<>[]`*_#" else c for c in plain)
