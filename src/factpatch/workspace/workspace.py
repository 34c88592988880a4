"""`Workspace`: a base model, a gate, and the patches that were let through it, in an order that is written down."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast

from factpatch.commands import typed_in
from factpatch.edits import Edit, Probe
from factpatch.errors import BadPatch, PatchError, UnknownModel, WrongBase
from factpatch.files import json_ready, sha256_of, whole_folder
from factpatch.gate import AutoChoice, Gate, Judgement, Requirement, choose
from factpatch.gate.auto import Attempt, attempt
from factpatch.lm import LM, load
from factpatch.lm.load import DTypeName
from factpatch.lm.model import checksum
from factpatch.methods import create
from factpatch.patches import Patch, merge
from factpatch.progress import Progress, silent
from factpatch.words import counted
from factpatch.workspace.conflicts import Conflict, Standing, conflicts
from factpatch.workspace.difference import Difference, difference
from factpatch.workspace.entry import Entry, Place, Regression
from factpatch.workspace.ledger import Ledger
from factpatch.workspace.review import edits_lost, review, summary_of
from factpatch.workspace.store import Pending, Settings, Store
from factpatch.workspace.verify import CHECKOUT, Report, compare, verify

__all__ = ["Outcome", "Workspace"]

AUTO = "auto"
Watch = Callable[[Sequence[Standing], Sequence[Standing]], tuple[Regression, ...]]


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
    held         of an accept: how many edits of earlier patches were asked again and are answered rightly as before
    """

    refused: str = ""
    proposal: Pending | None = None
    entry: Entry | None = None
    choice: AutoChoice | None = None
    judgement: Judgement | None = None
    conflicts: tuple[Conflict, ...] = ()
    regressions: tuple[Regression, ...] = ()
    held: int = 0

    @property
    def done(self) -> bool:
        """Whether it was done."""
        return not self.refused

    @property
    def waiting(self) -> Pending:
        """The proposal, of one that was done. Raises PatchError that says why it was refused."""
        if self.refused or self.proposal is None:
            raise PatchError(self.refused or "this made no proposal.\n  Ask what propose or propose_patch gave.")
        return self.proposal

    @property
    def written(self) -> Entry:
        """The entry, of an accept or revert that was done. Raises PatchError that says why it was refused."""
        if self.entry is None:
            raise PatchError(self.refused or "this wrote no entry.\n  Ask what accept or revert gave.")
        return self.entry


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
        path, signed = Path(source).expanduser(), _signed(author)
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
            created=signed["time"],
        )
        store = Store(Path(folder))
        store.create(settings, Entry(number=1, action="init", previous="", **signed))
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
        if first and first[0].number == 1 and (damage := store.differing(first[0].files)):
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
        return tuple(standing.patch for standing in self.standing(self.log(), at))

    def standing(self, ledger: Ledger, at: int | None = None) -> list[Standing]:
        """The same as a ledger has it that was read before, each with the number of its entry."""
        return self._laid(ledger, ledger.stack(at))

    def readable(self, ledger: Ledger, places: Sequence[Place]) -> tuple[list[Standing], dict[Place, BadPatch]]:
        """The patches at these places that can be read; and those that are damaged, with what is wrong."""
        sound: list[Standing] = []
        damaged: dict[Place, BadPatch] = {}
        for place in places:
            try:
                sound += self._laid(ledger, [place])
            except BadPatch as error:
                damaged[place] = error
        return sound, damaged

    def _laid(self, ledger: Ledger, places: Sequence[Place]) -> list[Standing]:
        return [Standing(place.number, self.store.patch(ledger, place.patch)) for place in places]

    def propose(
        self,
        edits: Sequence[Edit],
        method: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        minutes: float | None = None,
        watch: Callable[[Attempt], None] | None = None,
        allow_conflicts: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """Make a patch on top of the stack and ask the gate; one that is let through waits to be accepted.

        method, config   by default the workspace's; "auto" for the cheapest that passes. Settings given without a method
                         go before the workspace's, setting by setting
        minutes, watch   of "auto": how long it may take, and what each attempt is told to; see `choose`
        allow_conflicts  do so even if an edit is there already, or contradicts or takes back one that is

        Raises what making the patch raises, PatchError, OutputError.
        """
        given = {**(self.settings.config if method is None else {}), **(config or {})}
        own = method or self.settings.method
        if own != AUTO:
            create(own, self._in_chat(given)).check(edits)  # before the model is loaded

        def made(lm: LM) -> AutoChoice:
            return self._make(lm, edits, own, given, progress, minutes=minutes, watch=watch)

        return self._propose(edits, None, made, author, message, progress, allow_conflicts=allow_conflicts)

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
        source = patch.provenance
        patch.check_base(self.model(progress))

        def judged(lm: LM) -> AutoChoice:
            judgement = self.gate.judge(lm, source.edits, patch, progress)
            return AutoChoice((Attempt(source.method, judgement),), patch if judgement.passed else None)

        return self._propose(source.edits, patch, judged, author, message, progress, allow_conflicts=allow_conflicts)

    def _in_chat(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a method, with the workspace's own."""
        return dict(config) | ({"chat": True} if self.settings.chat else {})

    def _make(
        self,
        lm: LM,
        edits: Sequence[Edit],
        method: str,
        config: Mapping[str, Any],
        progress: Progress,
        *,
        minutes: float | None = None,
        watch: Callable[[Attempt], None] | None = None,
    ) -> AutoChoice:
        """A patch for the model as it stands, and what the gate says."""
        own = self._in_chat(config)
        if method == AUTO:
            return choose(lm, edits, self.gate, settings=own, progress=progress, minutes=minutes, watch=watch)
        return attempt(lm, edits, self.gate, create(method, own), progress)

    def _propose(
        self,
        edits: Sequence[Edit],
        patch: Patch | None,
        choose_on: Callable[[LM], AutoChoice],
        author: str | None,
        message: str,
        progress: Progress,
        *,
        allow_conflicts: bool,
    ) -> Outcome:
        """Keep what `choose_on` gives for the model as it stands, unless conflicts or the gate speak against it."""
        ledger = self.log()
        stack = self.standing(ledger)
        found = conflicts(stack, edits, patch)
        if refused := _blocked(found, self.store.folder, allow_conflicts=allow_conflicts):
            return Outcome(refused, conflicts=found)
        lm = self.model(progress)
        with lm.unpatched(), lm.patched(*(standing.patch for standing in stack)):
            choice = choose_on(lm)
        patch, judgement = choice.patch, choice.judgement
        if patch is None or judgement is None:
            told = choice.attempts[0].says if len(choice.attempts) == 1 else choice.says
            then = (
                "" if choice.hopeless else choice.advice or "Try other settings, or another method: factpatch methods"
            )
            return Outcome(f"the gate: {told}" + (f"\n  {then}" if then else ""), choice=choice)
        found = conflicts(stack, edits, patch)
        patch = patch.with_scorecard(judgement.record())
        pending = Pending(
            number=1,
            on=ledger.head.hash,
            patch=patch.id,
            method=patch.provenance.method,
            edits=tuple((edit.prompt, edit.target) for edit in patch.provenance.edits),
            scores=summary_of(judgement.scorecard),
            judgement=json_ready(judgement.to_json()),
            conflicts=found if allow_conflicts else tuple(each for each in found if not each.blocks),
            **_signed(author, message),
        )
        with self.store.writing(progress) as now:
            kept = self.store.propose(now, pending, patch)
        return Outcome(proposal=kept, choice=choice, conflicts=found)

    def accept(
        self,
        number: int | None = None,
        *,
        allow_conflicts: bool = False,
        strict: bool = False,
        author: str | None = None,
        message: str = "",
        progress: Progress = silent,
    ) -> Outcome:
        """Lay a proposal on the stack for good; by default the only one that waits.

        strict   refuse it if an edit of an earlier patch is lost by it, but for those that it was allowed to take the place of
        message  kept below the proposal's own

        If the stack is another than it was made on, it is judged again there, and may be refused. Edits of earlier patches
        are asked again; what they lose is written into the entry. Conflicts that were not allowed when it was proposed have
        to be allowed now. Raises PatchError, BadPatch, OutputError.
        """
        lm = self.model(progress)
        with self.store.writing(progress) as ledger:
            pending, patch = self.store.proposal(ledger, number or self.store.only_waiting(ledger))
            number = pending.number
            stack = self.standing(ledger)
            beneath = [standing.patch for standing in stack]
            found = conflicts(stack, patch.provenance.edits, patch)
            new = [each for each in found if each not in pending.conflicts]
            if refused := _blocked(new, self.store.folder, allow_conflicts=allow_conflicts):
                return Outcome(refused, proposal=pending, conflicts=found)
            scores, judgement = pending.scores, None
            if pending.on != ledger.head.hash:
                with lm.unpatched(), lm.patched(*beneath):
                    judgement = self.gate.judge(lm, patch.provenance.edits, patch, progress)
                scores, patch = summary_of(judgement.scorecard), patch.with_scorecard(judgement.record())
                if not judgement.passed:
                    failed = "; ".join(finding.says for finding in judgement.verdict.failed)
                    told = f"the gate, asked again since the stack has changed: {failed}"
                    away = typed_in(self.store.folder, "discard", number)
                    told += f"\n  Make the edit anew, factpatch propose, and throw this one away: {away}"
                    return Outcome(told, proposal=pending, judgement=judgement, conflicts=found)
            asked = review(lm, beneath, [*beneath, patch], stack, chat=self.settings.chat, progress=progress)
            replaced = {(each.number, each.earlier) for each in found if each.blocks}  # which was allowed
            gone = [lost for lost in edits_lost(asked.lost) if (lost.number, lost.edit) not in replaced]
            if strict and gone:
                away = typed_in(self.store.folder, "discard", number)
                told = f"{counted(len(gone), 'earlier edit')} would be lost by it.\n  "
                told += f"To have it all the same leave out --strict; to be rid of it: {away}"
                return Outcome(told, proposal=pending, judgement=judgement, conflicts=found, regressions=asked.lost)
            entry = self.store.commit(
                ledger, [patch], action="accept", patch=patch.id, proposal=number, scores=scores,
                regressions=asked.lost, **_signed(author, "\n".join(dict.fromkeys(filter(None, (pending.message, message))))),
            )  # fmt: skip
        return Outcome(
            entry=entry,
            proposal=pending,
            judgement=judgement,
            conflicts=found,
            regressions=asked.lost,
            held=asked.held,
        )

    def discard(self, number: int, progress: Progress = silent) -> None:
        """Throw away a proposal that waits, readable or not; its number is not given again. Raises PatchError, OutputError."""
        with self.store.writing(progress) as ledger:
            self.store.discard(ledger, number)

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
        entry). Where it is damaged, and so cannot be laid on, later edits count as answered rightly until now. Where others
        are too, it takes `force`; then the sound ones alone are asked, and none is made anew.
        Raises PatchError, BadPatch, OutputError.
        """
        lm = self.model(progress)
        with self.store.writing(progress) as ledger:
            places = ledger.stack()
            at = _find(ledger, places, number, self.store.folder)
            try:
                lost, made, refused = self._without(lm, ledger, places, at, progress, refit=refit)
            except BadPatch:
                if not force:
                    raise
                below, later = (self.readable(ledger, part)[0] for part in (places[:at], places[at + 1 :]))
                lost, made, refused = self._watch(lm, None, progress)(below, later), {}, ""
            if refused and not force:
                return Outcome(refused, regressions=lost)
            entry = self.store.commit(
                ledger, made.values(), action="revert", patch=places[at].patch, reverts=number, regressions=lost,
                replaced={old: new.id for old, new in made.items()}, **_signed(author, message),
            )  # fmt: skip
        return Outcome(entry=entry, regressions=lost)

    def _without(
        self, lm: LM, ledger: Ledger, places: Sequence[Place], at: int, progress: Progress, *, refit: bool
    ) -> tuple[tuple[Regression, ...], dict[str, Patch], str]:
        """What later patches lose without the one at `at`; those made anew, by the id each had; and what speaks against it."""
        below, later = self._laid(ledger, places[:at]), self._laid(ledger, places[at + 1 :])
        try:
            own = self.store.patch(ledger, places[at].patch)
            before = [*(each.patch for each in below), own, *(each.patch for each in later)]
        except BadPatch:
            before = None
        watch = self._watch(lm, before, progress)
        lost = watch(below, later)
        if not edits_lost(lost) or not refit:
            return lost, {}, _depends(lost)
        after: list[Standing] = []
        made: dict[str, Patch] = {}
        for each in later:
            if not edits_lost(watch([*below, *after], [each])):
                after.append(each)
                continue
            source = each.patch.provenance
            with lm.unpatched(), lm.patched(*(standing.patch for standing in [*below, *after])):
                choice = self._make(lm, source.edits, source.method, source.config, progress)
            if choice.patch is None or choice.judgement is None:
                told = f"entry {each.number} cannot be made anew without it: {choice.attempts[0].says}"
                return lost, {}, f"{told}\n  Take it out too, or let its edits be lost: --force"
            made[each.patch.id] = choice.patch.with_scorecard(choice.judgement.record())
            after.append(Standing(each.number, made[each.patch.id]))
        still = watch(below, after)
        if edits_lost(still):
            return lost, {}, f"even made anew, {_depends(still)}"
        return still, made, ""

    def _watch(self, lm: LM, before: Sequence[Patch] | None, progress: Progress) -> Watch:
        """Tells what `later` patches lose with these alone on the model, against the stack `before`, as `review` has it."""

        def lost(below: Sequence[Standing], later: Sequence[Standing]) -> tuple[Regression, ...]:
            after = [each.patch for each in [*below, *later]]
            return review(lm, before, after, later, chat=self.settings.chat, progress=progress).lost

        return lost

    def checkout(self, out: str | Path, at: int | None = None, progress: Progress = silent) -> Path:
        """Write the model as it is after entry `at`, as a plain checkpoint, with `checkout.json` that says what it is.

        Raises PatchError for a patch that is no change of weights, BadPatch, OutputError.
        """
        ledger = self.log()
        entry, patches = ledger.up_to(at)[-1], self.mergeable(ledger, at)
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

    def mergeable(self, ledger: Ledger, at: int | None = None) -> list[Patch]:
        """As `standing`, of patches that can be merged into weights. Raises PatchError, naming the entry, if one cannot."""
        stack = self.standing(ledger, at)
        for number, patch in ((standing.number or 0, standing.patch) for standing in stack):
            if not patch.mergeable:
                out = "" if at is not None else f"take it out, {typed_in(self.store.folder, 'revert', number)}, or "
                earlier = typed_in(self.store.folder, "checkout", "--at", number - 1, "--out", "DIR")
                before = f"{out}write the model as it was before, {earlier}"
                raise PatchError(
                    f"entry {number}: its patch ({patch.kind}, by {patch.provenance.method}) is not a change of weights, and "
                    f"cannot be merged into them.\n  {before[0].upper()}{before[1:]}"
                )
        return [standing.patch for standing in stack]

    def diff(self, a: int, b: int | None = None, *, ask: bool = True, progress: Progress = silent) -> Difference:
        """What is different after entry `b`, by default the last, from after entry `a`.

        ask  whether the model is asked the edits that differ, and its weights are compared
        """
        ledger = self.log()
        ends = (a, self.standing(ledger, a)), (ledger.up_to(b)[-1].number, self.standing(ledger, b))
        return difference(*ends, self.model(progress) if ask else None, chat=self.settings.chat)

    def verify(
        self,
        model_folder: str | Path | None = None,
        progress: Progress = silent,
        *,
        expect: str | None = None,
        history: bool = False,
    ) -> Report:
        """Whether all that the ledger says is there and as it was written.

        expect        the hash of an entry, noted earlier (`Report.head`), that the ledger must still have
        history       whether a damaged patch counts that does not lie on the model any more
        model_folder  a checkpoint, made by `checkout`: whether the stack on disk gives exactly its weights; looked at if
                      nothing else is wrong
        """
        found = verify(self.store, progress, expect=expect, history=history)
        if model_folder is None or found.faults:
            return found
        lm = self.model(progress)
        compared = compare(self.store, Path(model_folder), lm, device=self._device, progress=progress)
        return found.model_copy(update={"model": compared})


def _find(ledger: Ledger, places: Sequence[Place], number: int, folder: Path) -> int:
    """Where in the stack the patch of an entry lies."""
    for i, place in enumerate(places):
        if place.number == number:
            return i
    entry = next((entry for entry in ledger.entries if entry.number == number), None)
    back = next((entry.number for entry in ledger.entries if entry.reverts == number), None)
    if entry is None:
        raise PatchError(f"entry {number}: there is none.\n  See them: {typed_in(folder, 'log')}")
    see = typed_in(folder, "list")
    if back is not None:
        again = typed_in(folder, "propose", "--patch", folder / "patches" / str(entry.patch))
        raise PatchError(
            f"entry {number}: was reverted already, by entry {back}; there is nothing left to take out.\n"
            f"  See what lies there: {see}; or bring the patch back: {again}"
        )
    raise PatchError(
        f"entry {number}: brought no patch in ({entry.action}), so that there is nothing to take out.\n"
        f"  Name the entry of an accepted patch: {see}"
    )


def _blocked(found: Sequence[Conflict], folder: Path, *, allow_conflicts: bool) -> str:
    """Why conflicts stand in the way, or an empty text."""
    blocking = [each for each in found if each.blocks]
    if allow_conflicts or not blocking:
        return ""
    number = blocking[0].number
    first = "Leave one of the two out" if number is None else f"Take it out first: {typed_in(folder, 'revert', number)}"
    return f"{blocking[0].says}{_more(blocking)}\n  {first}; or have both: --allow-conflicts"


def _depends(regressions: Sequence[Regression]) -> str:
    """Why a patch cannot be taken out, or an empty text if no later edit is lost by it."""
    lost = edits_lost(regressions)
    if not lost:
        return ""
    then = "Have later patches made anew without it, --refit, or let them be lost, --force."
    return f"a later patch depends on it: {lost[0].says}{_more(lost)}\n  {then}"


def _more(found: Sequence[object]) -> str:
    return f" (and {len(found) - 1} more)" if found[1:] else ""


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


def _signed(author: str | None, message: str = "") -> dict[str, Any]:
    """What an entry or a proposal says of who made it when, and why."""
    if not author:
        try:
            author = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            author = "unknown"
    return {"author": author, "time": datetime.now(UTC).isoformat(timespec="seconds"), "message": message}
