"""An erasure audit as a page, as Markdown, as JSON and as pictures; it says what was tried and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from factpatch.analysis.audit_result import LEVEL, Audit, Recall
from factpatch.analysis.audit_words import NAMES, fact_verdict, not_tried, verdict
from factpatch.files import make_folder, whole_file
from factpatch.report import plots
from factpatch.report.picture import save_picture
from factpatch.report.template import markdown_table, rendered
from factpatch.words import counted

__all__ = ["as_html", "as_json", "as_markdown", "recall_bars", "recall_curves", "save_audit"]

TITLE = "Erasure audit"
DECOYS = "decoys"


def as_json(audit: Audit) -> str:
    """Everything: the verdict in words, recall by attack, model and budget, and every list of candidates."""
    told = {
        "recovered": audit.recovered,
        "can_tell": audit.can_tell,
        "in_doubt": audit.in_doubt,
        "untested": list(audit.untested),
        "verdict": verdict(audit),
        "by_fact": {fact.id: fact_verdict(audit, fact.id) for fact in audit.facts},
        "standing_out": audit.standing_out("after").model_dump(mode="json"),
        "clear": list(audit.clear),
        "recall": audit.table(),
    }
    # Infinite numbers become strings only where pydantic itself writes the text.
    own = json.loads(audit.model_dump_json())
    return json.dumps(told | own, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_markdown(audit: Audit) -> str:
    """The verdict, a table of attacks and one of facts."""
    lines = [f"# {TITLE}: {audit.model}", ""]
    for text in verdict(audit):
        lines += [text, ""]
    lines += ["Not tried:", "", *(f"- {text}" for text in not_tried(audit)), ""]
    lines += ["## Attacks", "", _about_numbers(audit), ""]
    lines += [*markdown_table(_heads(audit), _rows(audit)), "", "## Facts", ""]
    rows = [(fact.id, fact.prompt, fact.secret[0], fact.new, fact_verdict(audit, fact.id)) for fact in audit.facts]
    lines += markdown_table(("fact", "asked", "old answer", "new answer", "verdict"), rows, numbers=False)
    lines += ["", "## How it was attacked", ""]
    lines += [f"- {info.title} (needs the model's {info.access}): {info.about}" for info in audit.attacks]
    lines += ["", *(f"- {name}: {value}" for name, value in _about(audit).items())]
    return "\n".join(lines) + "\n"


def as_html(audit: Audit) -> str:
    """One self-contained page, which loads nothing from anywhere. Raises MissingExtra without Jinja or Matplotlib."""
    head, *rest = verdict(audit)
    return rendered(
        "page.audit.html",
        title=f"{TITLE}: {audit.model}",
        headline=head,
        verdict=rest,
        not_tried=not_tried(audit),
        recovered=audit.recovered or audit.in_doubt,
        about=_about(audit),
        about_numbers=_about_numbers(audit),
        heads=_heads(audit),
        rows=_rows(audit),
        attacks=audit.attacks,
        facts=[(fact, fact_verdict(audit, fact.id), bool(audit.finders(fact.id))) for fact in audit.facts],
        candidates={fact.id: audit.of("after", fact=fact.id) for fact in audit.facts},
        titles={info.name: info.title for info in audit.attacks},
        plots=[
            ("Found, by attack", "Beside it the share of decoys found: what chance would find.", recall_bars(audit)),
            (
                "Found within a budget",
                "After the patches; the more candidates, the more is found.",
                recall_curves(audit),
            ),
        ],
    )


def recall_bars(audit: Audit) -> str:
    """For each attack a bar for each model, and one for the decoys on the audited one; an SVG text."""
    shares = {title: _shares(audit, name) for name, title in _titles(audit).items()}
    bars = {title: {kind: (share, None) for kind, share in own.items()} for title, own in shares.items()}
    x = f"share of old answers among {audit.budget} candidates"
    return plots.grouped_bars(bars, x, "Old answers found, by attack", width=7.0, columns=4)


def recall_curves(audit: Audit) -> str:
    """Share of old answers found on the audited model over the budget, a line for each attack; an SVG text."""
    with plots.figure(4.2, "Old answers found within a budget", 7.0) as (axes, drawn):
        for i, (name, title) in enumerate(_titles(audit).items()):
            found = [audit.recall("after", name, budget).share or 0.0 for budget in audit.budgets]
            # One attack alone may find as much as all: their line lies wide and pale beneath it.
            style = {"linewidth": 6.0, "alpha": 0.35, "markersize": 9, "zorder": 1.5} if name is None else {"zorder": 3}
            axes.plot(audit.budgets, found, **plots.marked(i) | style, label=title)
        plots.counted(axes, audit.budgets)
        axes.set(xlabel="candidates of each attack", ylabel="share of old answers found", ylim=(-0.03, 1.05))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5)
    return drawn[0]


def save_audit(folder: Path, audit: Audit) -> list[Path]:
    """Write the page, the Markdown, the JSON and the pictures with their numbers; the paths. Raises OutputError, MissingExtra."""
    texts = {"page.html": as_html(audit), "audit.md": as_markdown(audit), "audit.json": as_json(audit)}
    make_folder(folder)
    for name, text in texts.items():
        with whole_file(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    shares = [{"attack": title} | _shares(audit, name) for name, title in _titles(audit).items()]
    pictures = [
        save_picture(folder, "recall", recall_bars(audit), shares),
        save_picture(folder, "recall-by-budget", recall_curves(audit), audit.table()),
    ]
    return [*(folder / name for name in texts), *pictures]


def _titles(audit: Audit) -> dict[str | None, str]:
    """All attacks together, then each."""
    return {None: "all attacks together", **{info.name: info.title for info in audit.attacks}}


def _shares(audit: Audit, name: str | None) -> dict[str, float]:
    found = {NAMES[state]: audit.recall(state, name).share or 0.0 for state in audit.states}
    return found | {DECOYS: audit.recall("after", name).chance or 0.0}


def _heads(audit: Audit) -> list[str]:
    return ["attack", "needs", *(NAMES[state] for state in audit.states), DECOYS, "p"]


def _rows(audit: Audit) -> list[list[str]]:
    """As `_heads` names them."""
    access: Mapping[str | None, str] = {info.name: info.access for info in audit.attacks}
    rows = []
    for name, title in _titles(audit).items():
        now = audit.recall("after", name)
        found = [_found(audit.recall(state, name)) for state in audit.states]
        chance = "–" if now.chance is None else f"{now.chance:.2f}"
        rows.append([title, access.get(name, ""), *found, chance, "–" if now.p is None else f"{now.p:.2g}"])
    return rows


def _found(row: Recall) -> str:
    return f"{row.found} of {row.facts}" if row.facts else "–"


def _about_numbers(audit: Audit) -> str:
    return (
        f"Facts whose old answer is among the first {audit.budget} candidates. Decoys: the share of answers never told that are "
        "among them. p: how likely so many are found if old answers turn up like decoys; it is reckoned from the canonical "
        "spelling of each, since every spelling is another chance, while the counts are of any spelling. A short text counts "
        "if the old answer is in it as a whole phrase; a token, if the old answer begins with it and the new one does not. "
        f"Two tests decide, whether old answers stand out among decoys and whether one attack is clear by itself, each at "
        f"{LEVEL / 2:.1%}: where old answers turn up like decoys, independently of one another, at most {LEVEL:.0%} of audits "
        "say that they are recoverable."
    )


def _about(audit: Audit) -> dict[str, str]:
    """What the numbers depend on."""
    found = {
        "Model": f"{audit.model} ({audit.fingerprint[:16]}…)",
        "Patches": "; ".join(f"{p.method} ({p.kind}, {p.id})" for p in audit.patches)
        or "none: the model itself is audited",
        "Control": audit.control or "none",
        "Budget": f"{audit.budget} candidates for each attack and fact",
        "Decoys": f"{sum(len(fact.decoys) for fact in audit.facts)} for {counted(len(audit.facts), 'fact')}",
        "Asked": "in the chat template" if audit.chat else "plainly",
        "Seed": str(audit.seed),
        "Packages": ", ".join(f"{name} {number}" for name, number in audit.versions.items()),
    }
    untold = sum(not fact.told for fact in audit.facts)
    if untold:
        which = "1 was not told, and is" if untold == 1 else f"{untold} were not told, and are"
        found["Old answers"] = f"{which} the first words of what the model said before"
    return found
