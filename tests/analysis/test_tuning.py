"""Tuning: it finds settings that do better where there are any, judges them on other facts, and says so if they are not."""

import json

import pytest

from factpatch.analysis import tuning
from factpatch.analysis.tuning import FACTS, read_preset, tune
from factpatch.edits import Edit
from factpatch.errors import BadConfig, BadFile, CannotEdit
from factpatch.methods import create
from factpatch.methods.ft import FtM
from factpatch.scoring import Scorer
from factpatch.testing import Snapshot, tiny_lm

FACTS_OF = [
    Edit(id=name, prompt=f"{name} lies in", subject=name, target="Peru", rephrases=(f"Find {name} in",))
    for name in ("Rome", "Oslo", "Bonn", "Nice", "Kiel", "Bath")
]


@pytest.fixture
def by_rate(monkeypatch):
    """The score is how near the learning rate is to 0.01, without any scoring; on facts held back it may be turned over."""

    def plant(*, turned=False):
        def trial(self, settings, facts):
            rate = settings.get("lr", self.base.lr)
            near = 1 / (1 + abs(rate - 0.01))
            is_held = facts == self.held
            return tuning.Trial(
                settings=dict(settings), score=1 - near if turned and is_held else near, measures={}, seconds=0
            )

        monkeypatch.setattr(tuning._Search, "trial", trial)

    return plant


def test_the_search_climbs_and_its_best_is_judged_on_other_facts(by_rate):
    by_rate()
    lm = tiny_lm()
    before = Snapshot.of(lm)
    found = tune(lm, "ft-m", FACTS_OF, seconds=1.0, limit=3)
    assert before.differences(lm) == []
    assert found.better
    assert abs(found.preset.settings["lr"] - 0.01) < abs(5e-4 - 0.01)
    assert found.best.score == max(trial.score for trial in found.trials)
    assert not set(found.facts) & set(found.held)
    assert len(found.facts) == len(found.held) == 3
    assert found.preset.made["judged_on"] == list(found.held)


def test_what_only_fits_the_search_is_not_kept(by_rate):
    by_rate(turned=True)
    found = tune(tiny_lm(), "ft-m", FACTS_OF, seconds=0.3, limit=3)
    assert found.best.settings
    assert not found.better
    assert "lr" not in found.preset.settings


def test_what_only_takes_less_time_is_not_called_better(monkeypatch):
    asked = []

    def trial(self, settings, facts):
        asked.append(facts)
        return tuning.Trial(settings=dict(settings), score=0.5, measures={}, seconds=0 if settings else 9)

    monkeypatch.setattr(tuning._Search, "trial", trial)
    found = tune(tiny_lm(), "ft-m", FACTS_OF, seconds=0.2, limit=3)
    assert len(found.trials) > 1
    assert (found.best, found.changed, found.better) == (found.start, False, False)
    assert asked.count(asked[-1]) == 1, "what is the same is judged once"


def test_a_seed_fixes_what_is_tried_and_given_settings_stay(by_rate):
    by_rate()
    one, other = (tune(tiny_lm(), create("ft-m", {"layer": "1"}), FACTS_OF, seconds=0.3, limit=2) for _ in "ab")
    both = min(len(one.trials), len(other.trials))
    assert both > 5
    assert one.trials[:both] == other.trials[:both]
    assert all("layer" not in trial.settings for trial in one.trials)
    assert one.preset.settings["layer"] == 1
    assert {name for trial in one.trials for name in trial.settings} == {"lr", "steps", "stop_loss"}


def test_trials_are_scored_as_the_scorer_scores():
    lm = tiny_lm()
    found = tune(lm, create("ft-m", {"layer": 1, "steps": 3}), FACTS_OF, seconds=0.0, limit=2)
    (trial,) = found.trials
    facts = [edit for name in found.facts for edit in FACTS_OF if edit.id == name]
    method, scorer = create("ft-m", {"layer": 1, "steps": 3}), Scorer(lm, protocols=["open"], fluency=False)
    cards = [scorer.score([edit], method.fit(lm, [edit])) for edit in facts]
    assert trial.measures["rephrase"] == pytest.approx(sum(card.summary("open").rephrase for card in cards) / 2)
    assert trial.measures["edit"] == pytest.approx(sum(card.summary("open").edit_success for card in cards) / 2)
    assert trial.measures["locality"] is None
    assert not found.better, "nothing was tried"


def test_blocks_move_together_and_stay_in_the_stack():
    lm = tiny_lm()
    search = tuning._Search(lm, create("memit", {"steps": 1}), FACTS_OF, 2, 0, lambda *_: None)
    search.base = search.base.model_copy(update={"layers": (0, 1)})
    drawn = {search._place("layers", (0, 1)) for _ in range(40)}
    assert drawn == {(0, 1), (1, 2)}
    assert search._place("layers", None) is None


def test_a_preset_is_read_again_and_its_settings_are_the_methods(tmp_path, by_rate):
    by_rate()
    found = tune(tiny_lm(), "ft-m", FACTS_OF, seconds=0.3, limit=2)
    path = found.preset.save(tmp_path / "p.json")
    read = read_preset(path)
    assert read == found.preset
    assert create("ft-m", read.settings).config.lr == read.settings["lr"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(BadFile, match="format"):
        read_preset(path)
    with pytest.raises(BadFile, match="no such file"):
        read_preset(tmp_path / "none.json")


def test_a_preset_holds_only_what_differs_from_the_defaults():
    class Settings(FtM.config_type):
        sizes: tuple[int, ...] = (3, 5)  # of which JSON makes a list

    class Own(FtM):
        name = "own"
        config_type = Settings

    search = tuning._Search(tiny_lm(), Own(), FACTS_OF, 2, 0, lambda *_: None)
    held = [tuning.Trial(settings={}, score=0.5, measures={}, seconds=0)]
    assert search.preset({"steps": 3}, held, 1, 0).settings.keys() == {"steps"}
    assert search.preset({"sizes": (3, 6)}, held, 1, 0).settings["sizes"] == [3, 6]


def test_what_cannot_be_tuned_is_refused():
    lm = tiny_lm()
    with pytest.raises(CannotEdit, match="learns an editor"):
        tune(lm, "mend", FACTS_OF)
    with pytest.raises(BadConfig, match="no setting"):
        tune(lm, "ice", FACTS_OF)
    with pytest.raises(CannotEdit, match="four at least"):
        tune(lm, "rome", [edit.model_copy(update={"subject": None}) for edit in FACTS_OF])
    with pytest.raises(CannotEdit, match="one to search with"):
        tune(lm, "ft-m", FACTS_OF, limit=0)
    assert FACTS >= 4
