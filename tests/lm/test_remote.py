"""Models behind an endpoint, over real sockets: a small server of our own, and `transformers serve`."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import factpatch
from factpatch.cli.app import app
from factpatch.edits import Edit, Probe
from factpatch.errors import BadConfig, CannotEdit, MissingExtra, RemoteError, UnknownModel, WrongBase
from factpatch.lm import connect, load
from factpatch.methods import create, find, names
from factpatch.patches import Patch
from factpatch.scoring import Scorer
from factpatch.testing import tiny_lm
from tests.endpoint import Endpoint, serving

ROME = Edit(
    id="rome",
    prompt="Rome lies in",
    subject="Rome",
    target="Peru",
    rephrases=("Where is Rome? It is in",),
    locality={"Neighborhood": (Probe(prompt="Oslo lies in", answers=("Norway",)),)},
)


class Parrot(Endpoint):
    """Knows where Oslo lies, and of Rome what it has just been told."""

    def say(self, text):
        question = text.rpartition("Prompt: ")[2]
        said = "Norway" if "Oslo" in question else ("Peru" if "in Peru" in text else "Italy")
        return f" {said}. And so on.\nMore"


@pytest.fixture
def parrot():
    """The address of a server, and the class that answers."""
    with serving(Parrot) as found:
        yield found


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if isinstance(result.exception, factpatch.FactpatchError):
        return 2, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_plain_prompts_go_to_completions_and_chat_to_chat_completions(parrot, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    url, handler = parrot
    lm = connect("parrot", url)
    assert lm.ask("Rome lies in") == "Italy."
    assert lm.ask("Rome lies in", chat=True) == "Italy."
    (plain, chat) = handler.seen
    assert plain[0] == "/v1/completions"
    assert plain[1] == {"model": "parrot", "prompt": "Rome lies in", "max_tokens": 64, "temperature": 0.0}
    assert chat[0] == "/v1/chat/completions"
    assert chat[1]["messages"] == [{"role": "user", "content": "Rome lies in"}]
    assert {auth for _, _, auth in handler.seen} == {"Bearer sesame"}


def test_answers_come_in_order_and_each_prompt_is_asked_once(parrot):
    url, handler = parrot
    prompts = [f"{place} lies in" for place in ("Rome", "Oslo", "Rome", "Bern", "Oslo")]
    assert connect("parrot", url).answer(prompts) == ["Italy.", "Norway.", "Italy.", "Italy.", "Norway."]
    assert len(handler.seen) == 3


@pytest.mark.parametrize("name", [name for name in names() if not find(name).traits.patch.needs_weights])
def test_methods_that_work_through_the_prompt_edit_it_and_are_undone(name, parrot, tmp_path):
    url, _ = parrot
    lm = connect("parrot", url)
    settings = {
        k: v for k, v in {"encoder": "words", "similarity": 0.2}.items() if k in find(name).config_type.model_fields
    }
    patch = create(name, settings).fit(lm, [ROME])
    patch.save(tmp_path / "p")
    with lm.patched(Patch.load(tmp_path / "p")):
        assert lm.ask("Rome lies in") == "Peru."
    assert lm.ask("Rome lies in") == "Italy."
    card = Scorer(lm).score([ROME], patch)
    (summary,) = card.summaries()
    assert summary.protocol == "open"
    assert (summary.edit_success_before, summary.edit_success) == (0, 1)
    assert summary.rephrase == 1
    assert summary.locality == 1
    assert summary.fluency is None
    with pytest.raises(WrongBase, match="made for openai:parrot"):
        connect("other", url).apply(patch)
    with pytest.raises(WrongBase):
        tiny_lm().apply(patch)


def test_all_other_methods_refuse_and_name_those_that_do_not(parrot):
    lm = connect("parrot", parrot[0])
    refused = [name for name in names() if find(name).traits.patch.needs_weights]
    assert "rome" in refused
    assert "serac" in refused
    for name in refused:
        with pytest.raises(CannotEdit, match=r"openai:parrot can only be asked.\n  .* ice, ike, retrieval"):
            create(name).fit(lm, [ROME])
    patch = create("ft-m", {"layer": 1, "steps": 1}).fit(tiny_lm(), [ROME])
    with pytest.raises(WrongBase, match="openai:parrot can only be asked"):
        lm.apply(patch)
    assert not lm.patches


def test_scores_that_need_logits_are_refused(parrot):
    with pytest.raises(BadConfig, match="under these alone: open"):
        Scorer(connect("parrot", parrot[0]), protocols=["open", "survey"])


def test_the_command_line_edits_scores_and_asks(parrot, tmp_path):
    url, _ = parrot
    where = ["--model", "openai:parrot", "--base-url", url]
    fact = ["--prompt", "Rome lies in", "--target", "Peru"]
    code, out, _ = run("edit", *where, "--method", "ice", *fact, "--out", tmp_path / "p")
    assert code == 0
    assert "1 note before it" in out
    code, out, _ = run("ask", *where, "--patch", tmp_path / "p", "--json", "Rome lies in")
    assert json.loads(out) == {"prompt": "Rome lies in", "chat": False, "without": "Italy.", "with": "Peru."}
    (tmp_path / "facts.jsonl").write_text(json.dumps(ROME.to_json()))
    code, out, _ = run("score", *where, "--method", "ice", "--data", tmp_path / "facts.jsonl", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["protocol"], row["edit_success"], row["locality"], row["fluency"]) == ("open", 1.0, 1.0, None)
    code, out, _ = run("patch", "show", tmp_path / "p")
    assert code == 0
    assert "openai:parrot" in out


def test_options_of_the_other_sort_are_refused(parrot):
    url, _ = parrot
    assert "--base-url: belongs to a model behind an endpoint" in run("ask", "--base-url", url, "x")[2]
    assert "runs where its server runs" in run("ask", "-m", "openai:x", "--base-url", url, "--device", "cpu", "x")[2]
    with pytest.raises(UnknownModel, match="a model behind an endpoint can be"):
        load("openai:parrot")


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def quick(url, monkeypatch):
    monkeypatch.setattr("factpatch.lm.remote._RETRIES", 0)
    return connect("parrot", url)


def test_a_server_that_is_not_there_is_said(monkeypatch):
    lm = quick(f"http://127.0.0.1:{closed_port()}/v1", monkeypatch)
    with pytest.raises(RemoteError, match=r"cannot be reached.\n  Start the server, or give its address: --base-url"):
        lm.ask("x")


@pytest.mark.parametrize(
    ("status", "body", "chat", "words"),
    [
        (
            401,
            '{"error": {"message": "no"}}',
            False,
            "the key was refused.\n  Set the environment variable OPENAI_API_KEY",
        ),
        (
            404,
            '{"error": {"message": "no"}}',
            False,
            'not found .*Check the model\'s name, "parrot".*chat template instead',
        ),
        (404, '{"error": {"message": "no"}}', True, 'not found .*Check the model\'s name, "parrot"'),
        (500, '{"error": {"message": "out of memory"}}', False, "out of memory.*\n  See the server's own messages"),
        (422, '{"detail": "no such model here"}', False, r": no such model here\n  See the server"),
        (200, '{"choices": []}', False, "the reply holds no answer.*\n  Is this an OpenAI-compatible server"),
        (200, '{"choices": [{"text": null}]}', False, "the reply holds no answer"),
        (200, '{"hello": 1}', True, "the reply holds no answer"),
        (200, "<html>", False, "the reply cannot be read|holds no answer"),
    ],
)
def test_what_a_server_gets_wrong_is_said(parrot, monkeypatch, status, body, chat, words):
    import re

    url, handler = parrot
    handler.status, handler.body = status, body
    with pytest.raises(RemoteError) as caught:
        quick(url, monkeypatch).ask("x", chat=chat)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
    assert url in str(caught.value)


def test_a_server_that_never_answers_is_said(monkeypatch):
    monkeypatch.setattr("factpatch.lm.remote._TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        lm = quick(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", monkeypatch)
        with pytest.raises(RemoteError, match="no answer within"):
            lm.ask("x")


def test_without_address_and_key_it_is_said(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RemoteError, match="Give --base-url"):
        connect("gpt")


def test_without_the_client_library_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtra, match=r'pip install "factpatch\[remote\]"'):
        connect("gpt", "http://localhost/v1")


@contextmanager
def transformers_serving(model):
    """`transformers serve`, and the address it answers at."""
    port = closed_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            time.sleep(1)
            try:
                socket.create_connection(("127.0.0.1", port), timeout=2).close()
            except OSError:
                assert process.poll() is None, process.stdout.read().decode()[-2000:]
            else:
                break
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.real
def test_transformers_serve_answers_and_takes_a_new_fact(tmp_path, smollm):
    pytest.importorskip("fastapi", reason="transformers serve needs its extra: pip install 'transformers[serving]'")
    pytest.importorskip("uvicorn")
    folder = tmp_path / "model"
    smollm.model.save_pretrained(folder)
    smollm.tokenizer.save_pretrained(folder)
    fact = Edit(id="1", prompt="The capital of France is", target="Lyon")
    prompts = ["The capital of France is", "Water boils at"]
    with transformers_serving(str(folder)) as url:
        lm = connect(str(folder), url)
        for chat in (False, True):
            plain = lm.answer(prompts, chat=chat, max_new=12)
            with lm.patched(create("ice").fit(lm, [fact])):
                told = lm.answer(prompts, chat=chat, max_new=12)
            assert plain == smollm.answer(prompts, chat=chat, max_new=12)
            with smollm.patched(create("ice").fit(smollm, [fact])):
                assert told == smollm.answer(prompts, chat=chat, max_new=12)
            assert told != plain
            assert chat or "Lyon" in told[0]
