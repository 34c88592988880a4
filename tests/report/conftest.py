"""Results made by hand, so that every number of a report is known."""

from dataclasses import replace

import pytest

from factpatch.bench import Cell, Outcome, Store
from factpatch.scoring import ProbeScore, Scorecard

CELL = Cell(
    model="toy", fingerprint="f" * 64, dtype="float32", method="rome", settings={}, dataset="zsre", data_file="z.json",
    data_sha256="s" * 64, mode="single", seed=0, chat=False, fluency=True, protocols={"open": 2, "survey": 2},
)  # fmt: skip


def card(edit, success, *, portability=None, locality=1.0, before=0.0, said="Peru & <b>more</b>"):
    """One edit with the same scores under both protocols."""
    scores = []
    for protocol in ("open", "survey"):
        common = {"protocol": protocol, "edit": edit}
        failure = "unchanged" if protocol == "open" and success < 1 else None
        own = {
            "failure": failure,
            "prompt": f"Where is {edit}?",
            "answers": ("Peru",),
            "said_before": "Rome",
            "said_after": said,
        }
        scores.append(ProbeScore(role="edit", before=before, after=success, **own, **common))
        for kind, value in (portability or {}).items():
            scores.append(ProbeScore(role="portability", kind=kind, prompt="p", before=0.0, after=value, **common))
        scores.append(
            ProbeScore(role="locality", kind="N", prompt="l", after=locality, measures={"kl": 0.25}, **common)
        )
        scores.append(ProbeScore(role="fluency", prompt="f", before=5.5, after=5.0, **common))
    return Scorecard(versions={"open": 2, "survey": 2}, chat=False, scores=tuple(scores), score_seconds=2.0)


def fill(store, method, successes, *, moment="alone", **more):
    """A cell with an outcome for each edit; None for one that was refused."""
    known = {name: value for name, value in more.items() if name in Cell.__slots__}
    number = store.add_cell(replace(CELL, method=method, **known))
    rest = {name: value for name, value in more.items() if name not in known}
    for i, success in enumerate(successes):
        edit = f"zsre-{i}"
        if success is None:
            outcome = Outcome(i, moment, (edit,), None, reason="needs a subject")
        else:
            outcome = Outcome(
                i, moment, (edit,), card(edit, success, **rest), fit_seconds=4.0, peak_memory_mb=100.0 + i
            )
        store.add(number, outcome)
    return number


@pytest.fixture
def store(tmp_path):
    """Two methods on one data set."""
    with Store(tmp_path / "run") as made:
        fill(
            made, "rome", [1.0, 1.0, 0.0, None], portability={"Reasoning": 0.5, "Subject_Aliasing": 1.0}, locality=0.25
        )
        fill(made, "ft-m", [1.0, 0.0, 0.0, 0.0], before=1.0)
        yield made
