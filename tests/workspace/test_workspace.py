"""Propose, accept, revert: what is let through, what is refused, and what is written down."""

import json
import random

import pytest
import torch

from factpatch.errors import BadConfig, OutputError, PatchError, UnknownMethod, WrongBase
from factpatch.lm import load
from factpatch.lm.model import checksum
from factpatch.testing import Snapshot, tiny_lm
from factpatch.workspace import Workspace
from tests.workspace.planted import BONN, OSLO, PARAMETER, ROME, Tell, Told, fact, make, said, take, tree

TAKES_ROME = {"also": json.dumps({ROME.prompt: "Cuba"})}


def test_a_new_workspace_has_one_entry_and_says_what_it_is_about(space, lm):
    (first,) = space.log().entries
    assert (first.action, first.author, first.number, first.previous) == ("init", "Ann", 1, "")
    assert space.stack() == ()
    assert space.settings.fingerprint == lm.fingerprint
    assert space.settings.shape == lm.shape
    assert space.settings.dtype == "float32"
    names = {path.name for path in space.store.folder.iterdir()}
    assert names == {".lock", "workspace.json", "ledger", "patches", "proposals"}


def test_a_proposal_waits_and_changes_nothing(space):
    proposed = space.propose([ROME], message="a test")
    assert proposed.done
    assert proposed.proposal.number == 1
    assert proposed.proposal.message == "a test"
    assert space.stack() == ()
    assert [p.patch for p in space.proposals()] == [proposed.proposal.patch]
    assert space.propose([OSLO]).proposal.number == 2


def test_an_accepted_proposal_lies_on_the_model(space, lm):
    before = Snapshot.of(lm)
    entry = take(space, ROME, message="because").entry
    assert (entry.number, entry.action, entry.message) == (2, "accept", "because")
    assert entry.scores["edit_success"] == 1
    assert set(entry.files) == {f"patches/{entry.patch}/patch.{end}" for end in ("json", "safetensors")}
    assert said(space, ROME) == ["Peru"]
    assert space.proposals() == ()
    assert space.stack()[0].provenance.scorecard["summaries"][0]["edit_success"] == 1
    assert before.differences(lm) == []


def test_a_patch_is_made_on_those_before_it_and_laid_on_in_order(two):
    first, second = two.stack()
    assert second.provenance.fitted_on == (first.id,)
    assert said(two, ROME, OSLO) == ["Peru", "Chad"]
    assert [p.id for p in two.stack(2)] == [first.id]
    assert two.stack(1) == ()


def test_what_the_gate_refuses_is_not_kept(tmp_path, lm):
    space = make(tmp_path / "w", lm, "edit_success>=1", "rephrase>=1")
    before = tree(space.store.folder)
    outcome = space.propose([fact("Rome", "Peru", rephrases=("Find Rome in",))])
    assert not outcome.done
    assert "rephrase>=1: 0" in outcome.refused
    assert outcome.proposal is None
    assert outcome.choice.judgement.verdict.failed[0].lost[0].prompt == "Find Rome in"
    assert tree(space.store.folder) == before


def test_auto_takes_the_cheapest_that_passes(space, monkeypatch):
    monkeypatch.setattr("factpatch.gate.auto.names", lambda: ["tell", "retrieval"])
    outcome = space.propose([ROME], "auto")
    assert outcome.done
    assert [attempt.method for attempt in outcome.choice.attempts] == ["tell"]


def test_the_settings_of_the_workspace_are_used_unless_others_are_given(tmp_path, lm):
    space = make(tmp_path / "w", lm, config={"seed": 7})
    assert space.propose([ROME]).choice.patch.provenance.config["seed"] == 7
    assert space.propose([ROME], "tell").choice.patch.provenance.config["seed"] == 0
    assert space.propose([ROME], config={"seed": 3}).choice.patch.provenance.config["seed"] == 3
    told = json.dumps({"Oslo lies in": "Chad"})
    beside = space.propose([ROME], config={"also": told}).choice.patch.provenance.config
    assert (beside["seed"], beside["also"]) == (7, told)


def test_a_patch_made_elsewhere_is_judged_as_any_other(space, lm):
    patch = Tell().fit(lm, [ROME])
    assert space.propose_patch(patch).proposal.patch == patch.id
    mute = Tell(also=json.dumps({ROME.prompt: "nothing"})).fit(lm, [ROME])
    assert "edit_success" in space.propose_patch(mute).refused
    with pytest.raises(WrongBase):
        space.propose_patch(Tell().fit(tiny_lm(seed=1), [ROME]))


def test_a_proposal_is_judged_again_if_the_stack_has_changed(space):
    on_nothing = space.propose([OSLO], config={"leans": True}).proposal
    leaning = space.propose([BONN], config={"leans": True}).proposal
    assert space.accept(on_nothing.number).judgement is None
    assert space.accept(leaning.number).judgement.passed
    third = space.propose([ROME], config={"leans": True}).proposal
    assert space.revert(3).done
    before = tree(space.store.folder)
    outcome = space.accept(third.number)
    assert "asked again" in outcome.refused
    assert not outcome.judgement.passed
    assert tree(space.store.folder) == before


def test_what_earlier_edits_lose_is_written_down(space):
    take(
        space, ROME.model_copy(update={"rephrases": ("Find Rome in",)}), {"also": json.dumps({"Find Rome in": "Peru"})}
    )
    (lost,) = take(space, OSLO, TAKES_ROME).regressions
    assert (lost.number, lost.edit, lost.role, lost.prompt) == (2, "edit", "edit", ROME.prompt)
    assert (lost.expected, lost.before, lost.after) == (("Peru",), "Peru", "Cuba")
    assert space.log().head.regressions == (lost,)
    assert "Peru" in lost.says


def test_what_loses_an_earlier_edit_is_refused_if_that_is_asked_for(space):
    take(space, ROME)
    proposal = space.propose([OSLO], config=TAKES_ROME).proposal
    before = tree(space.store.folder)
    outcome = space.accept(proposal.number, strict=True)
    assert "1 earlier edit would be lost" in outcome.refused
    assert [lost.prompt for lost in outcome.regressions] == [ROME.prompt]
    assert tree(space.store.folder) == before
    assert space.accept(proposal.number).done


def test_what_is_allowed_to_take_an_edits_place_may_lose_it(space):
    take(space, ROME)
    proposal = space.propose([fact("Rome", "Cuba")], allow_conflicts=True).proposal
    accepted = space.accept(proposal.number, strict=True)
    assert accepted.done, accepted.refused
    assert [lost.prompt for lost in accepted.regressions] == [ROME.prompt]


def test_a_wrong_setting_is_told_before_the_model_is_loaded(space, monkeypatch):
    monkeypatch.setattr(Workspace, "model", None)
    with pytest.raises(BadConfig, match="has no setting"):
        space.propose([ROME], method="ft-m", config={"stepz": 3})


def test_the_last_patch_is_taken_out(two):
    entry = two.revert(3, message="enough").entry
    assert (entry.action, entry.reverts, entry.message) == ("revert", 3, "enough")
    assert said(two, ROME)[0] == "Peru"
    assert said(two, OSLO)[0] != "Chad"
    assert said(two, OSLO, at=3) == ["Chad"]


def test_a_patch_in_the_middle_is_taken_out_if_no_other_needs_it(two):
    assert two.revert(2).done
    assert said(two, OSLO) == ["Chad"]
    assert [place.number for place in two.log().stack()] == [3]


def leaning(space):
    """Entry 3 leans on entry 2, entry 4 on both."""
    take(space, ROME)
    take(space, OSLO, {"leans": True})
    take(space, BONN, {"leans": True})
    return space


def test_a_patch_that_others_need_is_not_taken_out(space):
    leaning(space)
    before = tree(space.store.folder)
    outcome = space.revert(2)
    assert "a later patch depends on it: entry 3" in outcome.refused
    assert "and 1 more" in outcome.refused
    assert [(r.number, r.before) for r in outcome.regressions] == [(3, "Chad"), (4, "Mali")]
    assert tree(space.store.folder) == before


def test_patches_that_need_it_are_made_anew(space):
    leaning(space)
    old = space.stack()
    entry = space.revert(2, refit=True).entry
    new = space.stack()
    assert entry.replaced == {old[1].id: new[0].id, old[2].id: new[1].id}
    assert entry.regressions == ()
    assert said(space, OSLO, BONN) == ["Chad", "Mali"]
    assert new[1].provenance.fitted_on == (new[0].id,)
    assert [place.number for place in space.log().stack()] == [3, 4]
    assert [p.id for p in space.stack(4)] == [p.id for p in old]
    assert space.verify().passed
    # The one made anew is taken out by the number it came in with.
    assert space.revert(4).done
    assert [p.id for p in space.stack()] == [new[0].id]


def test_only_those_that_lost_something_are_made_anew(space):
    take(space, ROME)
    take(space, BONN)
    take(space, OSLO, {"leans": True})
    old = space.stack()
    entry = space.revert(2, refit=True).entry
    assert list(entry.replaced) == [old[2].id]


def test_a_revert_that_cannot_be_made_good_changes_nothing(space, monkeypatch):
    leaning(space)
    before = tree(space.store.folder)
    make_patch = Tell.make
    monkeypatch.setattr(
        Tell,
        "make",
        lambda self, lm, edits, config, progress: make_patch(
            self, lm, edits, TellBad if edits[0].prompt == BONN.prompt else config, progress
        ),
    )
    TellBad = Tell(also=json.dumps({BONN.prompt: "no"})).config
    outcome = space.revert(2, refit=True)
    assert "entry 4 cannot be made anew without it" in outcome.refused
    assert tree(space.store.folder) == before


def test_a_revert_by_force_writes_down_what_it_costs(space):
    leaning(space)
    entry = space.revert(2, force=True).entry
    assert [r.number for r in entry.regressions] == [3, 4]
    assert said(space, OSLO) != ["Chad"]


@pytest.mark.parametrize(
    ("number", "words"), [(1, "brought no patch in"), (9, "there is none"), (2, "reverted already, by entry 4")]
)
def test_only_what_lies_there_can_be_taken_out(two, number, words):
    two.revert(2)
    with pytest.raises(PatchError, match=words):
        two.revert(number)


def test_a_patch_comes_in_again_after_it_was_taken_out(two, lm):
    patch = two.stack(2)[0]
    two.revert(2)
    take(two, patch)
    assert [p.id for p in two.stack()][-1] == patch.id
    assert two.verify().passed
    assert two.revert(5).done


def test_conflicts_stop_a_proposal_before_it_is_made(two, monkeypatch):
    monkeypatch.setattr(Tell, "make", lambda *a: pytest.fail("it was made"))
    outcome = two.propose([fact("Rome", "Cuba")])
    assert outcome.refused.startswith("contradiction of entry")
    assert outcome.conflicts[0].number == 2


def test_conflicts_may_be_allowed(two):
    proposed = two.propose([fact("Rome", "Cuba")], allow_conflicts=True)
    assert proposed.done
    accepted = two.accept(proposed.proposal.number)
    assert accepted.done, "what was allowed once is allowed"
    assert [r.number for r in accepted.regressions] == [2]


def test_conflicts_that_came_since_must_be_allowed(space):
    one, other = space.propose([ROME]).proposal, space.propose([fact("Rome", "Cuba")]).proposal
    assert space.accept(one.number).done
    assert "contradiction" in space.accept(other.number).refused
    assert space.accept(other.number, allow_conflicts=True).done


def test_opening_again_gives_the_same(two, lm):
    again = Workspace.open(two.store.folder, lm)
    assert again.log() == two.log()
    assert again.settings == two.settings
    with pytest.raises(WrongBase, match="was made with"):
        Workspace.open(two.store.folder, tiny_lm(seed=1))


def test_the_model_is_loaded_from_where_it_was(tmp_path, lm, monkeypatch):
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    make("w", "m")
    monkeypatch.chdir("/")
    space = Workspace.open(tmp_path / "w")
    assert space.settings.model == str(tmp_path / "m")
    assert space.model().fingerprint == lm.fingerprint
    tiny_lm(seed=1).model.save_pretrained(tmp_path / "m")
    with pytest.raises(WrongBase):
        Workspace.open(tmp_path / "w").model()


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"requirements": ["edit_sucess>=1"]}, BadConfig),
        ({"method": "rom"}, UnknownMethod),
        ({"config": {"lear": 1}}, BadConfig),
    ],
)
def test_a_workspace_is_not_made_with_what_is_wrong(tmp_path, lm, more, error):
    with pytest.raises(error):
        Workspace.init(tmp_path / "w", lm, **more)
    assert not (tmp_path / "w").exists()


def test_a_folder_that_is_taken_is_left_alone(space, tmp_path, lm):
    before = tree(space.store.folder)
    with pytest.raises(OutputError, match="already a workspace"):
        make(space.store.folder, lm)
    assert tree(space.store.folder) == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes").touch()
    with pytest.raises(OutputError, match="already has notes"):
        make(tmp_path / "own", lm)
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty", lm).log().good == 1


def test_what_is_no_workspace_is_refused(tmp_path):
    with pytest.raises(PatchError, match="not a workspace"):
        Workspace.open(tmp_path)


def test_a_checkout_is_the_model_of_that_entry(two, tmp_path, lm):
    two.checkout(tmp_path / "c2", at=2)
    two.checkout(tmp_path / "c1", at=1)
    two.checkout(tmp_path / "c")
    assert checksum(load(tmp_path / "c1").model) == checksum(lm.model)
    with lm.patched(*two.stack(2)):
        assert checksum(load(tmp_path / "c2").model) == checksum(lm.model)
    described = json.loads((tmp_path / "c" / "checkout.json").read_text())
    assert described["entry"] == 3
    assert described["hash"] == two.log().head.hash
    assert described["patches"] == [p.id for p in two.stack()]
    assert "model.safetensors" in described["files"]


def test_a_checkout_of_what_is_no_change_of_weights_is_refused(two, tmp_path, monkeypatch):
    monkeypatch.setattr(Told, "mergeable", False)
    with pytest.raises(
        PatchError, match=r"entry 2: .* cannot be merged(.|\n)* revert -C \S+ 2, or .* --at 1 --out DIR$"
    ):
        two.checkout(tmp_path / "c")
    assert two.checkout(tmp_path / "c", at=1).is_dir()


def test_a_difference_tells_edits_weights_and_answers(two):
    found = two.diff(2, 3)
    (row,) = found.edits
    assert (row.number, row.target, row.in_a, row.in_b) == (3, "Chad", None, two.stack()[1].id)
    assert row.said_a != "Chad"
    assert row.said_b == "Chad"
    (parameter,) = found.parameters
    assert parameter.parameter == PARAMETER
    assert parameter.norm == pytest.approx(two.stack()[1].deltas[PARAMETER].norm(), rel=1e-3)
    assert two.diff(3).edits == ()
    assert two.diff(3).parameters == ()
    assert [row.in_b for row in two.diff(3, 1).edits] == [None, None]
    assert two.diff(1, ask=False).parameters is None


def test_fifty_patches_taken_back_in_any_order_leave_the_base_model(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(lm, "answer", lambda prompts, **_: ["nothing"] * len(prompts))  # but for what patches tell
    monkeypatch.setattr("factpatch.files.os.fsync", lambda handle: None)  # hundreds of them
    before = checksum(lm.model)
    space = make(tmp_path / "w", lm)
    words = [
        f"{a}{b}"
        for a in ("Ka", "Lo", "Mi", "Nu", "Pe")
        for b in ("dan", "for", "gul", "hem", "jis", "kov", "lun", "mar", "nis", "pol")
    ]
    accepted = [take(space, fact(word, f"{word}ia")).entry.number for word in words]
    assert len(space.stack()) == 50
    with lm.patched(*space.stack()):
        assert checksum(lm.model) != before
    order = random.Random(0).sample(accepted, 50)
    for i, number in enumerate(order):
        assert space.revert(number).done
        if i == 25:
            kept = [fact(word, f"{word}ia") for word, n in zip(words, accepted, strict=True) if n not in order[: i + 1]]
            assert said(space, *kept) == [edit.target for edit in kept]
    assert space.stack() == ()
    assert checksum(lm.model) == before
    space.checkout(tmp_path / "c")
    assert checksum(load(tmp_path / "c").model) == before
    report = space.verify(tmp_path / "c")
    assert report.passed
    assert report.entries == 101
    assert torch.equal(
        dict(load(tmp_path / "c").model.named_parameters())[PARAMETER], dict(lm.model.named_parameters())[PARAMETER]
    )


def test_weights_of_another_type_are_not_taken(two):
    other = tiny_lm()
    other.model.to(torch.bfloat16)
    with pytest.raises(WrongBase, match=r"float32, those in hand are in torch\.bfloat16"):
        Workspace.open(two.store.folder, other)


def test_a_proposal_is_thrown_away_and_its_number_is_not_given_again(space):
    for edit in (ROME, OSLO):
        space.propose([edit])
    space.discard(2)
    assert [pending.number for pending in space.proposals()] == [1]
    for gone in (space.discard, space.accept):
        with pytest.raises(PatchError, match="proposal 2: there is none"):
            gone(2)
    assert space.propose([BONN]).proposal.number == 3, "whoever has read the 2 must not accept this one by it"
    space.discard(3)
    assert space.accept(1).done
    with pytest.raises(PatchError, match="proposal 1: there is none"):
        space.discard(1)
    assert said(space, ROME) == ["Peru"]
    report = space.verify()
    assert (report.passed, report.unknown) == (True, ())


def test_what_is_read_is_of_one_moment(space, tmp_path, monkeypatch):
    take(space, ROME)
    ledgers = [space.log()]
    take(space, OSLO)
    ledgers.append(space.log())
    monkeypatch.setattr(space.store, "ledger", iter(ledgers).__next__)  # as if it were accepted between two looks
    described = json.loads((space.checkout(tmp_path / "c") / "checkout.json").read_text())
    assert (described["entry"], len(described["patches"])) == (2, 1)


def test_every_refusal_says_what_to_do_next(space):
    leaning(space)
    for refused, hint in (
        (space.propose([fact("Rome", "Cuba")]).refused, "--allow-conflicts"),
        (space.revert(2).refused, "--refit"),
        (space.propose([fact("Kyiv", "Togo")], config={"also": json.dumps({"Kyiv lies in": "no"})}).refused, "methods"),
    ):
        assert hint in refused.splitlines()[-1]
    space.revert(4)
    with pytest.raises(
        PatchError, match="by entry 5; .*\n  See what lies there: factpatch list -C .*; or bring the patch back: "
    ):
        space.revert(4)


def test_what_was_done_is_there_for_the_next_step_and_what_was_refused_says_why(space):
    assert space.propose([ROME]).waiting.number == 1
    first = space.accept().written
    assert (first.number, first.patch) == (2, space.stack()[0].id)
    with pytest.raises(PatchError, match="contradiction"):
        _ = space.propose([fact("Rome", "Cuba")]).waiting
    with pytest.raises(PatchError, match="nothing waits"):
        space.accept()
    with pytest.raises(PatchError, match="wrote no entry"):
        _ = space.propose([OSLO]).written
    space.propose([BONN])
    with pytest.raises(PatchError, match="several proposals wait: 2, 3"):
        space.accept()


def test_both_messages_are_kept(space):
    space.propose([ROME], message="ticket 12")
    assert space.accept(message="checked").written.message == "ticket 12\nchecked"
    space.propose([OSLO], message="ticket 13")
    assert space.accept().written.message == "ticket 13"


def test_an_accept_tells_how_many_earlier_edits_hold(two):
    outcome = take(two, BONN, {"also": json.dumps({"Rome lies in": "nowhere"})})
    assert (outcome.held, [lost.number for lost in outcome.regressions]) == (1, [2])
