"""The plain paths that `speed.py` measures ours against; it tells how far the results differ, and tests hold values to them.

They go the way published implementations go: one value at a time through the whole network, with logits at every position;
one prompt at a time when scoring; statistics of one block at a time; a dense solve. Nothing is kept that could be computed
again, and nothing of ours is used but the rules from text to tokens, where the model's parts are, and `Sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from factpatch.edits import Edit
from factpatch.lm import LM
from factpatch.lm.tokens import Encoded
from factpatch.lm.writing import Chooser, greedy
from factpatch.methods.values import ValueConfig

Metrics = Sequence[Tensor]


def value(
    lm: LM, site: nn.Module, edit: Edit, prefixes: Sequence[str], config: ValueConfig
) -> tuple[Tensor, Tensor, list[float]]:
    """ROME, equation 4: the old output of `site`, what to add to it, and the loss at each step."""
    texts = [lm.tokens.encode(edit.prompt, edit.target, subject=edit.subject, prefix=prefix) for prefix in prefixes]
    texts.append(lm.tokens.encode(f"{edit.subject} is a", subject=edit.subject))
    ids, mask = _padded(lm, texts)
    rows = torch.arange(len(texts))
    subjects = torch.tensor([text.subject for text in texts])
    delta: Tensor | None = None
    seen: list[Tensor] = []

    def change(_module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        grid = hidden.reshape(*ids.shape, -1).clone()
        if delta is None:
            seen.append(grid[0, subjects[0]].detach().clone())
            return None
        grid[rows, subjects] += delta
        grid = grid.reshape(hidden.shape)
        return (grid, *out[1:]) if isinstance(out, tuple) else grid

    def logprobs() -> Tensor:
        return lm.model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)

    handle = site.register_forward_hook(change)
    try:
        with torch.no_grad():
            before = logprobs()[-1, len(texts[-1].ids) - 1]
        (old,) = seen
        delta = torch.zeros_like(old, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=config.lr)
        losses: list[float] = []
        for step in range(config.steps):
            now = logprobs()
            nll = torch.stack([_nll(now[row], text) for row, text in enumerate(texts[:-1])]).mean()
            kl = (before.exp() * (before - now[-1, len(texts[-1].ids) - 1])).sum()
            loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / old.norm() ** 2
            losses.append(loss.item())
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, [delta])
            optimiser.step()
            with torch.no_grad():
                if delta.norm() > config.clamp * old.norm():
                    delta.mul_(config.clamp * old.norm() / delta.norm())
    finally:
        handle.remove()
    return old, delta.detach(), losses


def rome(lm: LM, layer: int, edit: Edit, prefixes: Sequence[str], config: ValueConfig, metric: Tensor) -> Tensor:
    """ROME, equation 2, with the averaged key throughout: the change of the projection, (out, in)."""
    projection = lm.anatomy.mlp_out(layer)
    old, delta, _ = value(lm, projection.module, edit, prefixes, config)
    key = _key(lm, projection.module, edit, prefixes)
    direction = torch.linalg.solve(metric.double(), key.double())
    residual = (old + delta).double() - projection.apply(projection.matrix.double(), key.double())
    return torch.outer(residual, direction) / (direction @ key.double())


def memit(
    lm: LM,
    layers: Sequence[int],
    edits: Sequence[Edit],
    goals: Sequence[Tensor],
    prefixes: Sequence[str],
    metrics: Metrics,
    prior: float,
) -> list[Tensor]:
    """MEMIT, algorithm 1, once the values of the last block's output are known: the change of each block's projection."""
    block = lm.anatomy.block(layers[-1])
    changes: list[Tensor] = []
    kept = {layer: lm.anatomy.mlp_out(layer).module.weight.data for layer in layers}
    try:
        for i, (layer, metric) in enumerate(zip(layers, metrics, strict=True)):
            projection = lm.anatomy.mlp_out(layer)
            keys = torch.stack([_key(lm, projection.module, edit, prefixes) for edit in edits], 1).double()
            now = torch.stack([_output(lm, block, edit) for edit in edits], 1).double()
            residuals = (torch.stack(list(goals), 1).double() - now) / (len(layers) - i)
            dense = prior * metric.double() + keys @ keys.T
            changes.append(torch.linalg.solve(dense, keys @ residuals.T).T)
            weight = projection.module.weight
            step = changes[-1].T if projection.transposed else changes[-1]
            weight.data = (weight.double() + step).to(weight.dtype)
    finally:
        for layer, data in kept.items():
            lm.anatomy.mlp_out(layer).module.weight.data = data
    return changes


def fine_tune(lm: LM, layer: int, edit: Edit, *, lr: float, steps: int, stop_loss: float) -> Tensor:
    """FT-M: Adam on one matrix, the target's loss with the prompt masked; the change of that matrix, (out, in)."""
    text = lm.tokens.encode(edit.prompt, edit.target)
    ids, mask = _padded(lm, [text])
    projection = lm.anatomy.mlp_out(layer)
    weight = projection.module.weight
    with _alone(lm.model, weight):
        old = weight.data
        weight.data = old.clone()
        optimiser = torch.optim.Adam([weight], lr=lr)
        try:
            for _ in range(steps):
                loss = _nll(lm.model(input_ids=ids, attention_mask=mask).logits[0].float().log_softmax(-1), text)
                if loss.item() < stop_loss:
                    break
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
            change = weight.data - old
        finally:
            weight.data = old
    return change.T if projection.transposed else change


@torch.no_grad()
def predict(lm: LM, texts: Sequence[Encoded]) -> list[tuple[int, ...]]:
    """The most likely token at each position of each text's target, one text at a time."""
    found = []
    for text in texts:
        ids, mask = _padded(lm, [text])
        best = lm.model(input_ids=ids, attention_mask=mask).logits[0].argmax(-1)
        found.append(tuple(best[text.target - 1 : -1].tolist()))
    return found


@torch.no_grad()
def write(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    choose: Chooser = greedy,
    stop: Callable[[list[int]], bool] = lambda _: False,
    end: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """What the model writes after each prompt, one prompt at a time, with its own cache of keys and values."""
    texts = []
    for prompt in prompts:
        written: list[int] = []
        ids, cache = torch.tensor([list(prompt)], device=lm.device), None
        while len(written) < max_new:
            out = lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = int(choose(out.logits[:, -1], [(None, tuple(prompt))])[0])
            if token in end:
                break
            written.append(token)
            if stop(written):
                break
            ids = torch.tensor([[token]], device=lm.device)
        texts.append(written)
    return texts


@torch.no_grad()
def second_moment(lm: LM, layer: int, texts: Sequence[Sequence[int]]) -> Tensor:
    """`E[k kᵀ]` at one block, one text at a time through the whole network."""
    module = lm.anatomy.mlp_out(layer).module
    width = lm.anatomy.mlp_out(layer).matrix.shape[1]
    total, count = torch.zeros(width, width, dtype=torch.double), 0

    def see(_module: nn.Module, args: Any) -> None:
        nonlocal total
        keys = args[0].reshape(-1, width).float()
        total += (keys.T @ keys).double().cpu()

    handle = module.register_forward_pre_hook(see)
    try:
        for text in texts:
            _ = lm.model(input_ids=torch.tensor([list(text)], device=lm.device)).logits
            count += len(text)
    finally:
        handle.remove()
    return (total / count).float()


def _padded(lm: LM, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    longest = max(len(text.ids) for text in texts)
    ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in texts], device=lm.device)
    mask = torch.tensor([[1] * len(text.ids) + [0] * (longest - len(text.ids)) for text in texts], device=lm.device)
    return ids, mask


def _nll(logprobs: Tensor, text: Encoded) -> Tensor:
    """The mean over the target's tokens, from the log-probabilities at every position of the text."""
    return -torch.stack([logprobs[i - 1, text.ids[i]] for i in range(text.target, len(text.ids))]).mean()


@torch.no_grad()
def _key(lm: LM, module: nn.Module, edit: Edit, prefixes: Sequence[str]) -> Tensor:
    """What the module reads at the subject's last token, the mean over contexts."""
    texts = [lm.tokens.encode(edit.prompt, subject=edit.subject, prefix=prefix) for prefix in prefixes]
    return _seen(lm, module, texts)[0].mean(0)


@torch.no_grad()
def _output(lm: LM, module: nn.Module, edit: Edit) -> Tensor:
    """What the module puts out at the subject's last token of the bare prompt."""
    return _seen(lm, module, [lm.tokens.encode(edit.prompt, subject=edit.subject)])[1][0]


def _seen(lm: LM, module: nn.Module, texts: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """What the module reads and puts out at the subject of each text."""
    ids, mask = _padded(lm, texts)
    rows, subjects = torch.arange(len(texts)), torch.tensor([text.subject for text in texts])
    seen: list[Tensor] = []

    def see(_module: nn.Module, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        seen.extend(x.reshape(*ids.shape, -1)[rows, subjects].clone() for x in (args[0], hidden))

    handle = module.register_forward_hook(see)
    try:
        lm.model(input_ids=ids, attention_mask=mask)
    finally:
        handle.remove()
    return seen[0], seen[1]


@contextmanager
def _alone(model: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    """Gradients for one parameter and no other."""
    flags = {p: p.requires_grad for p in model.parameters()}
    for p in flags:
        p.requires_grad_(p is weight)
    try:
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        weight.grad = None
