"""How much faster tracing is than one forward pass for each place and sample; and that plain path, to which tests hold ours.

    python benchmarks/tracing.py --facts 2 --out docs/results/tracing-speed.md

Both run in float32 over the same facts with the same noise. The plain path takes the whole model, all columns and the head
everywhere, once for each token, block and sample of noise, as the paper describes it; where that would take too long, only
some of its passes are made (`--share`) and the time is scaled. Nothing else should run meanwhile.
"""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from factpatch.analysis.facts import Fact, known_facts
from factpatch.analysis.tracing import PARTS, Part, encoded_fact, subject_noise, trace, usual_window
from factpatch.cli.terminal import progress
from factpatch.data import read
from factpatch.files import whole_file
from factpatch.lm import LM, load

Place = tuple[int, int]
"""Token and block."""


@torch.no_grad()
def plain(
    lm: LM,
    fact: Fact,
    part: Part,
    window: int,
    *,
    samples: int,
    noise: float,
    seed: int,
    places: Sequence[Place] | None = None,
) -> tuple[float, float, dict[Place, float]]:
    """The answer's probability: clean, corrupted, and by place (all of them by default) restored; means over samples."""
    text = encoded_fact(lm, fact)
    ids = torch.tensor([text.prompt_ids], device=lm.device)
    tokens, layers = ids.shape[1], lm.anatomy.n_layers
    assert text.begin is not None
    draws = subject_noise(lm, text, samples=samples, noise=noise, seed=seed).to(lm.device)
    sites = [_site(lm, part, layer) for layer in range(layers)]
    kept: list[Tensor] = []

    def probability() -> float:
        return float(lm.model(input_ids=ids).logits[0, -1].float().softmax(-1)[text.target_ids[0]])

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        kept.append(_hidden(out).reshape(tokens, -1).clone())

    def harm(draw: Tensor) -> Any:
        def add(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, text.begin : text.begin + len(draw)] += draw
            return out

        return lm.anatomy.embedding, add

    def restore(token: int, layer: int) -> Any:
        def put(_module: nn.Module, _args: Any, out: Any) -> Any:
            hidden = _hidden(out).clone()
            hidden.view(tokens, -1)[token] = kept[layer][token]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return sites[layer], put

    with _hooked([(site, keep) for site in sites]):
        clean = probability()
    corrupted = 0.0
    wanted = [(t, layer) for t in range(tokens) for layer in range(layers)] if places is None else places
    restored = dict.fromkeys(wanted, 0.0)
    for draw in draws:
        with _hooked([harm(draw)]):
            corrupted += probability() / samples
        for token, layer in wanted:
            around = range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))
            with _hooked([harm(draw), *(restore(token, block) for block in around)]):
                restored[token, layer] += probability() / samples
    return clean, corrupted, restored


def _site(lm: LM, part: Part, layer: int) -> nn.Module:
    """The block, or the whole module of its MLP or attention; its last map where that module adds the residual stream too."""
    block, layout = lm.anatomy.block(layer), lm.anatomy.layout
    if part == "state":
        return block
    whole, last = (layout.mlp, layout.mlp_out) if part == "mlp" else (layout.attention, layout.attention_out)
    module = block.get_submodule(whole)
    is_bare = module is not block and "residual" not in inspect.signature(module.forward).parameters
    return module if is_bare else block.get_submodule(last)


def _hidden(out: Any) -> Tensor:
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def main(
    model: str = "smollm2-135m",
    data: Annotated[str, typer.Option(help="edits, of which facts the model knows are taken")] = "sample",
    facts: Annotated[int, typer.Option(help="how many")] = 1,
    part: Annotated[str, typer.Option(help="state, mlp, attention, separated by commas")] = ",".join(PARTS),
    samples: int = 10,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="of the plain path's passes to make")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
) -> None:
    """Trace by both, and print a row for each fact and part."""
    with progress() as report:
        lm = load(model, device="cpu", dtype="float32", progress=report)
        known = known_facts(lm, read(data).edits)[:facts]
        trace(lm, known[0], samples=1)  # what is made once for each model
        rows: list[str] = []
        ratios: list[float] = []
        for fact in known:
            for name in PARTS:
                if name in part.split(","):
                    report(f"Tracing {fact.subject}, {name}", 0, None)
                    row, ratio = _compare(lm, fact, name, samples, share)
                    rows.append(row)
                    ratios.append(ratio)
                    typer.echo(row)
    typer.echo(f"median ratio {median(ratios):.1f}")
    if out is not None:
        _write(out, rows, ratios, lm, samples, share)


def _compare(lm: LM, fact: Fact, part: Part, samples: int, share: float) -> tuple[str, float]:
    layers = lm.anatomy.n_layers
    settings: dict[str, Any] = {"samples": samples, "noise": 3.0, "seed": 0}
    start = time.perf_counter()
    found = trace(lm, fact, part=part, **settings)
    ours = time.perf_counter() - start
    every = [(token, layer) for token in range(len(found.tokens)) for layer in range(layers)]
    places = every[:: round(1 / share)]
    start = time.perf_counter()
    _, _, restored = plain(lm, fact, part, usual_window(part, layers), places=places, **settings)
    theirs = (time.perf_counter() - start) * len(every) / len(places)
    apart = max(abs(float(found.restored[place]) - p) for place, p in restored.items())
    ratio = theirs / ours
    first, end = found.subject
    cells = (
        fact.prompt,
        part,
        f"{len(found.tokens)}, subject {first + 1} to {end}",
        f"{len(every) * samples}",
        f"{theirs:.1f}",
        f"{ours:.1f}",
        f"{ratio:.1f}",
        f"{apart:.1e}",
    )
    return "| " + " | ".join(cells) + " |", ratio


def _write(out: Path, rows: Sequence[str], ratios: Sequence[float], lm: LM, samples: int, share: float) -> None:
    head = (
        "fact",
        "restored",
        "tokens",
        "passes of the plain path",
        "plain, s",
        "ours, s",
        "ratio",
        "greatest difference of p",
    )
    lines = [
        "# Tracing: ours beside one forward pass for each place and sample",
        "",
        f"    python {shlex.join(sys.argv)}",
        "",
        f"{date.today().isoformat()}, {lm.name}, float32, {torch.get_num_threads()} threads, torch {version('torch')}, "
        f"transformers {version('transformers')}. {samples} samples of noise; of the plain path {share:.0%} of the places "
        "were restored, spread evenly, and its time is scaled.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * 3 + " ---: |" * (len(head) - 3),
        *rows,
        "",
        f"Median ratio {median(ratios):.1f}, least {min(ratios):.1f}.",
        "",
    ]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
