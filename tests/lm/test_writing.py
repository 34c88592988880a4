"""Texts that are put aside and read again, under every method's patch; the rest of writing is tested with running."""

import random

import pytest

from factpatch.lm import batches, writing
from factpatch.lm.writing import generate
from factpatch.methods import create, find, names
from factpatch.testing import quick_settings, tiny_edits, tiny_lm

PROMPTS = [*(edit.prompt for edit in tiny_edits()), "A", "Oslo lies up in", "Where, then, does Bob Ray live?"]
"""Those of the edits, which patches act on, and others."""


def ending(full):
    """A `stop` that cuts these texts at lengths of all kinds."""
    draw = random.Random(0)
    cut = {tuple(row[: draw.choice([1, 3, 4, 7, len(row)])]) for row in full}
    return lambda written: tuple(written) in cut


@pytest.mark.parametrize("name", names())
def test_what_is_read_again_is_written_on_as_without_a_break(name, monkeypatch):
    lm, kind = tiny_lm(), find(name)
    edit = tiny_edits()[0]
    edit = edit if edit.kind in kind.traits.kinds else edit.model_copy(update={"kind": min(kind.traits.kinds)})
    patch = create(name, quick_settings(kind)).fit(lm, [edit])
    with lm.patched(patch):
        asked = [text.ids for text in lm.encode(PROMPTS)]
        stop = ending([generate(lm, [prompt], max_new=12)[0] for prompt in asked])
        expected = [generate(lm, [prompt], max_new=12, stop=stop)[0] for prompt in asked]
        read = []
        forward_on = writing.forward_on

        def seeing(lm, ids, *more):
            read.append(ids.shape[1])
            return forward_on(lm, ids, *more)

        monkeypatch.setattr(batches, "BATCH_TOKENS", 2 * (max(map(len, asked)) + 12))
        monkeypatch.setattr(writing, "_SHORT", 2)
        monkeypatch.setattr(writing, "forward_on", seeing)
        assert generate(lm, asked, max_new=12, stop=stop) == expected
    assert sum(columns > 1 for columns in read) > 3, "some were read again"
    with lm.side_by_side([(), (patch,)]):
        lanes = [1] * len(PROMPTS) + [0] * len(PROMPTS)
        asked = [text.ids for text in lm.encode(PROMPTS * 2, lanes=lanes)]
        found = generate(lm, asked, max_new=12, stop=stop, lanes=lanes)
    assert found[: len(PROMPTS)] == expected, "nor does a lane make a difference"
