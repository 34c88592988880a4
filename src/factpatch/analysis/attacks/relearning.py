"""Attacks that train: a few steps on other facts, after which an answer may come back; and how fast the answer itself is learnt.

What is trained is a low-rank addition beside the output projections of attention and MLP in every block (as LoRA, Hu et al.
2022, arXiv 2106.09685), held outside the model: its weights and patches are never touched, and whatever a patch does inside
the model goes on while it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from factpatch.analysis.attacks.asking import in_other_words
from factpatch.analysis.attacks.base import Attack, Candidate, Question, Setting, best
from factpatch.edits import Probe
from factpatch.lm import LM
from factpatch.lm.batches import by_rows, length_batches
from factpatch.lm.hooks import replacing_output
from factpatch.lm.tokens import Encoded
from factpatch.methods.targets import TargetBatch, constant_weights, tokens_at_once
from factpatch.progress import Progress, silent

__all__ = ["Relearning", "Study", "steps_to_learn"]

RANK = 4
AT_ONCE = 16
"""Facts that are learnt beside one another, each with an addition of its own, at most; fewer where texts are long."""


@dataclass(frozen=True, slots=True)
class Study:
    """How an attacker trains.

    steps  of Adam, at most
    lr     learning rate
    """

    steps: int = 12
    lr: float = 5e-3


class Relearning(Attack):
    """A few steps of fine-tuning on related texts, none of which holds the answer; then the question is put again.

    Related are the other facts that the patch was to change, with their old answers, as far as they do not share the answer
    looked for, and some general knowledge (relearning attacks: Lynch et al. 2024, arXiv 2402.16835; Hu et al. 2024, arXiv
    2406.13356). Each question is put after 1, 2, 4, ... steps, to the model as it was trained without that question.
    """

    name = "relearning"
    title = "relearning"
    access = "training"
    about = "Greedy answers after 1, 2, 4, … steps of training on other facts of the patch and on general knowledge."

    def __init__(self, study: Study = Study()) -> None:
        self.study = study

    def candidates(
        self, lm: LM, questions: Sequence[Question], setting: Setting, progress: Progress
    ) -> list[list[Candidate]]:
        """By when they were said: after fewer steps first, at each of them the prompt before its rephrases."""
        courses: dict[tuple[Probe, ...], list[int]] = {}
        for i, question in enumerate(questions):
            courses.setdefault(tuple(setting.lessons.get(question.id, ())), []).append(i)
        looks = _looks(self.study.steps)
        wordings = [_few(question, setting.budget // len(looks)) for question in questions]
        said: list[list[Candidate]] = [[] for _ in questions]
        for number, (lessons, own) in enumerate(courses.items()):
            if not lessons:
                continue
            texts = lm.encode([p.prompt for p in lessons], [p.answers[0] for p in lessons], chat=setting.chat)
            asked = [(i, text) for i in own for text in wordings[i]]
            with _added(lm, setting.seed, rows=None) as factors:
                train = _training(factors, _batches(lm, texts), self.study.lr)
                for step in range(1, self.study.steps + 1):
                    progress(
                        f"Attack: {self.title}", number * self.study.steps + step - 1, len(courses) * self.study.steps
                    )
                    train()
                    if step not in looks:
                        continue
                    found = lm.answer([text for _, text in asked], chat=setting.chat, max_new=setting.max_new)
                    for (i, text), answer in zip(asked, found, strict=True):
                        said[i].append(Candidate(text=answer, source=f"after {step} steps: {text}"))
        progress(f"Attack: {self.title}", 1, 1)
        return [best(own, setting.budget) for own in said]


def steps_to_learn(
    lm: LM,
    texts: Sequence[Probe],
    *,
    study: Study = Study(),
    chat: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> list[int | None]:
    """How many steps of training on a prompt and its first answer it takes until each token of the answer is the likeliest.

    0 if it is so already, None if it is not after `study.steps`. Each text is learnt by itself, with an addition of its own
    in its row of the batch, so that no result depends on the others.
    """
    found: list[int | None] = [None] * len(texts)
    encoded = lm.encode([p.prompt for p in texts], [p.answers[0] for p in texts], chat=chat)
    lengths, done = [len(text.ids) for text in encoded], 0
    for same in length_batches(lengths, tokens_at_once(lm, 0)):
        for own in (same[start : start + AT_ONCE] for start in range(0, len(same), AT_ONCE)):
            progress("Timing how fast answers are learnt", done, len(texts))
            done += len(own)
            batch = TargetBatch(lm, [encoded[i] for i in own])
            with _added(lm, seed, rows=len(own)) as factors:
                train = _training(factors, [batch], study.lr)
                for step in range(study.steps + 1):
                    for i, is_right in zip(own, train().tolist(), strict=True):
                        if is_right and found[i] is None:
                            found[i] = step
                    if all(found[i] is not None for i in own):
                        break
    progress("Timing how fast answers are learnt", done, len(texts))
    return found


def _batches(lm: LM, texts: Sequence[Encoded]) -> list[TargetBatch]:
    """As many texts at once as their gradients leave room for."""
    lengths = [len(text.ids) for text in texts]
    return [TargetBatch(lm, [texts[i] for i in own]) for own in length_batches(lengths, tokens_at_once(lm, 0))]


def _training(
    factors: Sequence[Tensor], batches: Sequence[TargetBatch], lr: float
) -> Callable[[], Bool[Tensor, " texts"]]:
    """A step of Adam on the sum of the texts' losses; each call tells which texts were predicted before it.

    Factors that only one text's row uses see only that text's loss.
    """
    optimiser = torch.optim.Adam(factors, lr=lr)

    def step() -> Bool[Tensor, " texts"]:
        optimiser.zero_grad()
        right = []
        for batch in batches:
            with torch.enable_grad():
                nll, correct = batch.nll_and_correct()
                gradients = torch.autograd.grad(nll.sum(), factors, allow_unused=True)
            for factor, gradient in zip(factors, gradients, strict=True):
                if gradient is not None:
                    factor.grad = gradient if factor.grad is None else factor.grad + gradient
            right.append(correct)
        optimiser.step()
        return torch.cat(right)

    return step


@contextmanager
def _added(lm: LM, seed: int, *, rows: int | None) -> Iterator[list[Tensor]]:
    """Add `B A x`, zero at first, to what each projection puts out, for the length of a `with`; the factors to be trained.

    rows  each row of a batch has factors of its own; None for one pair that all share
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(constant_weights(lm))
        for _, _, projection in lm.anatomy.projections_out():
            out, width = projection.matrix.shape
            # Drawn once and for all rows alike: what a row learns must not depend on where it stands.
            a = torch.randn(1, RANK, width, generator=generator).to(lm.device) / width**0.5
            a = a.expand(rows or 1, RANK, width).clone().requires_grad_()
            b = torch.zeros(rows or 1, out, RANK, device=lm.device, requires_grad=True)
            factors += [a, b]
            stack.enter_context(replacing_output(projection.module, _adding(a, b)))
        yield factors


def _adding(a: Float[Tensor, "rows rank in"], b: Float[Tensor, "rows out rank"]) -> Callable[[Tensor, Tensor], Tensor]:
    def new(x: Tensor, out: Tensor) -> Tensor:
        more = by_rows(x).float() @ a.mT @ b.mT
        return out + more.reshape(out.shape).to(out.dtype)

    return new


def _looks(steps: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return sorted({*(2**n for n in range(steps.bit_length()) if 2**n <= steps), steps})


def _few(question: Question, most: int) -> list[str]:
    """As many wordings as can be asked at each look, one at least."""
    return [question.prompt, *in_other_words(question)][: max(1, most)]
