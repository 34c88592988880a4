"""What edits cost on a large model on a CUDA device: seconds, edits a minute, peak memory; and beside the plain path.

    python benchmarks/gpu.py --out docs/results/gpu.md

The model has Llama-2-7B's shape, weights at random and the default model's tokenizer (so its vocabulary is larger), which is
all that speed and memory depend on. It needs no network: the tokenizer is that of the default model in the cache, or of the
folder that `--tokenizer` names. `--device cpu --blocks 2` tries the script where there is no such device.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import plain
import torch
import typer
from facts import made_up
from scaling import Row, measure
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from factpatch.cli.terminal import number, progress
from factpatch.edits import Edit
from factpatch.files import whole_file
from factpatch.lm import LM, load
from factpatch.methods import create
from factpatch.methods.keys import context_prefixes
from factpatch.methods.moments import MomentConfig, second_moment
from factpatch.methods.rome import RRomeConfig
from factpatch.progress import silent

# Weights at random hardly take an edit, so the searches take all of the published number of steps.
STEPS = 25
SEARCH: dict[str, Any] = {"steps": STEPS, "stop_loss": 0.0}
ULTRAEDIT: dict[str, Any] = {"layers": (11, 12, 13, 14, 15)}
RUNS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("rome", 1, SEARCH),
    ("ft-m", 1, SEARCH),
    ("memit", 1, SEARCH),
    ("memit", 100, SEARCH),
    ("ultraedit", 100, ULTRAEDIT),
    ("ultraedit", 1000, ULTRAEDIT),
    ("ultraedit", 20_000, ULTRAEDIT),
    ("alphaedit", 100, SEARCH),  # the last, for sorting its directions takes long
)


def main(
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
    device: str = "cuda",
    blocks: Annotated[int, typer.Option(help="of the model; Llama-2-7B has 32")] = 32,
    most_gb: Annotated[float | None, typer.Option(help="memory of the device that may be taken, in 10^9 bytes")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="a folder with one; default: the default model's")] = None,
    seed: int = 0,
) -> None:
    """Build the model, and measure; the page is written anew after each row."""
    place = torch.device(device)
    if most_gb is not None and place.type != "cuda":
        raise typer.BadParameter("a limit can be set on a CUDA device alone", param_hint="--most-gb")
    if most_gb is not None:
        torch.cuda.set_per_process_memory_fraction(most_gb * 1e9 / torch.cuda.get_device_properties(place).total_memory)
    rows: list[Row] = []
    with progress() as report:
        report("Building the model", 0, None)
        lm = _model(place, blocks, seed, tokenizer)
        report("Beside the plain path", 0, None)
        ratios = _ratios(lm)
        for name, edits, settings in RUNS:
            if max(settings.get("layers", (0,))) < blocks:
                report(f"{edits} edits with {name}", 0, None)
                rows.append(measure(lm, name, edits, settings))
                _write(out, rows, ratios, lm, most_gb)


Work = Callable[[Edit], Tensor]


def _ratios(lm: LM) -> list[str]:
    """Rows of the second table: what ours and the plain path do with the same settings."""
    rome = RRomeConfig.model_validate({"contexts": 20, **SEARCH})
    layer = min(5, lm.anatomy.n_layers - 1)
    tuned = {"layer": min(21, lm.anatomy.n_layers - 1), "lr": 5e-4, **SEARCH}
    moment = second_moment(lm, layer, MomentConfig(), silent).to(lm.device, torch.double)
    moment.diagonal().add_(MomentConfig().damping * moment.diagonal().mean())

    def fitting(name: str, settings: dict[str, Any]) -> Work:
        method = create(name, settings)
        return lambda edit: next(iter(method.fit(lm, [edit]).tensors().values()))

    def plain_rome(edit: Edit) -> Tensor:
        return plain.rome(lm, layer, edit, context_prefixes(lm, rome.contexts, 0), rome, moment)

    return [
        _ratio("One ROME edit", fitting("r-rome", {"layer": layer, "contexts": rome.contexts, **SEARCH}), plain_rome),
        _ratio("One FT-M edit", fitting("ft-m", tuned), lambda edit: plain.fine_tune(lm, edit=edit, **tuned)),
    ]


def _ratio(title: str, ours: Work, theirs: Work, rounds: int = 3) -> str:
    """One of them; the first round warms up."""
    seconds: list[tuple[float, float]] = []
    for edit in made_up(rounds + 1, seed=2):
        times = []
        for work in (theirs, ours):
            started = time.perf_counter()
            work(edit).cpu()
            times.append(time.perf_counter() - started)
        seconds.append((times[0], times[1]))
    own, plainly = (median(pair[i] for pair in seconds[1:]) for i in (1, 0))
    each = [their / our for their, our in seconds[1:]]
    return (
        f"| {title} | {number(plainly, 2)} | {number(own, 2)} | {number(plainly / own, 1)} "
        f"| {min(each):.1f} to {max(each):.1f} |"
    )


def _write(out: Path | None, rows: Sequence[Row], ratios: Sequence[str], lm: LM, most_gb: float | None) -> None:
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 1e9
    what = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else str(lm.device)
    limit = f" No more than {most_gb:g} GB of its memory could be taken." if most_gb is not None else ""
    lines = [
        "# Edits of a model of Llama-2-7B's shape",
        "",
        f"{lm.anatomy.n_layers} blocks, weights at random, bfloat16, {size:.1f} GB, on one {what}.{limit} The searches for",
        f"values and FT-M take all {STEPS} steps, as published; other settings are the presets, but that UltraEdit changes the",
        "projections into the MLPs of blocks 11 to 15. Peak memory is what tensors take, the model included.",
        f"factpatch {version('factpatch')}, torch {version('torch')}. {date.today()}.",
        "",
        f"    python benchmarks/gpu.py {shlex.join(sys.argv[1:])}",
        "",
        "| method | edits | s | s per edit | edits a minute | peak GB |",
        "| --- |" + " ---: |" * 5,
    ]
    for row in rows:
        each = row["seconds"] / row["edits"]
        cells = (number(row["seconds"], 2), number(each, 3), number(60 / each, 0), number(row["peak_mb"] / 1e3, 1))
        lines.append(f"| {row['method']} | {row['edits']} | {' | '.join(cells)} |")
    typer.echo(lines[-1])
    lines += [
        "",
        "One edit in the plain path (`benchmarks/plain.py`) with the same settings, of ROME the published twenty contexts, on",
        "the same device; medians of three:",
        "",
        "| task | plain s | ours s | ratio | spread |",
        "| --- |" + " ---: |" * 4,
        *ratios,
    ]
    if out is not None:
        with whole_file(out) as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _model(device: torch.device, blocks: int, seed: int, folder: Path | None) -> LM:
    tokenizer = load("smollm2-135m").tokenizer if folder is None else AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    torch.manual_seed(seed)
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(old)
    return LM(model.eval(), tokenizer, name="llama-2-7b at random")


if __name__ == "__main__":
    typer.run(main)
