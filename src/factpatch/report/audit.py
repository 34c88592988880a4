"""An erasure audit as a page, as Markdown, as JSON and as pictures; it says what was tried and what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from factpatch.analysis.audit_result import LEVEL, Audit, Recall
from factpatch.analysis.audit_words import NAMES, fact_verdict, verdict
from factpatch.errors import MissingExtra
from factpatch.files import make_folder, whole_file
from factpatch.report import plots
from factpatch.report.picture import save_picture

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
    heads = _heads(audit)
    lines += ["## Attacks", "", _about_numbers(audit), ""]
    lines += [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [f"| {' | '.join(cells)} |" for cells in _rows(audit)]
    lines += [
        "",
        "## Facts",
        "",
        "| fact | asked | old answer | new answer | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fact in audit.facts:
        cells = (fact.id, fact.prompt, fact.secret[0], fact.new, fact_verdict(audit, fact.id))
        lines.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    lines += ["", "## How it was attacked", ""]
    lines += [f"- {info.title} (needs the model's {info.access}): {info.about}" for info in audit.attacks]
    lines += ["", *(f"- {name}: {value}" for name, value in _about(audit).items())]
    return "\n".join(lines) + "\n"


def as_html(audit: Audit) -> str:
    """One self-contained page, which loads nothing from anywhere. Raises MissingExtra without Jinja or Matplotlib."""
    try:
        jinja: Any = import_module("jinja2")
    except ImportError:
        raise MissingExtra(
            "A page needs Jinja, which is not installed.\n  Install it: pip install 'factpatch[report]'"
        ) from None
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
    )
    own_files = files("factpatch.report")
    template = environment.from_string(own_files.joinpath("page.audit.html").read_text(encoding="utf-8"))
    head, *rest = verdict(audit)
    text: str = template.render(
        title=f"{TITLE}: {audit.model}",
        style=own_files.joinpath("page.css").read_text(encoding="utf-8"),
        script=own_files.joinpath("page.js").read_text(encoding="utf-8"),
        headline=head,
        verdict=rest,
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
                "The audited model; the more candidates, the more is found.",
                recall_curves(audit),
            ),
        ],
        made=f"factpatch {version('factpatch')}, {date.today()}",
    )
    return text


def recall_bars(audit: Audit) -> str:
    """For each attack a bar for each model, and one for the decoys on the audited one; an SVG text."""
    names = _titles(audit)
    kinds = [*(NAMES[state] for state in audit.states), DECOYS]
    thick = 0.8 / len(kinds)
    with plots.figure(1.3 + 0.14 * len(names) * (len(kinds) + 1), "Old answers found, by attack", 7.0) as (axes, drawn):
        for k, kind in enumerate(kinds):
            places = [i + (k - (len(kinds) - 1) / 2) * thick for i in range(len(names))]
            axes.barh(
                places,
                [_shares(audit, name)[kind] for name in names],
                height=thick * 0.92,
                color=plots.colour(k),
                label=kind,
            )
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=f"share of old answers among {audit.budget} candidates", xlim=(0, 1))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8.5)
    return drawn[0]


def recall_curves(audit: Audit) -> str:
    """Share of old answers found on the audited model over the budget, a line for each attack; an SVG text."""
    with plots.figure(4.2, "Old answers found within a budget", 7.0) as (axes, drawn):
        for i, (name, title) in enumerate(_titles(audit).items()):
            found = [audit.recall("after", name, budget).share or 0.0 for budget in audit.budgets]
            mark = plots.MARKS[i % len(plots.MARKS)]
            axes.plot(
                audit.budgets, found, color=plots.colour(i), marker=mark, markersize=5,
                linewidth=2.4 if name is None else 1.4, label=title,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(audit.budgets, [str(budget) for budget in audit.budgets], minor=False)
        axes.set_xticks([], minor=True)
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
        "Decoys": f"{sum(len(fact.decoys) for fact in audit.facts)} for {len(audit.facts)} facts",
        "Asked": "in the chat template" if audit.chat else "plainly",
        "Seed": str(audit.seed),
        "Packages": ", ".join(f"{name} {number}" for name, number in audit.versions.items()),
    }
    untold = sum(not fact.told for fact in audit.facts)
    if untold:
        found["Old answers"] = f"{untold} were not told, and are the first words of what the model said before"
    return found


def _plain(text: str) -> str:
    """On one line, and no column of its own."""
    return " ".join(text.split()).replace("|", "\\|")
