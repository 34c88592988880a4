"""`factpatch edit`: make a patch from one fact or a file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli import options as opt
from factpatch.cli.gating import AUTO, as_shown, gate_of, say_attempt, show_choice, show_judgement, tell_beside
from factpatch.cli.planning import tell_plan
from factpatch.cli.terminal import (
    change_line,
    if_interrupted,
    is_written,
    line,
    method_settings,
    out,
    print_json,
    probe_table,
    progress,
    summary_table,
    typed,
)
from factpatch.edits import Edit
from factpatch.errors import BadRecord, UnknownMethod
from factpatch.words import counted

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
    model: opt.Model = opt.DEFAULT_MODEL,
    base_url: opt.BaseUrl = None,
    method: Annotated[
        str, typer.Option(help="How to edit; see: factpatch methods. auto: the cheapest that passes.")
    ] = "rome",
    prompt: opt.Prompt = None,
    target: opt.Target = None,
    subject: opt.Subject = None,
    rephrase: opt.Rephrase = None,
    unrelated: opt.Unrelated = None,
    edits: opt.Edits = None,
    limit: opt.Limit = None,
    output: Annotated[Path | None, typer.Option("--out", help="New folder for the patch.")] = None,
    require: opt.Require = None,
    propose: opt.Propose = True,
    retain: opt.Retain = None,
    minutes: opt.Minutes = None,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan", help="Only tell what the edit will need: memory, what must be prepared, the patch's size."
        ),
    ] = False,
    settings: opt.Settings = None,
    chat: opt.Chat = False,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Make a patch, show what it changes and what the model says before and after, and save it.

    Exits with 1 if the model, asked freely, does not give every target; the patch is saved all the same. With --require,
    --retain or --method auto the patch must pass a gate, by default edit_success>=1: one that does not is not saved, what
    spoke against it is shown, and it exits with 1. With --plan nothing is made and no weight is read, though a short name is
    fetched; it exits with 1 if the memory that is free is too little. Without an edit it plans for one short fact.
    """
    one = one_edit(prompt, target, subject, rephrase, unrelated)
    if plan_only:
        _check_plan(output, base_url, method)
        wanted = edits_of(one if one or edits is not None else _EXAMPLE, edits, limit, skip_invalid)
        tell_plan(model, method, wanted, method_settings(settings, chat=chat), dtype, device, as_json=as_json)
        return
    wanted = edits_of(one, edits, limit, skip_invalid)
    if output is None:
        raise wrong("--out", "is missing.", "Name a new folder for the patch, or give --plan.")

    from factpatch.files import check_output
    from factpatch.gate import Gate, choose
    from factpatch.gate.auto import attempt
    from factpatch.lm import load_or_connect
    from factpatch.methods import create

    check_output(output)
    chosen = method_settings(settings, chat=chat)
    is_gated = bool(require) or retain is not None or method == AUTO
    gate = (
        gate_of(require or (), retain, proposes=propose, chat=chat, full=True)
        if is_gated
        else Gate((), proposes=False, chat=chat, full=True)
    )
    try:
        maker = None if method == AUTO else create(method, chosen)
    except UnknownMethod as error:
        raise UnknownMethod(f"{error}\n  Or auto: the cheapest that passes.") from None
    if maker is not None:
        maker.check(wanted)
    if maker is not None and minutes is not None:
        raise wrong("--minutes", "belongs to --method auto; leave it out.")
    with if_interrupted(lambda: is_written(output)), progress() as report:
        lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
        if maker is None:
            choice = choose(lm, wanted, gate, settings=chosen, progress=report, minutes=minutes, watch=say_attempt)
        else:
            choice = attempt(lm, wanted, gate, maker, report)
    asking = ["ask", "--model", model, *(["--base-url", base_url] if base_url else []), *(["--chat"] if chat else [])]
    if is_gated:
        _tell_gated(choice, output, asking, auto=maker is None, as_json=as_json)
    else:
        _tell(choice, output, asking, as_json=as_json)


def _check_plan(output: Path | None, base_url: str | None, method: str) -> None:
    for option, given in (("--out", output), ("--base-url", base_url)):
        if given is not None:
            raise wrong(option, "does not belong to --plan, which makes nothing; leave it out.")
    if method == AUTO:
        raise wrong("--method auto", "cannot be planned; name a method.", "See: factpatch methods")


def _tell(choice: AutoChoice, folder: Path, asking: Sequence[str], *, as_json: bool) -> None:
    """Where nothing is required the patch is saved whatever came of it. Exits with 1 if the edits do not all take."""
    assert choice.patch is not None
    assert choice.judgement is not None
    card = choice.judgement.scorecard
    patch = choice.patch.with_scorecard(card.to_json())
    patch.save(folder)
    if as_json:
        print_json({"patch": str(folder), **patch.describe()})
    else:
        _show(patch, card, folder, asking)
    success = card.summary("open").edit_success
    if success is not None and success < 1:
        raise typer.Exit(1)


def _tell_gated(choice: AutoChoice, folder: Path, asking: Sequence[str], *, auto: bool, as_json: bool) -> None:
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
        more = {"passed": patch is not None, "attempts": attempts, "says": choice.says, "advice": choice.advice}
        print_json(told | more)
    else:
        if auto:
            show_choice(choice)
        if judgement is not None:
            show_judgement(judgement)
        if patch is not None and judgement is not None:
            out.print()
            _show(patch, as_shown(judgement), folder, asking)
            if auto:
                tell_beside(patch)
        else:
            line(("\nRefused: nothing was saved.", "bold red"))
    if patch is None:
        raise typer.Exit(1)


_COMMAND_LINE = "the command line"
_OPTIONS = {
    "prompt": "--prompt",
    "target": "--target",
    "subject": "--subject",
    "rephrases": "--rephrase",
    "locality": "--unrelated",
}
_HINTS = {"--subject": "Give the words by which the prompt itself names what the fact is about, in the same letters."}
_EXAMPLE = {"prompt": "The capital of France is", "target": "Lyon", "subject": "France"}


def wrong(option: str, problem: str, hint: str = "") -> BadRecord:
    """An error about what was typed."""
    return BadRecord(_COMMAND_LINE, None, option, problem, hint)


def one_edit(
    prompt: str | None,
    target: str | None,
    subject: str | None,
    rephrases: Sequence[str] | None,
    unrelated: Sequence[str] | None,
) -> dict[str, Any]:
    """What options tell of one edit, by the names of its fields; empty if nothing."""
    told: dict[str, Any] = {"prompt": prompt, "target": target, "subject": subject, "rephrases": rephrases or None}
    told["locality"] = {"Unrelated": [{"prompt": text} for text in unrelated]} if unrelated else None
    return {name: value for name, value in told.items() if value is not None}


def edits_of(one: Mapping[str, Any], source: str | None, limit: int | None, skip_invalid: bool) -> tuple[Edit, ...]:
    """The edits of a file, or the one that options tell of. Raises BadRecord where they contradict, or tell too little."""
    if source is not None:
        if one:
            problem = "takes the place of --prompt, --target and all that belongs to one edit; give one or the other."
            raise wrong("--edits", problem)
        from factpatch.data import read

        return read(source, skip_invalid=skip_invalid, limit=limit).edits
    if limit is not None or skip_invalid:
        raise wrong("--limit, --skip-invalid", "belong to --edits; leave them out.")
    for name in ("prompt", "target"):
        if name not in one:
            raise wrong(f"--{name}", "is missing.", "Give --prompt and --target, or --edits FILE.")
    try:
        return (Edit.from_json({"id": "edit", **one}, source=_COMMAND_LINE),)
    except BadRecord as error:
        option = next((own for field, own in _OPTIONS.items() if error.field.startswith(field)), error.field)
        raise wrong(option, error.problem, _HINTS.get(option, "See what it takes: factpatch edit --help")) from None


def _show(patch: Patch, card: Scorecard, folder: Path, asking: Sequence[str]) -> None:
    line((f"{counted(len(patch.provenance.edits), 'edit')} with {patch.provenance.method}", "bold"))
    for change in patch.changes():
        line(f"  {change_line(change)}")
    out.print()
    out.print(probe_table(card))
    out.print()
    out.print(summary_table(card.summaries()))
    again = typed(*asking, "--patch", folder, patch.provenance.edits[0].prompt)
    line("\nSaved as ", (str(folder), "bold"), f". Try:  {again}")
    summary = card.summary("open")
    if summary.edit_success is not None and summary.edit_success < 1:
        name = patch.provenance.method
        line(
            f"\nThe model does not give every target by itself. Try other settings (factpatch methods {name}), or another "
            "method; docs/results compares them on the default model."
        )
