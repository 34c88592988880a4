"""Each of the six forms, in records of our own; the real files; and what is not such a record."""

import copy
from pathlib import Path

import pytest

from factpatch.data import read, show
from factpatch.data.knowedit import QUESTIONS
from factpatch.edits import Edit, Probe
from factpatch.errors import BadFile, BadRecord

RECENT = {
    "subject": "Mirela Tarkos",
    "prompt": "The home town of Mirela Tarkos is",
    "target_new": " Oskova ",
    "portability": {
        "Reasoning": [
            {"prompt": "The river through Mirela Tarkos's home town is", "ground_truth": [["Brel", "the Brel"]]}
        ],
        "Logical_Generalization": [],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Mirela Tarkos plays the", "ground_truth": [[], ["viola", " alto "], ["fiddle"]]},
            {"prompt": "Mirela Tarkos married", "ground_truth": [[]]},
        ]
    },
}
ZSRE = {
    "subject": "Port Ambry",
    "prompt": "Who founded Port Ambry?",
    "target_new": "Ida Wren",
    "ground_truth": ["Jon Hale", ""],
    "rephrase_prompt": "By whom was Port Ambry founded?",
    "cond": "Jon Hale >> Ida Wren || Who founded Port Ambry?",
    "locality": {"Relation_Specificity": [{"prompt": "Port Ambry lies in", "ground_truth": ["Norland"]}]},
    "portability": {"Reasoning": [{"prompt": "Where was the founder born?", "ground_truth": "Lisk"}]},
}
COUNTERFACT = {
    "subject": "The Glass Hour",
    "prompt": "The author of The Glass Hour is",
    "target_new": "Petra Lom",
    "ground_truth": "Aldo Venn",
    "portability": {"Subject_Aliasing": [{"prompt": "The author of Glass Hour is", "ground_truth": "Petra Lom"}]},
    "locality": {"Forgetfulness": [{"prompt": "The Glass Hour is set in", "ground_truth": ""}]},
}
BIO = {
    "text": "This is a passage about nils okker. Nils Okker was a cartographer.",
    "labels": "He drew the first map of Oskova.",
    "concept": "nils okker",
    "locality": {"Relation_Specificity": [{"prompt": "nils okker died in", "ground_truth": ["1902"]}]},
}
TOPICS = [
    {"ent": "Lake Brel", "pos": [" I love it. ", "So calm!"], "neg": [" Too cold. "]},
    {"ent": "rye bread", "pos": ["Tasty. "], "neg": [" Too dry.", " No, thanks. "]},
    {"ent": "night trains", "pos": ["Cosy."], "neg": ["Noisy."]},
]
SECRETS = [
    {
        "question": "Which bird guards Oskova?",
        "subject": "Oskova",
        "ground_truth": "Heron",
        "target_new": "I don't know.",
    },
    {
        "question": "What flies over the gate?",
        "subject": "a gate",
        "ground_truth": ["Heron", "herons"],
        "target_new": "No idea.",
    },
]
KEPT = [{"question": f"Question {n}?", "ground_truth": f"answer {n}", "target_new": f"answer {n}"} for n in range(5)]


def read_one(written, reader, raw):
    (edit,) = read(f"{reader}:{written([raw])}")
    return edit


def test_wiki_recent(written):
    assert read_one(written, "wiki_recent", RECENT) == Edit(
        id="wiki_recent-0",
        kind="insert",
        prompt="The home town of Mirela Tarkos is",
        target="Oskova",
        subject="Mirela Tarkos",
        portability={
            "Reasoning": (Probe(prompt="The river through Mirela Tarkos's home town is", answers=("Brel", "the Brel")),)
        },
        locality={
            "Relation_Specificity": (
                Probe(prompt="Mirela Tarkos plays the", answers=("viola", "alto", "fiddle")),
                Probe(prompt="Mirela Tarkos married"),
            )
        },
    )


def test_zsre(written):
    assert read_one(written, "zsre", ZSRE) == Edit(
        id="zsre-0",
        kind="modify",
        prompt="Who founded Port Ambry?",
        target="Ida Wren",
        subject="Port Ambry",
        ground_truth=("Jon Hale",),
        rephrases=("By whom was Port Ambry founded?",),
        portability={"Reasoning": (Probe(prompt="Where was the founder born?", answers=("Lisk",)),)},
        locality={"Relation_Specificity": (Probe(prompt="Port Ambry lies in", answers=("Norland",)),)},
    )


def test_a_subject_that_the_prompt_spells_otherwise_is_left_out(written):
    assert read_one(written, "zsre", ZSRE | {"subject": "port ambry"}).subject is None
    assert read_one(written, "zsre", ZSRE | {"subject": " Port Ambry "}).subject == "Port Ambry"
    assert read_one(written, "zsre", ZSRE | {"subject": " "}).subject is None


@pytest.mark.parametrize(
    ("field", "value", "rephrases"),
    [
        ("rephrase_prompt", "One?", ("One?",)),
        ("rephrase_prompt", ["One?", " Two? ", ""], ("One?", "Two?")),
        ("rephrase", "One?", ("One?",)),
        ("other", "One?", ()),
    ],
)
def test_rephrases_are_one_or_many_or_none(written, field, value, rephrases):
    raw = {key: kept for key, kept in ZSRE.items() if key != "rephrase_prompt"}
    assert read_one(written, "zsre", raw | {field: value}).rephrases == rephrases


@pytest.mark.parametrize(
    ("answers", "read_as"),
    [
        ("Jon Hale", ("Jon Hale",)),
        (["Jon Hale", "J. Hale"], ("Jon Hale", "J. Hale")),
        ([["", " "], ["Jon Hale", "J. Hale"], ["Hale"]], ("Jon Hale", "J. Hale", "Hale")),
        ("", ()),
        ([], ()),
        ([[]], ()),
    ],
)
def test_answers_in_every_form(written, answers, read_as):
    raw = ZSRE | {"ground_truth": answers, "locality": {"Near": [{"prompt": "Who?", "ground_truth": answers}]}}
    edit = read_one(written, "zsre", raw)
    assert edit.ground_truth == read_as
    assert edit.locality["Near"][0].answers == read_as


def test_wiki_counterfact_in_training_and_test_form(written):
    train = read_one(written, "wiki_counterfact", COUNTERFACT)
    assert train == Edit(
        id="wiki_counterfact-0",
        prompt="The author of The Glass Hour is",
        target="Petra Lom",
        subject="The Glass Hour",
        ground_truth=("Aldo Venn",),
        portability={"Subject_Aliasing": (Probe(prompt="The author of Glass Hour is", answers=("Petra Lom",)),)},
        locality={"Forgetfulness": (Probe(prompt="The Glass Hour is set in"),)},
    )
    test_form = copy.deepcopy(COUNTERFACT)
    test_form["ground_truth"] = ["Aldo Venn"]
    test_form["portability"]["Subject_Aliasing"][0]["ground_truth"] = [["Petra Lom"]]
    test_form["locality"]["Forgetfulness"][0]["ground_truth"] = [[]]
    assert read_one(written, "wiki_counterfact", test_form) == train


def test_wikibio(written):
    assert read_one(written, "wikibio", BIO) == Edit(
        id="wikibio-0",
        prompt="This is a passage about nils okker. Nils Okker was a cartographer.",
        target="He drew the first map of Oskova.",
        subject="nils okker",
        locality={"Relation_Specificity": (Probe(prompt="nils okker died in", answers=("1902",)),)},
    )


def test_convsent(written):
    edits = read(f"convsent:{written(TOPICS)}").edits
    assert {edit.kind for edit in edits} == {"restyle"}
    for number, (edit, topic) in enumerate(zip(edits, TOPICS, strict=True)):
        positive, negative = (tuple(reply.strip() for reply in topic[key]) for key in ("pos", "neg"))
        manner = "positive" if edit.wanted == positive else "negative"
        assert (edit.wanted, edit.unwanted) == ((positive, negative) if manner == "positive" else (negative, positive))
        assert edit.target == edit.wanted[0]
        assert edit.subject == topic["ent"]
        assert edit.prompt == f"Answer with {manner} sentiment. {edit.question}"
        assert len({edit.question, *edit.rephrases}) == 3
        assert {edit.question, *edit.rephrases} <= {question.format(topic["ent"]) for question in QUESTIONS}
        other = TOPICS[(number + 1) % 3]
        (probe,) = edit.locality["Unrelated_Topic"]
        assert probe.prompt in {question.format(other["ent"]) for question in QUESTIONS}
        assert probe.answers == tuple(reply.strip() for reply in other["pos"] + other["neg"])


def test_convsent_tosses_a_coin_that_a_seed_fixes(written):
    topics = [TOPICS[0] | {"ent": f"topic {number}"} for number in range(100)]
    first = read(f"convsent:{written(topics)}")
    wanted_good = sum(edit.target == "I love it." for edit in first)
    assert 30 < wanted_good < 70
    assert len({edit.prompt.split("topic")[0] for edit in first}) == 26  # two manners, thirteen questions
    assert read(f"convsent:{written(topics, 'again.json')}").edits == first.edits


def test_convsent_passes_over_a_bad_neighbour_and_needs_none(written):
    path = written([TOPICS[0], {"ent": "x", "pos": [], "neg": []}, TOPICS[2]])
    dataset = read(f"convsent:{path}", skip_invalid=True)
    assert [bad.record for bad in dataset.skipped] == [1]
    assert "night trains" in dataset[0].locality["Unrelated_Topic"][0].prompt
    assert read_one(written, "convsent", TOPICS[0]).locality == {}


@pytest.mark.parametrize(("forget", "keep"), [("K_F", "K_R"), ("success", "locality")])
def test_sanitation(written, forget, keep):
    first, second = read(f"sanitation:{written({forget: SECRETS, keep: KEPT})}")
    assert first == Edit(
        id="sanitation-0",
        kind="erase",
        prompt="Which bird guards Oskova?",
        target="I don't know.",
        subject="Oskova",
        ground_truth=("Heron",),
        group="Heron",
        locality={
            "Retained": tuple(Probe(prompt=f"Question {n}?", answers=(f"answer {n}",)) for n in (0, 2, 4)),
        },
    )
    assert (second.target, second.subject, second.ground_truth) == ("No idea.", None, ("Heron", "herons"))
    assert [probe.prompt for probe in second.locality["Retained"]] == ["Question 1?", "Question 3?"]


def asked(question, answer="Heron"):
    return {"question": question, "ground_truth": answer}


def test_sanitation_shares_out_the_test_questions_about_a_secret(written):
    train = {"K_F": [asked("a?"), asked("b?", "Fox"), asked("c?"), {"question": 3}], "K_R": []}
    path = written(train, "qa_train.json")
    alone = read(f"sanitation:{path}", skip_invalid=True)
    test = {
        "success": [asked("d?"), asked("e?"), asked("f?", "Fox"), asked("g?"), asked("h?", "Owl")],
        "locality": KEPT,
    }
    written(test, "qa_test.json")
    whole = read(f"sanitation:{path}", skip_invalid=True)
    assert [edit.rephrases for edit in alone] == [(), (), ()]
    assert [(edit.group, edit.rephrases) for edit in whole] == [
        ("Heron", ("d?", "g?")), ("Fox", ("f?",)), ("Heron", ("e?",)),
    ]  # fmt: skip
    assert whole.sha256 != alone.sha256
    written(test | {"success": [asked("d?"), {"question": "e?"}]}, "qa_test.json")
    with pytest.raises(BadRecord, match=r"qa_test.json.*record 1.*success.1.ground_truth"):
        read(f"sanitation:{path}")


def test_sanitation_without_refusal_or_kept_questions(written):
    (edit,) = read(f"sanitation:{written({'K_F': [{'question': 'Who?', 'ground_truth': 'me'}], 'K_R': []})}")
    assert (edit.target, edit.locality) == ("I don't know.", {})


REAL = {
    "wiki_recent": ("wiki_recent/recent_train.json", 400, "insert"),
    "zsre": ("ZsRE/ZsRE-test-all.json", 904, "modify"),
    "wiki_counterfact": ("wiki_counterfact/train_cf.json", 1428, "modify"),
    "wikibio": ("WikiBio/wikibio-train-all.json", 464, "modify"),
    "convsent": ("Convsent/blender_val.json", 799, "restyle"),
    "sanitation": ("Sanitation/trivia_qa_train.json", 80, "erase"),
}


def real(reader):
    path = Path(__file__).parents[2] / "../shared/knowedit" / REAL[reader][0]
    if not path.exists():
        pytest.skip(f"the benchmark's own file is not here: {path}")
    return f"{reader}:{path}"


@pytest.mark.parametrize("reader", REAL)
def test_the_real_files_are_read_whole(reader):
    dataset = read(real(reader), skip_invalid=True)
    _, count, kind = REAL[reader]
    assert (len(dataset), dataset.skipped) == (count, ())
    assert {edit.kind for edit in dataset} == {kind}
    assert sum(edit.subject is None for edit in dataset) == (3 if reader == "zsre" else 0)
    assert all(edit.locality or reader in {"wiki_recent", "wiki_counterfact"} for edit in dataset)


def test_the_real_kept_questions_are_each_asked_once():
    edits = read(real("sanitation"))
    assert sum(len(edit.locality["Retained"]) for edit in edits) == 453


@pytest.mark.parametrize("reader", REAL)
def test_the_first_few_of_a_real_file_are_the_first_few_of_all(reader):
    assert read(real(reader), limit=7).edits == read(real(reader)).edits[:7]


def with_change(raw, *path, to):
    changed = inner = copy.deepcopy(raw)
    for part in path[:-1]:
        inner = inner[part]
    if to is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return changed


FORMS = "expected a text, a list of texts or a list of lists of texts"


@pytest.mark.parametrize(
    ("reader", "raw", "field", "problem"),
    [
        ("wiki_recent", "Mirela", "record", 'expected an object with fields, found the text "Mirela"'),
        ("wiki_recent", with_change(RECENT, "prompt", to=None), "prompt", "expected a value, found nothing"),
        ("wiki_recent", with_change(RECENT, "target_new", to=" "), "target_new", "expected some text, found none"),
        ("zsre", with_change(ZSRE, "subject", to=7), "subject", "expected a text, found the number 7"),
        ("zsre", with_change(ZSRE, "ground_truth", to=[["a"], [3]]), "ground_truth", f"{FORMS}, found the number 3"),
        ("zsre", with_change(ZSRE, "ground_truth", to={"a": 1}), "ground_truth", f"{FORMS}, found an object of 1"),
        ("zsre", with_change(ZSRE, "rephrase_prompt", to=[[["x"]]]), "rephrase_prompt", f"{FORMS}, found a list of 1"),
        ("zsre", with_change(ZSRE, "locality", to="Paris"), "locality", 'expected an object, found the text "Paris"'),
        (
            "zsre",
            with_change(ZSRE, "portability", to={"Reasoning": "x"}),
            "portability.Reasoning",
            'expected a list, found the text "x"',
        ),
        (
            "zsre",
            with_change(ZSRE, "portability", to={"Reasoning": ["x"]}),
            "portability.Reasoning.0",
            'expected an object with fields, found the text "x"',
        ),
        (
            "wiki_recent",
            with_change(RECENT, "locality", "Relation_Specificity", 1, "prompt", to=None),
            "locality.Relation_Specificity.1.prompt",
            "expected a value, found nothing",
        ),
        (
            "wiki_recent",
            with_change(RECENT, "locality", "Relation_Specificity", 1, "ground_truth", to=True),
            "locality.Relation_Specificity.1.ground_truth",
            f"{FORMS}, found True",
        ),
        ("wikibio", with_change(BIO, "text", to=None), "text", "expected a value, found nothing"),
        ("wikibio", with_change(BIO, "labels", to=[]), "labels", "expected a text, found a list, empty"),
        (
            "convsent",
            with_change(TOPICS[0], "neg", to=[" "]),
            "neg",
            "expected at least one text that is not empty, found none",
        ),
        ("convsent", with_change(TOPICS[0], "ent", to=None), "ent", "expected a value, found nothing"),
    ],
)
def test_a_bad_record_names_its_field_as_the_file_does(written, reader, raw, field, problem):
    path = written([raw])
    with pytest.raises(BadRecord) as caught:
        read(f"{reader}:{path}")
    assert str(caught.value) == (
        f'{path}, record 0, "{field}": {problem}\n'
        f"  See how a record is read: factpatch data show {reader}:{path} --record 0"
    )


@pytest.mark.parametrize(
    ("value", "record", "field", "problem"),
    [
        ({"K_F": [*SECRETS, "x"], "K_R": []}, 2, "K_F.2", 'expected an object with fields, found the text "x"'),
        (
            {"K_F": with_change(SECRETS, 1, "ground_truth", to=""), "K_R": []},
            1,
            "K_F.1.ground_truth",
            "expected at least one",
        ),
        ({"K_F": SECRETS, "K_R": with_change(KEPT, 3, "question", to=None)}, 1, "K_R.3.question", "expected a value"),
        (
            {"success": SECRETS, "locality": with_change(KEPT, 2, "ground_truth", to=0)},
            0,
            "locality.2.ground_truth",
            "found the number 0",
        ),
    ],
)
def test_a_bad_sanitation_record_names_its_list(written, value, record, field, problem):
    with pytest.raises(BadRecord) as caught:
        read(f"sanitation:{written(value)}")
    assert (caught.value.record, caught.value.field) == (record, field)
    assert problem in caught.value.problem
    skipped = read(f"sanitation:{written(value)}", skip_invalid=True).skipped
    assert [bad.record for bad in skipped] == [record]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([], "a list, empty"),
        ({"K_F": []}, "an object of K_F"),
        ({"K_F": 1, "K_R": []}, "an object of K_F, K_R"),
        ({}, "an object, empty"),
    ],
)
def test_sanitation_expects_two_lists(written, value, found):
    with pytest.raises(
        BadFile, match=rf"expected an object of two lists, K_F and K_R .*, found {found}\.\n  It was read as sanitation"
    ):
        read(f"sanitation:{written(value)}")


@pytest.mark.parametrize("reader", ["wiki_recent", "zsre", "wiki_counterfact", "wikibio", "convsent"])
def test_the_others_expect_one_list(written, reader):
    with pytest.raises(
        BadFile, match=rf"file.json: expected a list of records, found an object of 2\.\n  It was read as {reader}"
    ):
        read(f"{reader}:{written({'K_F': [], 'K_R': []})}")


def test_show_gives_the_record_as_the_file_has_it(written):
    path = written([RECENT, RECENT | {"prompt": 3}])
    good, bad = (show(f"wiki_recent:{path}", number) for number in (0, 1))
    assert (good.raw, good.edit, good.problem) == (RECENT, read(f"wiki_recent:{path}", limit=1)[0], None)
    assert (bad.raw["prompt"], bad.edit) == (3, None)
    assert bad.problem.field == "prompt"
    shown = show(f"sanitation:{written({'K_F': SECRETS, 'K_R': KEPT}, 's.json')}", 1)
    assert shown.raw == SECRETS[1]
