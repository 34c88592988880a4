"""`factpatch score`: how a patch, a method or the bare model does on a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import (
    err,
    line,
    method_settings,
    number,
    out,
    print_json,
    progress,
    show_retained,
    summary_table,
)
from factpatch.errors import BadConfig, BadFile
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.bench import Failure
    from factpatch.data import Dataset
    from factpatch.scoring import Scorecard

EXAMPLES = """
[bold]Examples[/bold]

  factpatch score --patch lyon --data sample --limit 10
  factpatch score --method ft-m --data wiki_counterfact:KnowEdit/wiki_counterfact/train_cf.json --limit 20
  factpatch score --method memit --sequence --data sample --limit 10
  factpatch score --method rome --set layer=8 --data sample --limit 5 --json > rome.json
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="score", epilog=EXAMPLES)(score)


def score(
    data: opt.Data,
    model: opt.Model = opt.DEFAULT_MODEL,
    base_url: opt.BaseUrl = None,
    patch: opt.Patches = None,
    method: Annotated[str | None, typer.Option(help="Make and score each edit alone with this method.")] = None,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="With --method: keep each edit, and score at edit and at end.")
    ] = False,
    limit: opt.Limit = None,
    settings: opt.Settings = None,
    chat: opt.Chat = False,
    retain: opt.Retain = None,
    judge: opt.Judge = None,
    judge_url: opt.JudgeUrl = None,
    seed: Annotated[int, typer.Option(help="Of the sampled text that fluency is measured on.")] = 0,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Score under both protocols, open (free answers) and survey (teacher-forced), before and after.

    With --patch, all edits are scored under those patches together; with --method, each edit is made and scored alone;
    and with --sequence too, after the others, all of them kept; with neither, the model itself is scored. Exits with 1 if
    some edits could not be made, or if a question of --retain is answered otherwise than before.
    """
    if method and patch:
        raise BadConfig("--method and --patch: give one or the other.\n  --method makes its own patch for each edit.")
    if (settings or sequence) and not method:
        raise BadConfig("--set, --sequence: they belong to a method.\n  Give --method too.")

    from factpatch.bench import score_sequence, score_singly
    from factpatch.data import read
    from factpatch.data.questions import read_questions
    from factpatch.lm import load_or_connect
    from factpatch.methods import create
    from factpatch.patches import Patch
    from factpatch.scoring import Judge, Scorer

    dataset = read(data, skip_invalid=skip_invalid, limit=limit)
    if not dataset.edits:
        raise BadFile(
            f"{data}: holds no edit that could be scored.\n  See how a record is read: factpatch data show {data}"
        )
    questions = read_questions(retain) if retain else ()
    judging = Judge.at(judge, judge_url)
    maker = create(method, method_settings(settings, chat=chat)) if method else None
    patches = [Patch.load(folder) for folder in patch or []]
    failures: tuple[Failure, ...] = ()
    with progress() as report:
        lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
        scorer = Scorer(lm, chat=chat, seed=seed, retain=questions, judge=judging)
        cards: dict[str, Scorecard | None]
        if maker is None:
            cards = {"": scorer.score(dataset.edits, *patches, progress=report)}
        elif sequence:
            line_up = score_sequence(lm, maker, dataset.edits, scorer, progress=report)
            cards, failures = {"at edit": line_up.at_edit, "at end": line_up.last}, line_up.failures
        else:
            done = score_singly(lm, maker, dataset.edits, scorer, report)
            cards, failures = {"": done.card}, done.failures
    label = method or ("+".join(folder.name for folder in patch) if patch else "none")
    if as_json:
        common = (dataset, label, lm.name, lm.fingerprint, seed)
        print_json([row for moment, card in cards.items() for row in _rows(card, moment, failures, *common)])
    else:
        for moment, card in cards.items():
            title = f" on {dataset.name}, {counted(len(dataset.edits), 'edit')}, {lm.name}{moment and ', '}{moment}"
            _show(label, title, card, len(dataset.edits) - len(failures))
        if patches:
            made = {(edit.prompt, edit.target) for each in patches for edit in each.provenance.edits}
            known = sum((edit.prompt, edit.target) in made for edit in dataset.edits)
            line((f"{known} of these {len(dataset.edits)} edits are in the patches given", "dim"))
    for failure in failures:
        err.print(Text("not made: ", style="yellow") + Text(failure.reason), soft_wrap=True)
    if failures or any(question.changed for card in cards.values() if card for question in card.retained):
        raise typer.Exit(1)


def _show(label: str, title: str, card: Scorecard | None, made: int) -> None:
    if card is None:
        return
    line((label, "bold"), title)
    out.print(summary_table(card.summaries()))
    for summary in card.summaries():
        kinds = ", ".join(f"{kind} {number(value)}" for kind, value in summary.by_kind.items())
        probes = f"{summary.unscored} of {summary.scored + summary.unscored} probes unscored"
        line((f"{summary.protocol}: {kinds}; {probes}", "dim"))
        if summary.measures:
            line((", ".join(f"{name} {number(value)}" for name, value in summary.measures.items()), "dim"))
    if card.retained:
        show_retained(card.retained)
    if card.fit_seconds is not None:
        fit, asked = card.fit_seconds / made, card.score_seconds / made
        line((f"{fit:.1f} s to fit and {asked:.1f} s to score an edit", "dim"))


def _rows(
    card: Scorecard | None,
    moment: str,
    failures: tuple[Failure, ...],
    dataset: Dataset,
    method: str,
    model: str,
    fingerprint: str,
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each protocol, with the detail beneath."""
    refused = [{"edit": failure.edit, "reason": failure.reason} for failure in failures]
    common = {
        "method": method,
        "dataset": dataset.name,
        "data_sha256": dataset.sha256,
        "skipped_records": len(dataset.skipped),
        "model": model,
        "fingerprint": fingerprint,
        "seed": seed,
    } | ({"moment": moment} if moment else {})
    if card is None:
        return [common | {"edits": 0, "not_made": refused}]
    return [
        common
        | summary.model_dump(mode="json")
        | {
            "chat": card.chat,
            "fit_seconds": card.fit_seconds,
            "score_seconds": card.score_seconds,
            "baseline_seconds": card.baseline_seconds,
            "not_made": refused,
            "retained": [question.model_dump(mode="json") for question in card.retained],
            "detail": [
                row.model_dump(mode="json", exclude_defaults=True)
                for row in card.scores
                if row.protocol == summary.protocol
            ],
        }
        for summary in card.summaries()
    ]
