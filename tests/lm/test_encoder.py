"""Sentence encoders: vectors of length 1, and nobody else's random numbers drawn."""

import subprocess
import sys

import torch

from factpatch.lm.encoder import sentence_encoder


def test_vectors_have_length_1_and_like_texts_are_near():
    near, same, far = sentence_encoder("words").embed(["Rome lies in Peru", "Rome lies in Chad", "bees hum"])
    torch.testing.assert_close(torch.stack([near, same, far]).norm(dim=1), torch.ones(3))
    assert near @ same > 0.5 > near @ far


def test_the_first_use_draws_no_random_number():
    # In a process of its own: what draws is the library's import, which happens once.
    lines = (
        "import random",
        "from factpatch.lm.encoder import sentence_encoder",
        "random.seed(5)",
        "state = random.getstate()",
        "sentence_encoder('words').embed(['x'])",
        "assert random.getstate() == state",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
