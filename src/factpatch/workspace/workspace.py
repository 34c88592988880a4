"""`Workspace`: a base model, a gate, and the patches that were let through it, in an order that is written down."""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast

from factpatch.edits import Edit, Probe
from factpatch.errors import BadPatch, PatchError, UnknownModel, WrongBase
from factpatch.files import sha256_of, whole_folder
from factpatch.gate import AutoChoice, Gate, Judgement, Requirement, choose
from factpatch.gate.auto import Attempt, attempt
from factpatch.lm import LM, load
from factpatch.lm.load import DTypeName
from factpatch.lm.model import checksum
from factpatch.methods import create
from factpatch.patches import Patch, merge
from factpatch.patches.merge import check_mergeable
from factpatch.progress import Progress, silent
from factpatch.workspace.conflicts import Conflict, Standing, conflicts
from factpatch.workspace.difference import Difference, difference
from factpatch.workspace.entry import Entry, Place, Regression
from factpatch.workspace.ledger import Ledger
from factpatch.workspace.review import edits_lost, losses, summary_of
from factpatch.workspace.store import Pending, Settings, Store
from factpatch.workspace.verify import CHECKOUT, Report, verify

__all__ = ["Outcome", "Workspace"]

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a proposal, an accept or a revert.

    refused      why nothing was changed; empty if it was done
    proposal     what waits now
    entry        what was written into the ledger
    choice       how the patch was made and judged
    judgement    what the gate said, of a patch that was judged again
    conflicts    with what lies there
    regressions  what other patches lose by it, or would
    """

    refused: str = ""
    proposal: Pending | None = None
    entry: Entry | None = None
    choice: AutoChoice | None = None
    judgement: Judgement | None = None
    conflicts: tuple[Conflict, ...] = ()
    regressions: tuple[Regression, ...] = ()

    @property
    def done(self) -> bool:
        """Whether it was done."""
        return not self.refused


class Workspace:
    """A folder with a ledger of patches for one base model.

    The model is loaded when it is first needed. It is never changed: patches lie on it only while they are asked about, and
    what the user has laid on it does not count.
    """

    def __init__(self, store: Store, settings: Settings, lm: LM | None, device: str | None) -> None:
        self.store, self.settings = store, settings
        self._lm, self._device = lm, device

    @classmethod
    def init(
        cls,
        folder: str | Path,
        model: str | Path | LM,
        requirements: Sequence[str] = ("edit_success>=1",),
        *,
        proposes: bool = True,
        chat: bool = False,
        retain: Sequence[Probe] = (),
        method: str = "rome",
        config: Mapping[str, Any] | None = None,
        dtype: DTypeName | None = None,
        device: str | None = None,
        author: str | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Make a workspace of a new or empty folder.

        model         where the base model comes from, or the model in hand, whose name must then be where it comes from
        requirements  what each patch must show; see `Requirement.parse`
        proposes      whether probes are made up for edits that have none
        retain        questions that must be answered as before
        method, config  how edits are made unless it is said; "auto" for the cheapest method that passes

        Raises OutputError if the folder holds something, BadConfig, UnknownMethod, and what loading the model raises.
        """
        gate = Gate.of(*requirements, retain=retain, proposes=proposes, chat=chat)
        if method != AUTO:
            create(method, config)
        if isinstance(model, LM):
            lm, source = model, model.name
        else:
            lm, source = load(model, dtype=dtype, device=device, progress=progress), str(model)
        path = Path(source).expanduser()
        settings = Settings(
            model=str(path.absolute()) if path.exists() else source,
            fingerprint=lm.fingerprint,
            shape=lm.shape,
            dtype=cast("DTypeName", str(lm.dtype).removeprefix("torch.")),
            requirements=tuple(str(need) for need in gate.requirements),
            proposes=proposes,
            chat=chat,
            retain=gate.retain,
            method=method,
            config=dict(config or {}),
            created=_now(),
        )
        store = Store(Path(folder))
        first = Entry(number=1, action="init", author=_author(author), time=settings.created, previous="")
        store.create(settings, first)
        return cls(store, settings, lm, device)

    @classmethod
    def open(cls, folder: str | Path = ".", lm: LM | None = None, *, device: str | None = None) -> Self:
        """A workspace that is there.

        lm  the base model, if it is in hand already

        Raises PatchError if it is none, or its settings are damaged; WrongBase for another model.
        """
        store = Store(Path(folder))
        settings = store.settings()
        first = store.ledger().entries[:1]
        damage = store.differing(first[0].files) if first and first[0].number == 1 else []
        if damage:
            raise PatchError(f"{store.folder / damage[0].path}: {damage[0].problem}.\n  Put the file back from a copy.")
        if lm is not None:
            _check_base(settings, lm)
        return cls(store, settings, lm, device)

    @property
    def gate(self) -> Gate:
        """What a patch has to pass."""
        own = self.settings
        needs = tuple(Requirement.parse(text) for text in own.requirements)
        return Gate(needs, proposes=own.proposes, retain=own.retain, chat=own.chat)

    def model(self, progress: Progress = silent) -> LM:
        """The base model. Raises what loading raises, and WrongBase if it is not the one the workspace was made with."""
        if self._lm is None:
            own = self.settings
            try:
                lm = load(own.model, dtype=own.dtype, device=self._device, progress=progress)
            except UnknownModel as error:
                raise UnknownModel(f"{error}\n  The workspace was made with it: {self.store.folder}") from error
            _check_base(own, lm)
            self._lm = lm
        return self._lm

    def log(self) -> Ledger:
        """All entries that can be read, and which files cannot."""
        return self.store.ledger()

    def proposals(self) -> tuple[Pending, ...]:
        """Those that wait to be accepted and can be read."""
        return tuple(self.store.proposals()[0])

    def stack(self, at: int | None = None) -> tuple[Patch, ...]:
        """The patches that lie on the model after entry `at`, by default the last. Raises PatchError, BadPatch."""
        ledger = self.log()
        return tuple(standing.patch for standing in self._standing(ledger, ledger.stack(at)))

    def _standing(self, ledger: Ledger, places: Sequence[Place]) -> list[Standing]:
        return [Standing(place.number, self.store.patch(ledger, place.patch)) for place in places]

    def propose(
        self,
        edits: Sequence[Edit],
        method: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        allow_conflicts: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """Make a patch on top of the stack and ask the gate; one that is let through waits to be accepted.

        method, config   by default the workspace's; "auto" for the cheapest that passes
        allow_conflicts  do so even if an edit is there already, or contradicts or takes back one that is

        Raises what making the patch raises, PatchError, OutputError.
        """
        ledger = self.log()
        stack = self._standing(ledger, ledger.stack())
        found = conflicts(stack, edits)
        if refused := _blocked(found, allow_conflicts=allow_conflicts):
            return Outcome(refused, conflicts=found)
        lm = self.model(progress)
        given = config if config is not None or method is not None else self.settings.config
        with lm.unpatched(), lm.patched(*(standing.patch for standing in stack)):
            choice = self._make(lm, edits, method or self.settings.method, given or {}, progress)
        return self._kept(ledger, stack, choice, allow_conflicts, author, message, progress)

    def propose_patch(
        self,
        patch: Patch,
        *,
        allow_conflicts: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """The same with a patch that was made elsewhere. Raises WrongBase for one of another model."""
        ledger = self.log()
        stack = self._standing(ledger, ledger.stack())
        lm = self.model(progress)
        patch.check_base(lm)
        found = conflicts(stack, patch.provenance.edits, patch)
        if refused := _blocked(found, allow_conflicts=allow_conflicts):
            return Outcome(refused, conflicts=found)
        with lm.unpatched(), lm.patched(*(standing.patch for standing in stack)):
            judgement = self.gate.judge(lm, patch.provenance.edits, patch, progress)
        choice = AutoChoice((Attempt(patch.provenance.method, judgement),), patch if judgement.passed else None)
        return self._kept(ledger, stack, choice, allow_conflicts, author, message, progress)

    def _make(
        self, lm: LM, edits: Sequence[Edit], method: str, config: Mapping[str, Any], progress: Progress
    ) -> AutoChoice:
        """A patch for the model as it stands, and what the gate says."""
        own = dict(config) | ({"chat": True} if self.settings.chat else {})
        if method == AUTO:
            return choose(lm, edits, self.gate, settings=own, progress=progress)
        return attempt(lm, edits, self.gate, create(method, own), progress)

    def _kept(
        self,
        ledger: Ledger,
        stack: Sequence[Standing],
        choice: AutoChoice,
        allow_conflicts: bool,
        author: str | None,
        message: str,
        progress: Progress,
    ) -> Outcome:
        patch, judgement = choice.patch, choice.judgement
        if patch is None or judgement is None:
            told = choice.attempts[0].says if len(choice.attempts) == 1 else choice.says
            return Outcome(f"the gate: {told}", choice=choice)
        edits = patch.provenance.edits
        found = conflicts(stack, edits, patch)
        patch = patch.with_scorecard(judgement.record())
        pending = Pending(
            number=1,
            on=ledger.head.hash,
            author=_author(author),
            time=_now(),
            message=message,
            patch=patch.id,
            method=patch.provenance.method,
            edits=tuple((edit.prompt, edit.target) for edit in edits),
            scores=summary_of(judgement.scorecard),
            judgement=_finite(judgement.to_json()),
            conflicts=found if allow_conflicts else tuple(each for each in found if not each.blocks),
        )
        with self.store.writing(progress) as now:
            kept = self.store.propose(now, pending, patch)
        return Outcome(proposal=kept, choice=choice, conflicts=found)

    def accept(
        self,
        number: int,
        *,
        allow_conflicts: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """Lay a proposal on the stack for good.

        If the stack is another than it was made on, it is judged again there, and may be refused. Edits of earlier patches
        are asked again; what they lose is written into the entry. Conflicts that were not allowed when it was proposed have
        to be allowed now. Raises PatchError, BadPatch, OutputError.
        """
        lm = self.model(progress)
        with self.store.writing(progress) as ledger:
            pending, patch = self.store.proposal(number)
            stack = self._standing(ledger, ledger.stack())
            beneath = [standing.patch for standing in stack]
            found = conflicts(stack, patch.provenance.edits, patch)
            new = [each for each in found if each not in pending.conflicts]
            if refused := _blocked(new, allow_conflicts=allow_conflicts):
                return Outcome(refused, proposal=pending, conflicts=found)
            scores, judgement = pending.scores, None
            if pending.on != ledger.head.hash:
                with lm.unpatched(), lm.patched(*beneath):
                    judgement = self.gate.judge(lm, patch.provenance.edits, patch, progress)
                scores, patch = summary_of(judgement.scorecard), patch.with_scorecard(judgement.record())
                if not judgement.passed:
                    failed = "; ".join(finding.says for finding in judgement.verdict.failed)
                    told = f"the gate, asked again since the stack has changed: {failed}"
                    return Outcome(told, proposal=pending, judgement=judgement, conflicts=found)
            lost = losses(lm, beneath, [*beneath, patch], stack, chat=self.settings.chat, progress=progress)
            entry = self._entry(
                ledger, "accept", author, message or pending.message, patch=patch.id, proposal=number, scores=scores
            )
            entry = self.store.commit(ledger, entry.model_copy(update={"regressions": lost}), (patch,))
        return Outcome(entry=entry, proposal=pending, judgement=judgement, conflicts=found, regressions=lost)

    def revert(
        self,
        number: int,
        *,
        refit: bool = False,
        force: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """Take out the patch that entry `number` brought in, wherever in the stack it lies.

        Edits of later patches are asked without it. If one is lost the revert is refused, unless it can be made anew
        (`refit`: each patch that lost one, in order, before the gate), or shall be lost (`force`: it is written into the
        entry). Of a patch that is damaged, and so cannot be laid on, later edits count as answered rightly until now.
        Raises PatchError, BadPatch, OutputError.
        """
        lm = self.model(progress)
        with self.store.writing(progress) as ledger:
            places = ledger.stack()
            at = _find(ledger, places, number)
            try:
                lost, made, refused = self._without(lm, ledger, places, at, progress, refit=refit)
            except BadPatch:
                if not force:
                    raise
                lost, made, refused = (), {}, ""  # others are damaged too: nothing can be asked
            if refused and not force:
                return Outcome(refused, regressions=lost)
            entry = self._entry(ledger, "revert", author, message, patch=places[at].patch, reverts=number)
            update = {"regressions": lost, "replaced": {old: new.id for old, new in made.items()}}
            entry = self.store.commit(ledger, entry.model_copy(update=update), tuple(made.values()))
        return Outcome(entry=entry, regressions=lost)

    def _without(
        self, lm: LM, ledger: Ledger, places: Sequence[Place], at: int, progress: Progress, *, refit: bool
    ) -> tuple[tuple[Regression, ...], dict[str, Patch], str]:
        """What later patches lose without the one at `at`; those made anew, by the id each had; and what speaks against it."""
        below, later = self._standing(ledger, places[:at]), self._standing(ledger, places[at + 1 :])
        try:
            own = self.store.patch(ledger, places[at].patch)
            before = [*(each.patch for each in below), own, *(each.patch for each in later)]
        except BadPatch:
            before = None
        watch = _Watch(lm, before, self.settings.chat, progress)
        lost = watch.lost(below, later)
        if not edits_lost(lost):
            return lost, {}, ""
        if not refit:
            return lost, {}, _depends(edits_lost(lost))
        after: list[Standing] = []
        made: dict[str, Patch] = {}
        for each in later:
            if not edits_lost(watch.lost([*below, *after], [each])):
                after.append(each)
                continue
            source = each.patch.provenance
            with lm.unpatched(), lm.patched(*(standing.patch for standing in [*below, *after])):
                choice = self._make(lm, source.edits, source.method, source.config, progress)
            if choice.patch is None or choice.judgement is None:
                return lost, {}, f"entry {each.number} cannot be made anew without it: {choice.attempts[0].says}"
            made[each.patch.id] = choice.patch.with_scorecard(choice.judgement.record())
            after.append(Standing(each.number, made[each.patch.id]))
        still = watch.lost(below, after)
        if edits_lost(still):
            return lost, {}, f"even made anew, {_depends(edits_lost(still))}"
        return still, made, ""

    def checkout(self, out: str | Path, at: int | None = None, progress: Progress = silent) -> Path:
        """Write the model as it is after entry `at`, as a plain checkpoint, with `checkout.json` that says what it is.

        Raises PatchError for a patch that is no change of weights, BadPatch, OutputError.
        """
        ledger = self.log()
        entry, patches = ledger.up_to(at)[-1], self.stack(at)
        check_mergeable(patches)
        lm = self.model(progress)
        progress("Writing the checkpoint", 0, 1)
        with lm.unpatched(), whole_folder(Path(out)) as draft:
            merge(lm, patches, draft)
            with lm.patched(*patches):
                weights = checksum(lm.model)
            described = {
                "format": 1,
                "entry": entry.number,
                "hash": entry.hash,
                "model": self.settings.model,
                "fingerprint": self.settings.fingerprint,
                "dtype": self.settings.dtype,
                "patches": [patch.id for patch in patches],
                "weights_sha256": weights,
                "files": {path.name: sha256_of(path) for path in sorted(draft.iterdir()) if path.is_file()},
            }
            (draft / CHECKOUT).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        progress("Writing the checkpoint", 1, 1)
        return Path(out)

    def diff(self, a: int, b: int | None = None, *, ask: bool = True, progress: Progress = silent) -> Difference:
        """What is different after entry `b`, by default the last, from after entry `a`.

        ask  whether the model is asked the edits that differ, and its weights are compared
        """
        ledger = self.log()
        ends = [self._standing(ledger, ledger.stack(at)) for at in (a, b)]
        last = ledger.up_to(b)[-1].number
        return difference((a, ends[0]), (last, ends[1]), self.model(progress) if ask else None, chat=self.settings.chat)

    def verify(self, model_folder: str | Path | None = None, progress: Progress = silent) -> Report:
        """Whether all that the ledger says is there and as it was written.

        model_folder  a checkpoint, made by `checkout`: whether the stack on disk gives exactly its weights
        """
        if model_folder is None:
            return verify(self.store)
        return verify(self.store, Path(model_folder), self.model(progress), device=self._device, progress=progress)

    def _entry(self, ledger: Ledger, action: Any, author: str | None, message: str, **more: Any) -> Entry:
        """A draft of the next entry; the store numbers and seals it."""
        return Entry(
            number=ledger.last + 1,
            action=action,
            author=_author(author),
            time=_now(),
            message=message,
            previous=ledger.head.hash,
            **more,
        )


@dataclass(frozen=True, slots=True)
class _Watch:
    """What patches lose against the stack `before`; None if that cannot be laid on."""

    lm: LM
    before: Sequence[Patch] | None
    chat: bool
    progress: Progress

    def lost(self, below: Sequence[Standing], later: Sequence[Standing]) -> tuple[Regression, ...]:
        """By `later` patches, with these alone on the model."""
        after = [each.patch for each in [*below, *later]]
        return losses(self.lm, self.before, after, later, chat=self.chat, progress=self.progress)


def _find(ledger: Ledger, places: Sequence[Place], number: int) -> int:
    """Where in the stack the patch of an entry lies."""
    for i, place in enumerate(places):
        if place.number == number:
            return i
    entry = next((entry for entry in ledger.entries if entry.number == number), None)
    back = next((entry.number for entry in ledger.entries if entry.reverts == number), None)
    if entry is None:
        raise PatchError(f"entry {number}: there is none.\n  See them: factpatch log")
    if back is not None:
        raise PatchError(f"entry {number}: was reverted already, by entry {back}.")
    raise PatchError(
        f"entry {number}: brought no patch in ({entry.action}), so that there is nothing to take out.\n"
        "  Name the entry of an accepted patch: factpatch list"
    )


def _blocked(found: Sequence[Conflict], *, allow_conflicts: bool) -> str:
    """Why conflicts stand in the way, or an empty text."""
    blocking = [each for each in found if each.blocks]
    if allow_conflicts or not blocking:
        return ""
    more = f" (and {len(blocking) - 1} more)" if blocking[1:] else ""
    return f"{blocking[0].says}{more}"


def _depends(lost: Sequence[Regression]) -> str:
    more = f" (and {len(lost) - 1} more)" if lost[1:] else ""
    return f"a later patch depends on it: {lost[0].says}{more}"


def _check_base(settings: Settings, lm: LM) -> None:
    if lm.fingerprint != settings.fingerprint:
        raise WrongBase(
            f"the workspace was made with {settings.model} ({settings.fingerprint[:8]}…), the model in hand is {lm.name} "
            f"({lm.fingerprint[:8]}…).\n  Load the model it was made with."
        )
    if str(lm.dtype).removeprefix("torch.") != settings.dtype:
        raise WrongBase(
            f"the workspace was made with weights in {settings.dtype}, those in hand are in {lm.dtype}.\n"
            "  Load the model in the same type: what a patch gives depends on it to the bit."
        )


def _author(named: str | None) -> str:
    if named:
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """JSON without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value - value != 0 else value
