"""Sequential decay: what becomes of earlier edits, and of all else, while more are made and all are kept.

Forgetting is gradual first, then catastrophic (Gupta et al. 2024, arXiv 2401.07453); where it turns differs from method to
method, so that a rule says it and not an eye.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, ValidationError

from factpatch.analysis.base import Result, digest, mean_over, packages
from factpatch.analysis.health import Copies, Monitor, Vitals
from factpatch.bench import Mode, Outcome
from factpatch.bench.outcome import AT_EDIT, Moment
from factpatch.bench.sequence import one_after_another
from factpatch.edits import Edit
from factpatch.errors import BadFile
from factpatch.files import locked, make_folder, whole_file
from factpatch.lm import LM, BaseLM
from factpatch.methods import Method
from factpatch.patches import Patch
from factpatch.progress import Progress, silent
from factpatch.scoring import ProtocolName, Scorecard, Scorer, ScoreRole

__all__ = ["AGES", "AT", "AgeBin", "Break", "Decay", "Look", "Point", "Rule", "breaks", "kept_at", "sequential_decay"]

AT = (1, 3, 10, 30, 100, 300, 1000)
"""After how many patches all edits so far are scored, by default."""
AGES = (0, 1, 3, 10, 30, 100, 300, 1000)
"""Where bins of ages begin. An edit's age is the number of patches made after its own."""

_SCORED: tuple[ScoreRole, ...] = ("edit", "rephrase", "portability", "locality", "fluency")

Scores = Mapping[ProtocolName, Mapping[ScoreRole, Mapping[str, float]]]
"""By protocol, role and id of the edit; edits for which nothing could be scored are left out."""


class Look(Result):
    """The model after so many patches.

    patches  how many were asked for by then, those that the method refused among them
    made     ids of the edits made by then, by patch
    scores   of all of them, at that point
    vitals   of the model, at that point
    """

    patches: int
    made: tuple[tuple[str, ...], ...]
    scores: Scores
    vitals: Vitals


class Point(Result):
    """One checkpoint under one protocol; None where nothing could be scored.

    patches  how many were asked for by then
    edits    how many were made by then
    at_edit  success of these edits, each right after it was made
    at_end   success of the same edits at this point; all below are of the same edits and this point too
    """

    patches: int
    edits: int
    at_edit: float | None
    at_end: float | None
    rephrase: float | None
    portability: float | None
    locality: float | None
    fluency: float | None


class AgeBin(Result):
    """Edits of like age at one checkpoint.

    youngest, oldest  age, in patches made since; `oldest` is the bin's own end, not that of the edits in it
    edits             how many could be scored
    at_edit, now      success of these edits right after each was made, and at the checkpoint
    """

    youngest: int
    oldest: int
    edits: int
    at_edit: float | None
    now: float | None


class Decay(Result):
    """A sequence with one method.

    config       the method's full settings on this model
    units        how many patches were asked for
    at_edit      scores of each edit right after it was made
    checkpoints  in order of the number of patches; none if the method refused all edits
    unedited     the vitals of the model without patches
    refused      by id of the edit, why the method would not make it
    fit_seconds, score_seconds  wall time of making the patches, and of scoring them
    packages     versions of those that decide the numbers
    """

    method: str
    config: dict[str, Any]
    model: str
    fingerprint: str
    units: int
    at_edit: Scores
    checkpoints: tuple[Look, ...]
    unedited: Vitals
    refused: dict[str, str]
    fit_seconds: float
    score_seconds: float
    packages: dict[str, str]

    @property
    def protocols(self) -> tuple[ProtocolName, ...]:
        """Those it was scored under, `open` first."""
        return tuple(self.at_edit)

    def points(self, protocol: ProtocolName) -> tuple[Point, ...]:
        """The numbers at each checkpoint."""
        return tuple(self._point(checkpoint, protocol) for checkpoint in self.checkpoints)

    def _point(self, look: Look, protocol: ProtocolName) -> Point:
        ids = [edit for patch in look.made for edit in patch]
        now = {role: mean_over(values, ids) for role, values in look.scores.get(protocol, {}).items()}
        return Point(
            patches=look.patches,
            edits=len(ids),
            at_edit=mean_over(self.at_edit.get(protocol, {}).get("edit", {}), ids),
            at_end=now.get("edit"),
            **{role: now.get(role) for role in _SCORED if role != "edit"},
        )

    def ages(self, protocol: ProtocolName, checkpoint: int = -1, bounds: Sequence[int] = AGES) -> tuple[AgeBin, ...]:
        """Success by the edits' age at one checkpoint, by default the last; bins without edits are left out.

        bounds  where the bins begin, from 0 upwards; the last one has no end
        """
        if not self.checkpoints:
            return ()
        at = self.checkpoints[checkpoint]
        first, now = (scores.get(protocol, {}).get("edit", {}) for scores in (self.at_edit, at.scores))
        found = []
        for i, youngest in enumerate(bounds):
            end = bounds[i + 1] if i + 1 < len(bounds) else max(len(at.made), youngest + 1)
            # The patch at place p has len(made) - 1 - p others after it.
            patches = at.made[max(0, len(at.made) - end) : max(0, len(at.made) - youngest)]
            ids = [edit for patch in patches for edit in patch if edit in now]
            if ids:
                had, has = mean_over(first, ids), mean_over(now, ids)
                found.append(AgeBin(youngest=youngest, oldest=end - 1, edits=len(ids), at_edit=had, now=has))
        return tuple(found)


BreakKind = Literal["success", "perplexity", "canaries"]


class Rule(Result):
    """When a method has broken: any of these, at the first checkpoint where it holds."""

    min_success: float = Field(
        default=0.5, ge=0, le=1, description="success at end, as a share of the same edits' success at edit"
    )
    max_perplexity: PositiveFloat = Field(
        default=2.0, description="perplexity on neutral texts, as a multiple of the unedited model's"
    )
    min_canaries: float = Field(
        default=0.5, ge=0, le=1, description="share of what the unedited model knew of the guard's questions"
    )

    def says(self) -> str:
        """The rule in a sentence."""
        return (
            f"Broken at the first checkpoint where the success of all edits so far is under {self.min_success:g} times what "
            f"it was right after each was made, or perplexity on neutral texts above {self.max_perplexity:g} times the "
            f"unedited model's, or under {self.min_canaries:g} of the canary facts are left: the questions that the unedited "
            "model answers rightly, or, where no right answer is known, whatever it says."
        )


class Break(Result):
    """That a method broke: found so after `at` patches, and not yet after `after`, the checkpoint before (0: unedited)."""

    kind: BreakKind
    at: int
    after: int
    value: float
    limit: float
    says: str


def breaks(decay: Decay, rule: Rule | None = None, protocol: ProtocolName = "open") -> tuple[Break, ...]:
    """Where each part of the rule first holds, the earliest first; empty if none ever does. Success is of one protocol.

    A value that is not a number has broken; one that could not be measured has not.
    """
    rule = rule or Rule()
    found: dict[BreakKind, Break] = {}
    before = 0
    for checkpoint, point in zip(decay.checkpoints, decay.points(protocol), strict=True):
        had, has = point.at_edit, point.at_end
        tests: tuple[_Test, ...] = (
            _Test("success", has / had if had and has is not None else None, at_least=rule.min_success),
            _Test("perplexity", checkpoint.vitals.perplexity_ratio, at_most=rule.max_perplexity),
            _Test("canaries", checkpoint.vitals.canaries_kept, at_least=rule.min_canaries),
        )
        for test in tests:
            if not test.passed:
                found.setdefault(test.kind, test.broken(checkpoint.patches, before))
        before = checkpoint.patches
    order = get_args(BreakKind)
    return tuple(sorted(found.values(), key=lambda one: (one.at, order.index(one.kind))))


@dataclass(frozen=True, slots=True)
class _Test:
    """One part of the rule at one checkpoint."""

    kind: BreakKind
    value: float | None
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def passed(self) -> bool:
        return self.value is None or self.at_least <= self.value <= self.at_most

    def broken(self, at: int, after: int) -> Break:
        assert self.value is not None
        limit = self.at_least if math.isfinite(self.at_least) else self.at_most
        return Break(
            kind=self.kind, at=at, after=after, value=self.value, limit=limit, says=_SAYS[self.kind].format(self.value)
        )


_SAYS: Mapping[BreakKind, str] = {
    "success": "success at end is {:.3g} times that at edit",
    "perplexity": "perplexity is {:.3g} times that of the unedited model",
    "canaries": "a share of {:.3g} of the canary facts is left",
}


def sequential_decay(
    lm: BaseLM,
    method: Method[Any],
    edits: Sequence[Edit],
    scorer: Scorer,
    monitor: Monitor,
    checkpoints: Collection[int] = AT,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Decay:
    """Make edits one after the other, keep all, and look at them and at the model on the way; afterwards it is as it was.

    checkpoints  after how many patches to look; always after the last. A patch makes one edit, or those of one group
    folder       where the result is kept under all that decides it, and found again. There an interrupted sequence leaves
                 its patches and scores, from which it goes on

    What it costs: each patch stays on the model with a copy of the weights that it touches, so that memory grows by these
    with each edit (a matrix of 576 x 1,536 in float32: 3.5 MB, or 3.5 GB after 1,000 edits; twice that where the patch is
    dense too, and times the number of matrices). Once the first outcome is there, a warning is logged if there will be no
    room for the others. Scoring at edit holds at most 16 states more. A checkpoint asks all probes
    of all edits so far. Raises what the method raises for all edits, OutputError, and BadFile for a damaged result.
    """
    units = Mode("sequential").units(edits)
    counts = _counts(checkpoints, len(units))
    if folder is None:
        return _made(lm, method, units, scorer, monitor, counts, _Log(None), progress)
    key = _key(lm, method, edits, scorer, monitor, counts)
    path = folder / _name(method, key)
    unfinished = path.with_suffix(".unfinished")
    if path.is_file():
        return _read(path)
    with _held(unfinished):
        if path.is_file():  # another process made it meanwhile
            return _read(path)
        found = _made(lm, method, units, scorer, monitor, counts, _Log(unfinished), progress)
        with whole_file(path) as draft:
            draft.write_text(json.dumps({"key": key} | json.loads(found.model_dump_json())), encoding="utf-8")
        shutil.rmtree(unfinished, ignore_errors=True)
    return found


def kept_at(
    lm: BaseLM,
    method: Method[Any],
    edits: Sequence[Edit],
    scorer: Scorer,
    monitor: Monitor,
    checkpoints: Collection[int],
    folder: Path,
) -> Path:
    """The file in which `sequential_decay` keeps the result of the same arguments, whether it is there or not."""
    counts = _counts(checkpoints, len(Mode("sequential").units(edits)))
    return folder / _name(method, _key(lm, method, edits, scorer, monitor, counts))


def _counts(checkpoints: Collection[int], units: int) -> list[int]:
    return sorted({count for count in checkpoints if 0 < count < units} | {units})


def _name(method: Method[Any], key: Mapping[str, Any]) -> str:
    return f"{method.name}-{digest(key)[:12]}.json"


def _key(
    lm: BaseLM, method: Method[Any], edits: Sequence[Edit], scorer: Scorer, monitor: Monitor, counts: Sequence[int]
) -> dict[str, Any]:
    """All that decides the numbers, but for the packages it is built on."""
    return {
        "factpatch": version("factpatch"),
        "method": method.name,
        "config": method.resolve(lm).model_dump(mode="json"),
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch.") if isinstance(lm, LM) else "",
        "edits": digest([edit.to_json() for edit in edits]),
        "checkpoints": list(counts),
        "protocols": {protocol.name: protocol.version for protocol in scorer.protocols},
        "chat": [scorer.chat, monitor.chat],
        "seed": scorer.seed,
        "fluency": scorer.fluency,
        "canaries": digest([probe.model_dump(mode="json") for probe in monitor.canaries]),
        "texts": digest(list(monitor.texts)),
        "beneath": [patch.id for patch in lm.patches if isinstance(patch, Patch)],
    }


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time works on a sequence."""
    make_folder(folder)
    with locked(folder / "lock"):
        make_folder(folder)  # who had it before may have removed it
        yield


def _read(path: Path) -> Decay:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("key")
        return Decay.model_validate(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{path}: damaged ({str(error).splitlines()[0]}).\n  Remove it; it is made again.") from None


def _made(
    lm: BaseLM,
    method: Method[Any],
    units: Sequence[Sequence[Edit]],
    scorer: Scorer,
    monitor: Monitor,
    counts: Sequence[int],
    log: _Log,
    progress: Progress,
) -> Decay:
    method.prepare(lm, progress)
    scorer.baseline([edit for unit in units for edit in unit], progress)
    copies = Copies(lm, method.name, len(units))
    for outcome in one_after_another(lm, method, units, scorer, counts, progress, log):
        # While an outcome is told, the patches made so far lie on the model; when it is a whole sequence's, as it was scored.
        copies.look()
        log.add(outcome, monitor.vitals() if outcome.moment != AT_EDIT else None)
    rows = sorted(log.rows.values(), key=lambda row: row.number)
    at_edit = [row for row in rows if row.moment == AT_EDIT]
    made = [row for row in at_edit if not row.reason]
    names = [protocol.name for protocol in scorer.protocols]
    return Decay(
        method=method.name,
        config=method.resolve(lm).model_dump(mode="json"),
        model=lm.name,
        fingerprint=lm.fingerprint,
        units=len(units),
        at_edit={name: _joined(row.scores.get(name, {}) for row in made) for name in names},
        checkpoints=tuple(
            Look(
                patches=row.number + 1,
                made=tuple(each.edits for each in made if each.number <= row.number),
                scores=row.scores,
                vitals=row.vitals,
            )
            for row in rows
            if row.vitals is not None
        ),
        unedited=monitor.unedited(),
        refused={edit: row.reason for row in at_edit if row.reason for edit in row.edits},
        fit_seconds=round(sum(row.fit_seconds for row in rows), 3),
        score_seconds=round(sum(row.score_seconds for row in rows), 3),
        packages=packages(),
    )


def _joined(parts: Iterator[Mapping[ScoreRole, Mapping[str, float]]]) -> dict[ScoreRole, dict[str, float]]:
    whole: dict[ScoreRole, dict[str, float]] = {}
    for part in parts:
        for role, values in part.items():
            whole.setdefault(role, {}).update(values)
    return whole


def _scores(card: Scorecard | None) -> dict[ProtocolName, dict[ScoreRole, dict[str, float]]]:
    """What the card's summaries are the means of."""
    if card is None:
        return {}
    return {
        protocol: {role: found for role in _SCORED if (found := card.per_edit(protocol, role))}
        for protocol in card.versions
    }


class _Row(Result):
    """An outcome as it is kept: a number for each edit, role and protocol, not the answers."""

    moment: Moment
    number: int
    edits: tuple[str, ...]
    reason: str
    scores: Scores
    vitals: Vitals | None
    fit_seconds: float
    score_seconds: float


class _Log:
    """What is on record of a sequence: lines of JSON and patches, in a folder or in memory alone; see `Kept`.

    A process may be killed at any moment: a patch is whole before its line is written, and of a line that was cut off
    nothing is believed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows: dict[tuple[Moment, int], _Row] = {}
        if folder is None:
            return
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            found = [row for line in lines if (row := _parsed(line)) is not None]
            self.rows = {(row.moment, row.number): row for row in found}
        with whole_file(self._path) as draft:
            draft.write_text("".join(f"{row.model_dump_json()}\n" for row in self.rows.values()), encoding="utf-8")

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / "outcomes.jsonl"

    def _place(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / "patches" / f"{number:05d}"

    def add(self, outcome: Outcome, vitals: Vitals | None) -> None:
        card = outcome.card
        row = _Row(
            moment=outcome.moment,
            number=outcome.number,
            edits=outcome.edits,
            reason=outcome.reason,
            scores=_scores(card),
            vitals=vitals,
            fit_seconds=outcome.fit_seconds or 0.0,
            score_seconds=card.score_seconds if card is not None else 0.0,
        )
        self.rows[row.moment, row.number] = row
        if self.folder is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(row.model_dump_json() + "\n")

    def is_done(self, moment: Moment, number: int) -> bool:
        row = self.rows.get((moment, number))
        return row is not None and (moment != AT_EDIT or bool(row.reason) or self._place(number).is_dir())

    def patch(self, number: int) -> Patch | None:
        return None if self.rows[AT_EDIT, number].reason else Patch.load(self._place(number))

    def keep(self, number: int, patch: Patch) -> None:
        if self.folder is not None:
            patch.save(self._place(number), replace=True)


def _parsed(line: str) -> _Row | None:
    try:
        return _Row.model_validate_json(line)
    except ValidationError:
        return None
