"""The evaluation harness on the live model: as its own model class has it, and with patches of every kind."""

import json

import pytest
import torch
from typer.testing import CliRunner

from factpatch.cli.app import app
from factpatch.errors import BadConfig, TokenizerError
from factpatch.lm.predictions import predict
from factpatch.methods import create
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.cli.conftest import model  # noqa: F401

lm_eval = pytest.importorskip(
    "lm_eval", reason="the evaluation harness is not installed: pip install 'factpatch[harness]'"
)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from factpatch.scoring.harness import HarnessLM, evaluate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

PAIRS = [
    ("Rome lies in", " Peru"),
    ("Rome lies in ", "Peru"),
    ("", "Rome lies in Peru"),
    ("Oslo is", " a city\nin Chad"),
]
TEXTS = ["Rome lies in Peru. " * 9, "Oslo", "So it is said."]
LONG = "Rome lies in Peru, and Oslo in Chad. " * 15  # beyond what the tiny model reads
STOPS = [
    {"until": ["\n", "e"], "max_gen_toks": 12},
    {"until": [], "max_gen_toks": 5},
    {"until": "o", "do_sample": False, "max_gen_toks": 9},
]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def asked(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def everything(asker):
    return (
        [logprob for logprob, _ in asker.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)],
        [is_greedy for _, is_greedy in asker.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)],
        asker.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True),
        asker.generate_until(
            asked("generate_until", [("Rome lies in", dict(stop)) for stop in STOPS]), disable_tqdm=True
        ),
    )


@pytest.mark.parametrize("method", [None, "ft-m", "rome", "lora"])
def test_it_says_what_the_harness_finds_by_itself(lm, method):
    own = HarnessLM(lm)
    theirs = HFLM(
        pretrained=lm.model,
        tokenizer=lm.tokenizer,
        backend="causal",
        max_length=own.max_length,
        truncation=True,
        logits_cache=False,  # it mixes up requests whose texts are one, but for where the continuation begins
    )
    patches = [create(method).fit(lm, tiny_edits()[:1])] if method else []
    with lm.patched(*patches), torch.no_grad():
        ours, expected = everything(own), everything(theirs)
    assert ours[0] == pytest.approx(expected[0], abs=1e-4)
    assert ours[1] == expected[1]
    assert ours[2] == pytest.approx(expected[2], abs=1e-3)
    assert ours[3] == expected[3]


@pytest.mark.parametrize("name", ["grace", "wise", "ice"])
def test_patches_that_must_see_the_prompt_do(lm, name):
    edit = tiny_edits()[0]
    before = Snapshot.of(lm)
    patch = create(name).fit(lm, [edit])
    plain = HarnessLM(lm).loglikelihood(asked("loglikelihood", [(edit.prompt, f" {edit.target}")]), disable_tqdm=True)
    with lm.patched(patch):
        ((logprob, is_greedy),) = HarnessLM(lm).loglikelihood(
            asked("loglikelihood", [(edit.prompt, f" {edit.target}")]), disable_tqdm=True
        )
        (known,) = predict(lm, lm.encode([edit.prompt], [edit.target]))
    assert (logprob, is_greedy) == (pytest.approx(sum(known.logprobs), abs=1e-4), known.best == known.target)
    assert logprob != plain[0][0]
    assert before.differences(lm) == []


def test_long_texts_count_with_every_token(lm):
    asker = HarnessLM(lm)
    ids = asker.tok_encode(LONG)
    assert len(ids) > 2 * asker.max_length
    (total,) = asker.loglikelihood_rolling(asked("loglikelihood_rolling", [(LONG,)]))
    # In windows of one token less than the model reads, each after the last token of the one before.
    size, expected = asker.max_length - 1, 0.0
    windows = [([asker.prefix_token_id], ids[:size])]
    for start in range(size, len(ids), size):
        end = min(start + size, len(ids))
        windows.append((ids[end - size - 1 : start], ids[start:end]))
    for before, own in windows:
        with torch.no_grad():
            logprobs = lm.model(torch.tensor([[*before, *own]])).logits[0].log_softmax(-1)
        expected += sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(own))
    assert total == pytest.approx(expected, abs=0.05)


def test_contexts_come_before_texts_that_have_none_and_inside_chats(lm):
    edit = tiny_edits()[0]
    patch = create("ice").fit(lm, [edit])
    bare = asked("loglikelihood", [("", " Peru")])
    plain = HarnessLM(lm).loglikelihood(bare)
    with lm.patched(patch):
        assert HarnessLM(lm).loglikelihood(bare) != plain
        assert lm.before([""])[""]
    if not lm.tokens.has_chat:
        with pytest.raises(TokenizerError, match="no chat template"):
            HarnessLM(lm).apply_chat_template([{"role": "user", "content": "Rome"}])
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"
    try:
        with lm.patched(patch):
            asker = HarnessLM(lm)
            turns = [
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
                {"role": "user", "content": "C"},
            ]
            text = asker.apply_chat_template(turns)
            assert text == f"[user]A[assistant]B[user]{lm.before(['C'])['C']}C>"
            (found,) = asker.loglikelihood(asked("loglikelihood", [(text, " Peru")]))
        (expected,) = HarnessLM(lm).loglikelihood(asked("loglikelihood", [(text, " Peru")]))
        assert found[0] == pytest.approx(expected[0], abs=1e-4), "and not a second time"
    finally:
        lm.tokenizer.chat_template = None


def test_the_help_names_the_extra():
    assert "factpatch[harness]" in CliRunner().invoke(app, ["harness", "--help"]).output


def test_samples_are_refused(lm):
    with pytest.raises(BadConfig, match="greedily"):
        HarnessLM(lm).generate_until(asked("generate_until", [("Rome", {"do_sample": True, "temperature": 0.7})]))


@pytest.fixture
def tasks(tmp_path):
    """A task of our own, whose data are on disk."""
    rows = [
        {"q": f"{name} lies in", "a": ["Peru", "Chad"], "right": i % 2}
        for i, name in enumerate(("Rome", "Oslo", "Ulm", "Bern"))
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "places.yaml").write_text(
        f"""
task: places
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.json"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{a}}}}"
doc_to_target: right
metric_list:
  - metric: acc
"""
    )
    return tmp_path


def test_a_task_before_and_after(lm, tasks, model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    edits = [
        edit.model_copy(update={"prompt": f"{name} lies in", "subject": name, "target": "Chad"})
        for edit, name in zip(tiny_edits(), ("Rome", "Ulm"), strict=False)
    ]
    patch = create("ft-m", {"steps": 30, "lr": 1e-2}).fit(lm, edits)
    patch.save(tmp_path / "patch")
    found = evaluate(HarnessLM(lm), ["places"], folder=tasks)
    with lm.patched(patch):
        after = evaluate(HarnessLM(lm), ["places"], folder=tasks)
    said = [one for one, _ in found.values()]
    assert 0 <= said[0] <= 1
    assert found["places", "acc"].stderr is not None
    result = CliRunner().invoke(
        app,
        [
            "harness",
            "-m",
            model,
            "--patch",
            str(tmp_path / "patch"),
            "--task",
            "places",
            "--tasks-folder",
            str(tasks),
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["before"], row["after"]) == (found["places", "acc"].value, after["places", "acc"].value)
    with pytest.raises(BadConfig, match="knows no task"):
        evaluate(HarnessLM(lm), ["nowhere"], folder=tasks)
