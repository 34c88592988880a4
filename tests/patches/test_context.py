"""Text before the question: which notes are read, in which order, and that nothing else changes."""

import json

import pytest
import torch

from factpatch.errors import BadPatch, PatchError
from factpatch.files import sha256_of
from factpatch.lm.encoder import sentence_encoder
from factpatch.patches import ContextPatch, Note, Patch, Provenance, Recall, merge
from factpatch.scoring import Scorer
from factpatch.testing import Snapshot, tiny_edits, tiny_lm

NOTES = (
    Note(text="New Fact: Rome lies in Peru\n", topic="Rome lies in"),
    Note(text="New Fact: Oslo lies in Chad\n", topic="Oslo lies in"),
    Note(text="New Fact: cheese is blue\n", topic="What colour has cheese?"),
)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def make(lm, recall=None, notes=NOTES):
    return ContextPatch(Provenance.of(lm, "notes", {}, tiny_edits()), notes, "Prompt: ", recall)


def words(threshold=0.0, most=1):
    return Recall(encoder="words", threshold=threshold, most=most)


def test_all_notes_stand_before_every_question(lm):
    with lm.patched(make(lm)):
        assert set(lm.before(["Where?", "Who?"]).values()) == {"".join(note.text for note in NOTES) + "Prompt: "}


@pytest.mark.parametrize(
    ("recall", "question", "expected"),
    [
        (words(), "In which country does Rome lie", ["Rome"]),
        (words(), "What colour may cheese have", ["cheese"]),
        (words(most=2), "Rome lies in", ["Oslo", "Rome"]),
        (words(most=9), "Rome lies in", ["cheese", "Oslo", "Rome"]),
        (words(threshold=0.99), "Rome lies in", ["Rome"]),
        (words(threshold=0.2, most=9), "Rome lies in", ["Oslo", "Rome"]),
        (words(threshold=0.5), "Who wrote the book?", []),
    ],
)
def test_the_nearest_notes_are_read_the_nearest_last(lm, recall, question, expected):
    by_name = {"Rome": NOTES[0].text, "Oslo": NOTES[1].text, "cheese": NOTES[2].text}
    text = "".join(by_name[name] for name in expected)
    assert [before(lm, question, make(lm, recall))] == [text + "Prompt: " if expected else ""]


def test_similarity_is_a_cosine(lm):
    found = make(lm, words()).similarity(sentence_encoder("words").embed([note.topic for note in NOTES]))
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


def test_what_the_model_is_given_is_the_notes_then_the_question(lm):
    with lm.patched(make(lm, words())):
        (given,) = lm.encode(["Rome lies in"], ["Peru"])
        assert lm.tokens.decode(given.ids) == "New Fact: Rome lies in Peru\nPrompt: Rome lies in Peru"
        assert lm.tokens.decode(given.target_ids) == " Peru"
    (given,) = lm.encode(["Rome lies in"], ["Peru"])
    assert lm.tokens.decode(given.ids) == "Rome lies in Peru"


def before(lm, question, *patches):
    with lm.patched(*patches):
        return lm.before([question])[question]


def test_two_patches_act_as_one_and_come_off_by_themselves(lm):
    bare = Snapshot.of(lm)
    one, other = make(lm, notes=NOTES[:1]), make(lm, notes=NOTES[1:2])
    lm.apply(one)
    lm.apply(other)
    (given,) = lm.encode(["Who"])
    assert lm.tokens.decode(given.ids) == f"{NOTES[0].text}{NOTES[1].text}Prompt: Who"
    lm.remove(one)
    (given,) = lm.encode(["Who"])
    assert lm.tokens.decode(given.ids) == f"{NOTES[1].text}Prompt: Who"
    lm.remove(other)
    assert bare.differences(lm) == []


def test_a_stack_recalls_what_one_patch_of_all_its_notes_would(lm):
    recall = words(0.1, 2)
    whole, parts = make(lm, recall), [make(lm, recall, notes=(note,)) for note in NOTES]
    for question in ("Rome lies in", "Oslo lies in", "The cheese is", "Where is Oslo? Rome lies in", "xyzzy"):
        assert before(lm, question, *parts) == before(lm, question, whole)
    # Those that recall otherwise speak for themselves.
    alone = before(lm, "Rome lies in", parts[0])
    assert before(lm, "Rome lies in", parts[0], make(lm, notes=NOTES[2:])) == f"{alone}{NOTES[2].text}Prompt: "


def test_a_stack_reads_a_question_once(lm, monkeypatch):
    encoder, read = sentence_encoder("words"), []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda texts: read.extend(texts) or embed(texts), raising=False)
    before(lm, "Where is Rome?", *(make(lm, words(0.1), notes=(note,)) for note in NOTES))
    assert sorted(read) == sorted(["Where is Rome?", *(note.topic for note in NOTES)])


def test_of_two_notes_on_one_question_the_later_is_read(lm):
    old, new = (
        Note(text="New Fact: Rome lies in Peru\n", topic="Rome lies in"),
        Note(text="New Fact: Rome lies in Chad\n", topic="Rome lies in"),
    )
    stack = [make(lm, words(0.1, 1), notes=(note,)) for note in (old, new)]
    assert before(lm, "Rome lies in", *stack) == f"{new.text}Prompt: "
    assert before(lm, "Rome lies in", *reversed(stack)) == f"{old.text}Prompt: "


def test_notes_on_one_topic_are_equally_near_whatever_rounding_does(lm, monkeypatch):
    old, new = (Note(text=f"New Fact: Rome lies in {place}\n", topic="Rome lies in") for place in ("Peru", "Chad"))
    lower, upper = (make(lm, words(0.1, 1), notes=notes) for notes in ((old, NOTES[2]), (new,)))
    similarity = ContextPatch.similarity
    monkeypatch.setattr(
        ContextPatch, "similarity", lambda patch, asked: similarity(patch, asked) + 1e-6 * (patch is lower)
    )
    assert before(lm, "Rome lies in", lower, upper) == f"{new.text}Prompt: "


def test_a_chat_holds_the_notes_in_what_the_user_says():
    lm = tiny_lm()
    lm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    with lm.patched(make(lm, words())):
        (given,) = lm.encode(["Rome lies in"], chat=True)
    assert lm.tokens.decode(given.ids) == f"{NOTES[0].text}Prompt: Rome lies in"


def test_the_scorer_asks_through_the_notes(lm):
    with lm.patched(make(lm)):
        given = [text.ids for text in lm.encode([edit.prompt for edit in tiny_edits()])]
    from factpatch.lm.predictions import predict

    card = Scorer(lm, protocols=["survey"], fluency=False).score(tiny_edits()[:1], make(lm))
    with lm.patched(make(lm)):
        (prediction,) = predict(lm, lm.encode(["Rome lies in"], ["Peru"]))
    row = next(row for row in card.scores if row.role == "edit")
    assert row.said_after == lm.tokens.decode(prediction.best).strip()
    assert len(given[0]) > len(lm.tokens.encode("Rome lies in").ids)


def test_save_then_load(lm, tmp_path):
    for name, recall in (("all", None), ("near", words(0.3, 2))):
        patch = make(lm, recall)
        loaded = Patch.load(patch.save(tmp_path / name))
        assert (loaded.notes, loaded.asking, loaded.recall, loaded.id) == (NOTES, "Prompt: ", recall, patch.id)
    assert make(lm).id != make(lm, words()).id
    assert make(lm).id != make(lm, notes=NOTES[:2]).id


def test_a_changed_note_is_refused(lm, tmp_path):
    folder = make(lm).save(tmp_path / "patch")
    text = (folder / "patch.json").read_text()
    (folder / "patch.json").write_text(text.replace("cheese is blue", "cheese is red"))
    with pytest.raises(BadPatch, match="was changed after it was written"):
        Patch.load(folder)
    described = json.loads(text)
    del described["spec"]["notes"]
    (folder / "patch.json").write_text(json.dumps(described))
    with pytest.raises(BadPatch, match=r'"spec.notes": expected a value, found nothing'):
        Patch.load(folder)
    assert sha256_of(folder / "patch.safetensors")


def test_it_cannot_be_merged_into_weights(lm, tmp_path):
    with pytest.raises(PatchError, match="is not a change of weights"):
        merge(lm, [make(lm)], tmp_path / "merged")
