"""The options that several commands have, so that one name means one thing: `model: opt.Model = opt.DEFAULT_MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_MODEL = "smollm2-135m"  # as in factpatch.lm.catalog, which takes torch
DTypeName = Literal["float32", "bfloat16", "float16"]  # as in factpatch.lm.load

# The model, and how it is asked.
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Short name, folder with a checkpoint, .gguf file, hub id, or openai:NAME."),
]
OptionalModel = Annotated[
    str | None, typer.Option("--model", "-m", help=f"As for the other commands; default: {DEFAULT_MODEL}.")
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="Of --model openai:NAME: where the server is, up to /v1.")
]
Patches = Annotated[
    list[Path] | None, typer.Option("--patch", help="Patch folder, laid on the model; may be repeated, in order.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")]
DType = Annotated[DTypeName | None, typer.Option("--dtype", help="Type of the weights; default: float32 on a CPU.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one.")]

# The method.
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method, such as --set layer=8, or @FILE for a preset; may be repeated.",
    ),
]
Methods = Annotated[list[str], typer.Option("--method", help="May be repeated; see: factpatch methods")]
MethodSettings = Annotated[
    list[str] | None, typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A setting of a method; may be repeated.")
]

Minutes = Annotated[
    float | None,
    typer.Option("--minutes", min=0, help="Of --method auto: how long it may take to find one; default: no end."),
]

# The edits: one, or a file of them.
Prompt = Annotated[str | None, typer.Option(help="What the model is asked, without the answer.")]
Target = Annotated[str | None, typer.Option(help="What it should say.")]
Subject = Annotated[str | None, typer.Option(help="The part of the prompt the fact is about.")]
Rephrase = Annotated[list[str] | None, typer.Option(help="Another wording to test it with; may be repeated.")]
Unrelated = Annotated[list[str] | None, typer.Option(help="A prompt whose answer must stay as it is; may be repeated.")]
Edits = Annotated[str | None, typer.Option(help="Many edits: a .jsonl or .csv file, or NAME:PATH.")]
Data = Annotated[str, typer.Option(help="NAME:PATH, the path of a file of your own, or sample; see: factpatch data")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many edits.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Count and leave out records that cannot be read.")]

# What is asked besides.
Retain = Annotated[
    Path | None,
    typer.Option(
        help="Questions that must be answered as before, asked after each patch: .txt, .jsonl, .json or .csv."
    ),
]
Require = Annotated[
    list[str] | None,
    typer.Option(
        help="What the patch must show, or it is not saved: edit_success>=1, rephrase>=0.8, locality>=0.95, "
        "fluency_drop<=5%, retained>=1, mergeable; survey.NAME for the other protocol; may be repeated."
    ),
]
Propose = Annotated[
    bool,
    typer.Option("--propose/--no-propose", help="Make up wordings and neighbours to ask where the edits have none."),
]
Judge = Annotated[
    str | None,
    typer.Option(help="openai:NAME of a model that says which free answers are right, however they are put."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(help="Address of the judge, such as http://localhost:8000/v1; default: OpenAI's own.")
]

# A workspace.
Stack = Annotated[
    Path | None, typer.Option("--workspace", "-C", help="A workspace, whose model and patches are taken.")
]
Workspace = Annotated[Path, typer.Option("--workspace", "-C", help="The workspace's folder; default: this one.")]
At = Annotated[int | None, typer.Option("--at", min=1, metavar="N", help="As it was after entry N; default: the last.")]
Author = Annotated[str | None, typer.Option(help="Who does it; default: the user.")]
Message = Annotated[str, typer.Option("--message", help="Why; goes into the ledger.")]
AllowConflicts = Annotated[
    bool,
    typer.Option(
        "--allow-conflicts", help="Even if an edit is there already, or contradicts or takes back one that is."
    ),
]

# What is written.
Pictures = Annotated[
    Path | None, typer.Option("--out", help="Folder for pictures (SVG) with their numbers (CSV) beside them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
