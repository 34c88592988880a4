"""SERAC's training: the classifier learns the scope, the second model to answer with the edit before its eyes."""

import pytest
import torch

from factpatch.edits import Edit, Probe
from factpatch.lm.encoder import sentence_encoder
from factpatch.methods import create
from factpatch.methods.serac import _SeracCourse, _within
from factpatch.progress import silent
from factpatch.testing import Snapshot, tiny_edits, tiny_lm
from tests.reference import plain

SETTINGS = {"encoder": "words", "rank": 4, "batch_size": 4, "check_every": 10, "patience": 100, "held_out": 0.2}
PLACES = [("Rome", "Peru"), ("Oslo", "Chad"), ("Kyiv", "Cuba"), ("Bern", "Iran"), ("Lima", "Oman"), ("Cork", "Laos")]


def places():
    """Edits about places: where one lies is in scope, who leads it is not."""
    return [
        Edit(
            id=name,
            prompt=f"{name} lies in",
            subject=name,
            target=target,
            rephrases=(f"{name} is found in",),
            locality={"Relation_Specificity": (Probe(prompt=f"The mayor {name} has is", answers=("Bo",)),)},
        )
        for name, target in PLACES
    ]


def test_the_loss_is_cross_entropy_of_the_scope_and_the_second_models_loss():
    lm = tiny_lm()
    method = create("serac", SETTINGS | {"success": 0.3, "locality": 0.8})
    config = method.resolve(lm)
    edits = places()
    course = _SeracCourse(method.network(lm, config), lm, edits, config, silent)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in course.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    seen = course.look([0, 2])
    encoder, scope = sentence_encoder("words"), course.network.scope()
    inside, outside, nll = [], [], []
    for number in (0, 2):
        edit, topic = edits[number], f"{edits[number].prompt} {edits[number].target}"
        asked = [edit.prompt, edit.rephrases[0]]
        beyond = [p.prompt for group in edit.locality.values() for p in group]
        beyond += [edits[number + step].prompt for step in (1, 2)]
        for prompts, logs in ((asked, inside), (beyond, outside)):
            for prompt in prompts:
                logit = scope.logits(*encoder.embed([topic, prompt])).item()
                logs.append(torch.tensor(logit).sigmoid().item())
        nll += [(f"New Fact: {topic}\nPrompt: {prompt}", edit.target) for prompt in asked]
    n = len(inside) + len(outside)
    entropy = sum(-torch.tensor(p).log() / (2 * len(inside) / n) for p in inside)
    entropy += sum(-torch.tensor(1 - p).log() / (2 * len(outside) / n) for p in outside)
    assert seen["scope"] == pytest.approx(float(entropy / n), rel=1e-3)
    for name, change in course.network.adapter().items():
        lm.model.get_parameter(f"{name}.weight").data += change.full().detach()
    losses = [
        plain.ft_m_loss(lm.model, lm, [Edit(id="x", prompt=prompt, target=target)]).item() for prompt, target in nll
    ]
    assert seen["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert seen["loss"] == pytest.approx(0.8 * seen["scope"] + 0.3 * seen["nll"], rel=1e-5)


def test_portability_probes_are_in_scope_with_their_own_answers():
    rome = tiny_edits()[0]
    assert [(p.prompt, p.answers[0]) for p in _within(rome)] == [
        ("Rome lies in", "Peru"),
        ("Find Rome in", "Peru"),
        ("In Rome they speak", "Spanish"),
    ]


def course_of(edits, **settings):
    lm, method = tiny_lm(), create("serac", SETTINGS | settings)
    config = method.resolve(lm)
    return _SeracCourse(method.network(lm, config), lm, edits, config, silent)


def test_the_same_question_asked_by_another_edit_is_not_out_of_scope():
    rome, oslo, kyiv = places()[:3]
    twin = rome.model_copy(update={"id": "twin", "target": "Iran"})
    course = course_of([rome, twin, oslo, kyiv])
    assert [[p.prompt for p in probes if "lies in" in p.prompt] for probes in course.beyond] == [
        [oslo.prompt],
        [oslo.prompt, kyiv.prompt],
        [kyiv.prompt, rome.prompt],
        [rome.prompt, twin.prompt],
    ]


def test_the_classifier_and_the_adapter_learn_at_rates_of_their_own():
    course = course_of(places(), lr=0.25, adapter_lr=0.125)
    network = course.network
    rates = {
        id(p): group["lr"]
        for group in torch.optim.Adam(course.parameters(), lr=0.25).param_groups
        for p in group["params"]
    }
    assert {rates.pop(id(p)) for p in (*network.u, *network.v)} == {0.125}
    assert {rates.pop(id(p)) for p in (network.hidden, network.hidden_bias, network.out, network.out_bias)} == {0.25}
    assert not rates


def test_trained_it_routes_answers_and_leaves_the_model_alone(tmp_path):
    lm = tiny_lm()
    before = Snapshot.of(lm)
    looks = []
    method = create("serac", SETTINGS | {"steps": 120, "lr": 1e-2, "adapter_lr": 2e-2, "success": 1.0})
    method.train(lm, places(), folder=tmp_path / "e", watch=looks.append)
    assert not before.differences(lm)
    assert looks[-1]["nll"] < 0.8 * looks[0]["nll"]
    patch = create("serac", {"editor": str(tmp_path / "e")}).fit(lm, places())
    prompts = [edit.prompt for edit in places()]
    beyond = [edit.locality["Relation_Specificity"][0].prompt for edit in places()]
    with lm.patched(patch):
        assert sum(bool(text) for text in lm.contexts[0].before(prompts)) >= 5
        assert sum(bool(text) for text in lm.contexts[0].before(beyond)) <= 1
        assert all(
            place.prompt in text for place, text in zip(places(), lm.contexts[0].before(prompts), strict=True) if text
        )
