"""What edits cost on a large model on a CUDA device: seconds, edits a minute, peak memory.

    python benchmarks/gpu.py --out docs/results/gpu.md

The model has Llama-2-7B's shape, weights at random and the default model's tokenizer (so its vocabulary is larger), which is
all that speed and memory depend on; it needs no network once the default model is in the cache. `--device cpu --blocks 2`
tries the script where there is no such device.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scaling import Row, measure, table
from transformers import LlamaConfig, LlamaForCausalLM

from factpatch.cli.terminal import progress
from factpatch.files import whole_file
from factpatch.lm import LM, load

# Weights at random hardly take an edit, so the searches take all of the published number of steps.
SEARCH: dict[str, Any] = {"steps": 25, "stop_loss": 0.0}
RUNS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("rome", 1, SEARCH),
    ("ft-m", 1, SEARCH),
    ("memit", 1, SEARCH),
    ("memit", 100, SEARCH),
    ("ultraedit", 100, {}),
    ("ultraedit", 1000, {}),
    ("alphaedit", 100, SEARCH),  # the last, for sorting its directions takes long
)


def main(
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
    device: str = "cuda",
    blocks: Annotated[int, typer.Option(help="of the model; Llama-2-7B has 32")] = 32,
    seed: int = 0,
) -> None:
    """Build the model, and measure; the page is written anew after each row."""
    rows: list[Row] = []
    with progress() as report:
        report("Building the model", 0, None)
        lm = _model(torch.device(device), blocks, seed)
        for name, edits, settings in RUNS:
            report(f"{edits} edits with {name}", 0, None)
            rows.append(measure(lm, name, edits, settings))
            typer.echo(table(rows[-1:])[-1])
            if out is not None:
                _write(out, rows, lm)


def _write(out: Path, rows: Sequence[Row], lm: LM) -> None:
    size = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 1e6
    what = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else str(lm.device)
    lines = [
        "# Edits of a model of Llama-2-7B's shape",
        "",
        f"{lm.anatomy.n_layers} blocks, weights at random, bfloat16, {size:,.0f} MB, on {what}. The searches for values and FT-M "
        f"take all {SEARCH['steps']} steps. factpatch {version('factpatch')}, torch {version('torch')}. {date.today()}.",
        "",
        f"    python benchmarks/gpu.py {shlex.join(sys.argv[1:])}",
        "",
        *table(rows),
    ]
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _model(device: torch.device, blocks: int, seed: int) -> LM:
    tokenizer = load("smollm2-135m").tokenizer
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
