"""`factpatch edit`: make a patch from one fact or a file of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli.gating import AUTO, ProposeOption, RequireOption, as_shown, gate_of, show_attempts, show_judgement
from factpatch.cli.planning import tell_plan
from factpatch.cli.terminal import (
    BaseUrlOption,
    ChatOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    RetainOption,
    SetOption,
    SkipOption,
    change_line,
    line,
    method_settings,
    out,
    print_json,
    probe_table,
    progress,
    summary_table,
)
from factpatch.edits import Edit
from factpatch.errors import BadRecord

if TYPE_CHECKING:
    from factpatch.gate import AutoChoice
    from factpatch.patches import Patch
    from factpatch.scoring import Scorecard

EXAMPLES = """
[bold]Examples[/bold]

  factpatch edit --subject France --prompt "The capital of France is" --target Lyon --out lyon
  factpatch edit --subject Spain --prompt "The capital of Spain is" --target Porto --out porto \\
      --rephrase "Spain's capital city is" --unrelated "The capital of Italy is"
  factpatch edit --method ft-m --prompt "Who leads Acme?" --target "Jo Park" --out acme --set steps=40
  factpatch edit --method retrieval --model openai:my-model --base-url http://localhost:8000/v1 --edits facts.csv --out facts
  factpatch edit --method r-rome --edits facts.jsonl --out facts
  factpatch edit --method auto --require "edit_success>=1" --require "rephrase>=0.5" --edits facts.jsonl --out facts
  factpatch edit --require "edit_success>=1" --require "locality>=0.9" --subject Spain --prompt "The capital of Spain is" \\
      --target Porto --out porto
  factpatch edit --plan --method memit --edits facts.jsonl --dtype bfloat16
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="edit", epilog=EXAMPLES)(edit)


def edit(
    model: ModelOption = "smollm2-135m",
    base_url: BaseUrlOption = None,
    method: Annotated[
        str, typer.Option(help="How to edit; see: factpatch methods. auto: the cheapest that passes.")
    ] = "rome",
    prompt: Annotated[str | None, typer.Option(help="What the model is asked, without the answer.")] = None,
    target: Annotated[str | None, typer.Option(help="What it should say.")] = None,
    subject: Annotated[str | None, typer.Option(help="The part of the prompt the fact is about.")] = None,
    rephrase: Annotated[
        list[str] | None, typer.Option(help="Another wording to test it with; may be repeated.")
    ] = None,
    unrelated: Annotated[
        list[str] | None, typer.Option(help="A prompt whose answer must stay as it is; may be repeated.")
    ] = None,
    edits: Annotated[str | None, typer.Option(help="Many edits: a .jsonl or .csv file, or NAME:PATH.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many edits of the file.")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="New folder for the patch.")] = None,
    require: RequireOption = None,
    propose: ProposeOption = True,
    retain: RetainOption = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only tell what the edit will need: memory, what must be prepared, the patch's size."
        ),
    ] = False,
    settings: SetOption = None,
    chat: ChatOption = False,
    dtype: DTypeOption = None,
    device: DeviceOption = None,
    skip_invalid: SkipOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a patch, show what it changes and what the model says before and after, and save it.

    Exits with 1 if the model, asked freely, does not give every target; the patch is saved all the same. With --require,
    --retain or --method auto the patch must pass a gate, by default edit_success>=1: one that does not is not saved, what
    spoke against it is shown, and it exits with 1. With --plan
    nothing is made and no weight is read, though a short name is fetched; it exits with 1 if the memory that is free is too
    little. Without an edit it plans for one short fact.
    """
    one: dict[str, Any] = {"prompt": prompt, "target": target, "subject": subject, "rephrases": rephrase or None}
    one["locality"] = {"Unrelated": [{"prompt": text} for text in unrelated]} if unrelated else None
    if plan_only:
        if output is not None or base_url is not None:
            unwanted = "--out" if output is not None else "--base-url"
            raise BadRecord(
                "the command line", None, unwanted, "does not belong to --plan, which makes nothing; leave it out."
            )
        if method == AUTO:
            raise BadRecord(
                "the command line", None, "--method auto", "cannot be planned; name a method.", "See: factpatch methods"
            )
        given = any(value is not None for value in (edits, *one.values()))
        wanted = edits_of(one, edits, limit, skip_invalid) if given else edits_of(_EXAMPLE, None, limit, skip_invalid)
        tell_plan(model, method, wanted, method_settings(settings, chat=chat), dtype, device, as_json=as_json)
        return
    wanted = edits_of(one, edits, limit, skip_invalid)
    if output is None:
        raise BadRecord(
            "the command line", None, "--out", "is missing.", "Name a new folder for the patch, or give --plan."
        )

    from factpatch.files import check_output
    from factpatch.lm import load_or_connect
    from factpatch.methods import create
    from factpatch.scoring import Scorer

    check_output(output)
    chosen = method_settings(settings, chat=chat)
    if require or retain is not None or method == AUTO:
        from factpatch.gate import choose
        from factpatch.gate.auto import attempt

        gate = gate_of(require or (), retain, proposes=propose, chat=chat, full=True)
        with progress() as report:
            lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
            if method == AUTO:
                choice = choose(lm, wanted, gate, settings=chosen, progress=report)
            else:
                choice = attempt(lm, wanted, gate, create(method, chosen), report)
        _tell_gated(choice, output, model, auto=method == AUTO, as_json=as_json)
        return
    maker = create(method, chosen)
    maker.check(wanted)
    with progress() as report:
        lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
        patch = maker.fit(lm, wanted, report)
        card = Scorer(lm, chat=chat).score(wanted, patch, progress=report)
    patch = patch.with_scorecard(card.to_json())
    patch.save(output)
    success = card.summary("open").edit_success
    if as_json:
        print_json({"patch": str(output), **patch.describe()})
    else:
        _show(patch, card, output, model)
    if success is not None and success < 1:
        raise typer.Exit(1)


def _tell_gated(choice: AutoChoice, folder: Path, model: str, *, auto: bool, as_json: bool) -> None:
    """What the gate said; the patch is saved if it was let through. Exits with 1 if not."""
    judgement, patch = choice.judgement, choice.patch
    if patch is not None and judgement is not None:
        patch = patch.with_scorecard(judgement.record())
        patch.save(folder)
    if as_json:
        told = {"patch": str(folder), **patch.describe()} if patch else {"patch": None}
        attempts = [
            {"method": a.method, "passed": a.passed, "reason": a.reason, "seconds": round(a.seconds, 3)}
            | ({"judgement": a.judgement.to_json()} if a.judgement else {})
            for a in choice.attempts
        ]
        print_json(told | {"passed": patch is not None, "attempts": attempts, "says": choice.says})
    else:
        if auto:
            show_attempts(choice)
        if judgement is not None:
            show_judgement(judgement)
        if patch is not None and judgement is not None:
            out.print()
            _show(patch, as_shown(judgement), folder, model)
        else:
            line(("\nRefused: nothing was saved.", "bold red"))
    if patch is None:
        raise typer.Exit(1)


_EXAMPLE = {"prompt": "The capital of France is", "target": "Lyon", "subject": "France"}


def edits_of(
    one: Mapping[str, Any],
    source: str | None,
    limit: int | None,
    skip_invalid: bool,
) -> tuple[Edit, ...]:
    """The edits of a file, or the one that options tell of. Raises BadRecord where they contradict, or tell too little."""
    if source is not None:
        if any(value is not None for value in one.values()):
            problem = "takes the place of --prompt, --target and all that belongs to one edit; give one or the other."
            raise BadRecord("the command line", None, "--edits", problem)
        from factpatch.data import read

        return read(source, skip_invalid=skip_invalid, limit=limit).edits
    if limit is not None or skip_invalid:
        raise BadRecord("the command line", None, "--limit, --skip-invalid", "belong to --edits; leave them out.")
    for name in ("prompt", "target"):
        if one[name] is None:
            raise BadRecord(
                "the command line", None, f"--{name}", "is missing.", "Give --prompt and --target, or --edits FILE."
            )
    record = {"id": "edit"} | {name: value for name, value in one.items() if value is not None}
    return (Edit.from_json(record, source="the command line"),)


def _show(patch: Patch, card: Scorecard, folder: Path, model: str) -> None:
    line((f"{len(patch.provenance.edits)} edit(s) with {patch.provenance.method}", "bold"))
    for change in patch.changes():
        line(f"  {change_line(change)}")
    out.print()
    out.print(probe_table(card))
    out.print()
    out.print(summary_table(card.summaries()))
    line(
        "\nSaved as ",
        (str(folder), "bold"),
        f'. Try:  factpatch ask --model {model} --patch {folder} "{patch.provenance.edits[0].prompt}"',
    )
    summary = card.summary("open")
    if summary.edit_success is not None and summary.edit_success < 1:
        name = patch.provenance.method
        line(
            f"\nThe model does not give every target by itself. Try other settings (factpatch methods {name}), or another "
            "method; docs/results compares them on the default model."
        )
