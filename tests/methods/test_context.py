"""ICE, IKE and retrieval: what the model is given to read."""

import pytest

from factpatch.data import read
from factpatch.edits import Edit, Probe
from factpatch.errors import MissingExtra
from factpatch.lm import encoder as encoders
from factpatch.lm.encoder import sentence_encoder
from factpatch.lm.fetch import is_fetched
from factpatch.methods import create
from factpatch.testing import tiny_edits, tiny_lm


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def given(lm, patch, prompt):
    with lm.patched(patch):
        return lm.before([prompt])[prompt] + prompt


def test_ice_shows_every_fact_before_every_question(lm):
    patch = create("ice").fit(lm, tiny_edits())
    facts = "New Fact: Rome lies in Peru\nNew Fact: Who is Ann Lee? a pilot\n"
    assert given(lm, patch, "Oslo lies in") == f"{facts}Prompt: Oslo lies in"


def test_retrieval_shows_a_fact_to_its_own_questions_alone(lm):
    patch = create("retrieval", {"encoder": "words", "similarity": 0.5}).fit(lm, tiny_edits())
    assert given(lm, patch, "Rome is in") == "New Fact: Rome lies in Peru\nPrompt: Rome is in"
    assert given(lm, patch, "Who is Ann Lee by trade?") == (
        "New Fact: Who is Ann Lee? a pilot\nPrompt: Who is Ann Lee by trade?"
    )
    assert given(lm, patch, "The best cheese comes from") == "The best cheese comes from"


def test_the_order_in_which_facts_are_given_does_not_count(lm):
    for name in ("ice", "retrieval", "ike"):
        settings = {} if name == "ice" else {"encoder": "words"}
        one, other = (create(name, settings).fit(lm, edits) for edits in (tiny_edits(), tiny_edits()[::-1]))
        assert one.notes == other.notes


def corpus(tmp_path):
    edits = [
        Edit(
            id=str(i),
            prompt=f"Town {i} of Italy lies in",
            target=f"land {i}",
            rephrases=(f"Where is town {i}? In",),
            locality={"near": (Probe(prompt=f"Hill {i} is in", answers=(f"range {i}",)),)},
        )
        for i in range(20)
    ]
    path = tmp_path / "corpus.jsonl"
    import json

    path.write_text("\n".join(json.dumps(edit.to_json()) for edit in edits))
    return path


def test_ike_shows_demonstrations_of_three_kinds_in_the_ratio_1_3_4(lm, tmp_path):
    settings = {"encoder": "words", "demonstrations": 16, "corpus": str(corpus(tmp_path))}
    patch = create("ike", settings).fit(lm, tiny_edits()[:1])
    text = given(lm, patch, "Rome lies in")
    *demonstrations, last = text.split("\n\n")
    assert last == "New Fact: Rome lies in Peru\nPrompt: Rome lies in"
    kinds = []
    for demonstration in demonstrations:
        fact, question = demonstration.removeprefix("New Fact: ").split("\nPrompt: ")
        number = fact.split()[1]
        kinds.append(
            {
                f"Town {number} of Italy lies in land {number}": "copy",
                f"Where is town {number}? In land {number}": "update",
                f"Hill {number} is in range {number}": "retain",
            }[question]
        )
    assert [kinds.count(kind) for kind in ("copy", "update", "retain")] == [2, 6, 8]


def test_ike_takes_the_nearest_and_puts_the_most_similar_last(lm, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        '{"prompt": "Cats eat", "target": "mice"}\n{"prompt": "Rome lies near", "target": "Peru"}\n'
        '{"prompt": "Rome stands in", "target": "Chad"}\n{"prompt": "Rome lies in", "target": "Mali"}\n'
    )
    settings = {"encoder": "words", "demonstrations": 2, "corpus": str(path)}
    text = given(lm, create("ike", settings).fit(lm, tiny_edits()[:1]), "Rome lies in")
    assert text.index("Rome stands in Chad") < text.index("Rome lies near Peru") < text.index("Rome lies in Peru\n")
    assert "Cats" not in text
    assert "Mali" not in text, "an edit of the same prompt is no demonstration"


def test_ike_shows_of_several_facts_the_one_the_question_is_nearest_to(lm):
    patch = create("ike", {"encoder": "words", "demonstrations": 1}).fit(lm, tiny_edits())
    assert given(lm, patch, "Ann Lee is").endswith("New Fact: Who is Ann Lee? a pilot\nPrompt: Ann Lee is")
    assert given(lm, patch, "In Rome").endswith("New Fact: Rome lies in Peru\nPrompt: In Rome")


def test_no_probe_of_the_edit_itself_is_shown(lm):
    """Rephrases and probes are what an edit is scored on; only its prompt and target may be used."""
    sample = read("sample").edits[:6]
    for name in ("ice", "retrieval", "ike"):
        settings = {} if name == "ice" else {"encoder": "words"}
        for edit in sample:
            text = given(lm, create(name, settings).fit(lm, [edit]), edit.prompt)
            for labelled in edit.probes():
                if labelled.role != "edit":
                    assert labelled.probe.prompt not in text


def test_without_the_library_what_to_install_is_said(monkeypatch):
    monkeypatch.setattr(encoders, "_LOADED", {})

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(encoders, "import_module", missing)
    with pytest.raises(MissingExtra, match=r'pip install "factpatch\[retrieval\]"'):
        sentence_encoder("words")


@pytest.mark.skipif(not is_fetched("minilm-l6-v2"), reason="the sentence encoder is not fetched; it is on first use")
def test_the_real_encoder_knows_what_is_meant():
    encoder = sentence_encoder("minilm")
    a, b, c = encoder.embed(["Where does Ann live?", "In which town is Ann's home?", "The price of cheese rose."])
    assert a.norm().item() == pytest.approx(1, abs=1e-4)
    assert a @ b > 0.6
    assert a @ c < 0.3
