"""`factpatch analyse sequential`: how edits and the model fare while more are made, and a monitor that stops in time."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from factpatch.cli import options as opt
from factpatch.cli.terminal import err, line, method_settings, new_table, number, out, print_json, progress, typed
from factpatch.errors import BadConfig, BadFile
from factpatch.words import counted

if TYPE_CHECKING:
    from factpatch.analysis.decay import Decay, Rule
    from factpatch.analysis.health import Monitor, Vitals, Watched
    from factpatch.edits import Edit
    from factpatch.lm import BaseLM
    from factpatch.methods import Method
    from factpatch.progress import Progress

EXAMPLES = """
[bold]Examples[/bold]

  factpatch analyse sequential --method ft-m --method grace --data sample --limit 30 --out decay
  factpatch analyse sequential --method memit --method alphaedit --data zsre:KnowEdit/ZsRE/ZsRE-test-all.json \\
      --limit 1000 --at 1,10,100,300,1000 --no-fluency --out decay
  factpatch analyse sequential --method rome --set rome.layer=8 --data facts.jsonl --json
  factpatch analyse sequential --monitor --method ft-m --data facts.jsonl --every 5 --max-perplexity 1.5 --out good

With --out, a run that was stopped goes on when the same command is given again; a sequence that is done is not made again.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="sequential", epilog=EXAMPLES)(sequential)


def sequential(
    methods: opt.Methods,
    data: opt.Data,
    limit: opt.Limit = None,
    at: Annotated[
        str, typer.Option(help="After how many patches to score all edits so far; always after the last.")
    ] = "1,3,10,30,100,300,1000",
    settings: opt.MethodSettings = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for results and pictures; with --monitor, for the good patches."),
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="Score nothing; edit until the model is sick, and say with which edit.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="With --monitor: look after every so many patches.")] = 10,
    max_norm: Annotated[
        float, typer.Option(min=0, help="With --monitor: how far weights may move, as a share of their norm.")
    ] = 0.1,
    max_perplexity: Annotated[
        float, typer.Option(min=0, help="On neutral texts, as a multiple of the unedited model's.")
    ] = 2.0,
    min_canaries: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the canary facts, which the unedited model knows, that must be left; default: 0.5, or 0.9 "
            "with --monitor.",
        ),
    ] = None,
    min_success: Annotated[
        float,
        typer.Option(min=0, max=1, help="Success at end, as a share of that at edit; under it a method is broken."),
    ] = 0.5,
    canaries: Annotated[
        Path | None,
        typer.Option(help="Questions to watch instead of the built-in ones: .txt, .jsonl, .json or .csv."),
    ] = None,
    model: opt.Model = opt.DEFAULT_MODEL,
    base_url: opt.BaseUrl = None,
    chat: opt.Chat = False,
    seed: Annotated[int, typer.Option(help="Of the methods and of sampled text.")] = 0,
    fluency: Annotated[
        bool, typer.Option("--fluency/--no-fluency", help="Whether to measure it, which takes half the time.")
    ] = True,
    dtype: opt.DType = None,
    device: opt.Device = None,
    skip_invalid: opt.SkipInvalid = False,
    as_json: opt.Json = False,
) -> None:
    """Make edits one after the other, keep all of them, and show how they, the model and what it knew fare.

    A patch makes one edit, or all those of one group. Patches are counted as they are asked for, with those that the method
    refuses; edits are counted as they were made.

    At each checkpoint: success of the edits so far, right after each was made and now; by their age; rephrases, portability,
    locality, fluency; how far the weights have moved, perplexity on neutral texts, and the guard's questions, of which those
    that the unedited model answers rightly are its canary facts. Where each method broke is said by a rule, which
    --min-success, --max-perplexity and --min-canaries set. Exits with 1 if a method could make none of the edits.

    With --monitor nothing is scored: the sequence is stopped at the last edit with which the model was healthy, and the
    patches up to it are saved under --out. Exits with 1 if it was stopped.
    """
    if max_perplexity <= 0 or max_norm <= 0:
        raise BadConfig("--max-perplexity, --max-norm: expected a number above 0.")
    counts = _counts(at)

    from factpatch.analysis.decay import Rule
    from factpatch.analysis.health import Health, Monitor
    from factpatch.data import read
    from factpatch.data.questions import read_questions
    from factpatch.lm import load_or_connect
    from factpatch.report.plots import check_drawable

    dataset = read(data, skip_invalid=skip_invalid, limit=limit)
    if not dataset.edits:
        raise BadFile(
            f"{data}: holds no edit that could be made.\n  See how a record is read: factpatch data show {data}"
        )
    questions = read_questions(canaries) if canaries else None
    makers = _makers(methods, settings or [], {"seed": seed} if seed else {}, chat=chat)
    limits = Health(
        max_norm=max_norm, max_perplexity=max_perplexity, min_canaries=0.9 if min_canaries is None else min_canaries
    )
    rule = Rule(
        min_success=min_success,
        max_perplexity=max_perplexity,
        min_canaries=0.5 if min_canaries is None else min_canaries,
    )
    if output is not None:
        _check_places(output, makers) if monitor else check_drawable()
    with progress() as report:
        lm = load_or_connect(model, base_url=base_url, dtype=dtype, device=device, progress=report)
        for maker in makers.values():
            maker.check_model(lm)
        watch = Monitor(lm, limits, canaries=questions, chat=chat, progress=report)
        if monitor:
            watched = _watch(lm, makers, dataset.edits, watch, every, output, report)
        else:
            decays, files = _decay(lm, makers, dataset.edits, watch, counts, output, report, seed=seed, fluency=fluency)
    if monitor:
        _tell_watched(watched, output, model, as_json=as_json)
    else:
        _tell_decays(decays, files, rule, dataset.name, output, as_json=as_json)


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadConfig(f'--at "{text}": expected numbers of patches, such as 1,10,100')
    return sorted({int(part) for part in parts})


def _makers(
    methods: Sequence[str], pairs: Sequence[str], common: Mapping[str, Any], *, chat: bool
) -> dict[str, Method[Any]]:
    """The methods by name, each with its own settings."""
    from factpatch.methods import create

    own: dict[str, list[str]] = {name: [] for name in methods}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if not dot or method not in own:
            raise BadConfig(
                f'--set "{pair}": expected METHOD.KEY=VALUE with one of the methods given, such as --set {methods[0]}.seed=1'
            )
        own[method].append(rest)
    return {name: create(name, {**common, **method_settings(given, chat=chat)}) for name, given in own.items()}


def _decay(
    lm: BaseLM,
    makers: Mapping[str, Method[Any]],
    edits: Sequence[Edit],
    watch: Monitor,
    counts: Sequence[int],
    folder: Path | None,
    report: Progress,
    *,
    seed: int,
    fluency: bool,
) -> tuple[dict[str, Decay], dict[str, Path]]:
    """Each method's sequence, and the file in which it is kept."""
    from factpatch.analysis.decay import kept_at, sequential_decay
    from factpatch.scoring import Scorer

    scorer = Scorer(lm, chat=watch.chat, seed=seed, fluency=fluency)
    decays, files = {}, {}
    for name, maker in makers.items():
        decays[name] = sequential_decay(lm, maker, edits, scorer, watch, counts, folder, report)
        if folder is not None:
            files[name] = kept_at(lm, maker, edits, scorer, watch, counts, folder)
    return decays, files


def _tell_decays(
    decays: Mapping[str, Decay],
    files: Mapping[str, Path],
    rule: Rule,
    data: str,
    folder: Path | None,
    *,
    as_json: bool,
) -> None:
    pictures: list[Path] = []
    if folder is not None:
        from factpatch.report.decay import decay_pictures, decay_rows
        from factpatch.report.picture import save_picture, save_table

        save_table(folder / "decay.csv", decay_rows(decays))
        pictures += [save_picture(folder, p.name, p.svg, p.rows) for p in decay_pictures(decays, rule)]
    if as_json:
        written = {} if folder is None else {"table": str(folder / "decay.csv"), "pictures": [str(p) for p in pictures]}
        print_json(
            [
                _decay_json(decay, rule, data) | ({"kept": str(files[name])} if name in files else {}) | written
                for name, decay in decays.items()
            ]
        )
    else:
        for name, decay in decays.items():
            _show_decay(name, decay, data)
        _show_breaks(decays, rule)
        if folder is not None:
            line((f"Pictures, each with its numbers beside it: {folder}", "dim"))
    for name, decay in decays.items():
        for edit, reason in decay.refused.items():
            err.print(Text(f"not made by {name}: ", style="yellow") + Text(f"{edit}: {reason}"), soft_wrap=True)
    if any(not decay.checkpoints for decay in decays.values()):
        raise typer.Exit(1)


def _decay_json(decay: Decay, rule: Rule, data: str) -> dict[str, Any]:
    from factpatch.analysis.decay import breaks

    about = decay.model_dump(mode="json", exclude={"at_edit", "checkpoints", "refused"})
    return about | {
        "dataset": data,
        "points": {p: [point.model_dump(mode="json") for point in decay.points(p)] for p in decay.protocols},
        "ages": {
            p: [
                {"patches": checkpoint.patches, "bins": [one.model_dump(mode="json") for one in decay.ages(p, i)]}
                for i, checkpoint in enumerate(decay.checkpoints)
            ]
            for p in decay.protocols
        },
        "vitals": [{"patches": c.patches, **c.vitals.model_dump(mode="json")} for c in decay.checkpoints],
        "rule": rule.says(),
        "breaks": {p: [one.model_dump(mode="json") for one in breaks(decay, rule, p)] for p in decay.protocols},
        "not_made": [{"edit": edit, "reason": reason} for edit, reason in decay.refused.items()],
    }


def _show_decay(name: str, decay: Decay, data: str) -> None:
    line((name, "bold"), f" on {data}, {counted(decay.units, 'patch', 'patches')} asked for, {decay.model}")
    if not decay.checkpoints:
        return
    scores = ("at_edit", "at_end", "rephrase", "portability", "locality", "fluency")
    _table(
        ("protocol", ">patches", *(f">{name.replace('_', ' ')}" for name in scores)),
        [
            (
                "" if i else protocol,
                _asked(point.patches, point.edits),
                *(number(getattr(point, name)) for name in scores),
            )
            for protocol in decay.protocols
            for i, point in enumerate(decay.points(protocol))
        ],
    )
    _table(
        ("model", ">patches", ">perplexity ratio", ">weights moved by", ">guard right", ">canary facts"),
        [
            _vitals("unedited", "0", decay.unedited),
            *(
                _vitals("", _asked(checkpoint.patches, sum(map(len, checkpoint.made))), checkpoint.vitals)
                for checkpoint in decay.checkpoints
            ),
        ],
    )
    for protocol in decay.protocols:
        bins = ", ".join(
            f"{one.youngest if one.youngest == one.oldest else f'{one.youngest} to {one.oldest}'}: {number(one.now, 2)}"
            for one in decay.ages(protocol)
        )
        line((f"{protocol}, success at the end by patches made since: {bins}", "dim"))


def _vitals(name: str, patches: str, vitals: Vitals) -> tuple[str, ...]:
    """A row of the model's table. Canary facts are the questions of which something could be lost."""
    asked = len(vitals.canaries)
    return (
        name,
        patches,
        number(vitals.perplexity_ratio, 2),
        number(vitals.norm, 4),
        "–" if vitals.right is None else f"{vitals.right} of {len(vitals.questions)}",
        f"{asked - vitals.canaries_lost} of {asked}" if asked else "–",
    )


def _asked(patches: int, edits: int) -> str:
    """How many patches were asked for, and how many edits were made where that is another number."""
    return str(patches) if edits == patches else f"{patches} ({counted(edits, 'edit')})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = new_table(*columns)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _show_breaks(decays: Mapping[str, Decay], rule: Rule) -> None:
    from factpatch.analysis.decay import breaks

    line(("Where each one breaks", "bold"))
    for name, decay in decays.items():
        if not decay.checkpoints:
            line(f"  {name}: no edit was made")
            continue
        found = breaks(decay, rule, decay.protocols[0])
        if not found:
            line(f"  {name}: not within {counted(decay.checkpoints[-1].patches, 'patch', 'patches')}")
        for one in found:
            line(f"  {name}: between {one.after} and {counted(one.at, 'patch', 'patches')}: {one.says}")
    line((rule.says(), "dim"))


def _watch(
    lm: BaseLM,
    makers: Mapping[str, Method[Any]],
    edits: Sequence[Edit],
    watch: Monitor,
    every: int,
    folder: Path | None,
    report: Progress,
) -> dict[str, Watched]:
    """Each method's sequence, and its good patches on disk as soon as it is over."""
    from factpatch.analysis.health import edit_until_sick

    found = {}
    for name, maker in makers.items():
        found[name] = edit_until_sick(lm, maker, edits, every=every, monitor=watch, progress=report)
        if folder is not None:
            for place, patch in _places(folder / name, found[name]):
                patch.save(place)
    return found


def _places(folder: Path, watched: Watched) -> list[tuple[Path, Any]]:
    """Where each good patch goes: numbered, so that a shell lists them in the order in which they are laid on."""
    names = [re.sub(r"[^\w.-]+", "_", ids[0])[:40] for ids in watched.edits]
    return [
        (folder / f"{i:04d}-{name}", patch)
        for i, (name, patch) in enumerate(zip(names, watched.patches, strict=True), 1)
    ]


def _check_places(folder: Path, names: Mapping[str, Any]) -> None:
    from factpatch.files import check_output, make_folder

    make_folder(folder)
    for name in names:
        check_output(folder / name)


def _tell_watched(found: Mapping[str, Watched], folder: Path | None, model: str, *, as_json: bool) -> None:
    if as_json:
        print_json([_watched_json(name, watched, folder) for name, watched in found.items()])
    else:
        for name, watched in found.items():
            _show_watched(name, watched, folder, model)
    for name, watched in found.items():
        for failure in watched.failures:
            err.print(Text(f"not made by {name}: ", style="yellow") + Text(failure.reason), soft_wrap=True)
        if unseen := watched.verdict.unmeasured:
            err.print(
                Text(f"not watched with {name}: ", style="yellow")
                + Text(
                    f"{', '.join(unseen)}. The model cannot be measured so, or answers none of the questions rightly."
                ),
                soft_wrap=True,
            )
    if any(watched.stopped_early for watched in found.values()):
        raise typer.Exit(1)


def _watched_json(name: str, watched: Watched, folder: Path | None) -> dict[str, Any]:
    return {
        "method": name,
        "stopped_early": watched.stopped_early,
        "good": len(watched.patches),
        "asked": watched.units,
        "edits": [edit for ids in watched.edits for edit in ids],
        "culprit": list(watched.culprit),
        "verdict": watched.verdict.model_dump(mode="json"),
        "checks": [{"patches": check.patches, **check.verdict.model_dump(mode="json")} for check in watched.checks],
        "patches": [str(place) for place, _ in _places(folder / name, watched)] if folder is not None else [],
        "not_made": [{"edit": failure.edit, "reason": failure.reason} for failure in watched.failures],
    }


def _show_watched(name: str, watched: Watched, folder: Path | None, model: str) -> None:
    if watched.stopped_early:
        which = f", sick with {', '.join(watched.culprit)}" if watched.culprit else ", sick before any edit"
        line(
            (name, "bold"),
            f": stopped after {len(watched.patches)} of {counted(watched.units, 'patch', 'patches')}{which}",
        )
    else:
        line((name, "bold"), f": healthy with all of {counted(len(watched.patches), 'patch', 'patches')} made")
    line(f"  {watched.verdict.reason}")
    line(
        ("  canaries: the share left of the questions that the unedited model answers rightly, the canary facts", "dim")
    )
    table = new_table(">patches", *(f">{sign.name} (limit {sign.limit:g})" for sign in watched.verdict.signs))
    for check in watched.checks:
        values = [Text(number(s.value, 4), style="" if s.healthy else "red") for s in check.verdict.signs]
        table.add_row(str(check.patches), *values)
    out.print(table)
    if folder is not None and watched.patches:
        merge = f"{typed('patch', 'merge', folder / name)}/* {shlex.join(['-m', model])} --out MODEL"
        line((f"Good patches, in order: {folder / name}. Merge them: {merge}", "dim"))
