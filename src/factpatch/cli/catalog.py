"""`factpatch methods` and `factpatch models`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from factpatch.cli import options as opt
from factpatch.cli.terminal import line, new_table, out, print_json, progress

if TYPE_CHECKING:
    from factpatch.methods import Method

models = typer.Typer(help="Models with a short name, and the anatomy found in any model.", invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="methods", epilog="[bold]Example[/bold]\n\n  factpatch methods rome")(methods)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see its settings.")] = None,
    as_json: opt.Json = False,
) -> None:
    """All editing methods, what each is and needs; with a name, that method's settings."""
    from factpatch.methods import find, names

    if name is not None:
        _settings(name, as_json)
        return
    found = [find(each) for each in names()]
    rows = [
        {
            "method": method.name,
            "what": _first_line(method),
            "family": method.traits.family,
            "phase": method.traits.phase,
            "paper": method.traits.paper,
            "patch": method.traits.patch.kind,
            "kinds": sorted(method.traits.kinds),
            "subject": "needed" if method.traits.needs_subject else "not needed",
            "many edits": "jointly" if method.traits.joint else "one after the other",
            "in sequence": "earlier edits kept in a sequence",
            "prepares": method.traits.prepares or "nothing",
            "needs": f"models with {method.traits.needs}" if method.traits.needs else "any model",
            "endpoints": not method.traits.patch.needs_weights,
        }
        for method in found
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        line((f"{row['method']:<10}", "bold"), f" {row['what']}")
        subject = ", needs the subject" if row["subject"] == "needed" else ""
        line((f"{'':<11}{row['family']} ({row['phase']}), {row['paper']}", "dim"))
        made = f"{row['patch']} patch, many edits {row['many edits']}, {row['in sequence']}{subject}"
        line((f"{'':<11}{made}; prepares {row['prepares']}; fits {row['needs']}", "dim"))
    line(("Settings and presets of one: factpatch methods NAME", "dim"))


def _first_line(method: type[Method[Any]]) -> str:
    """What the method says of itself."""
    return (method.__doc__ or "").strip().splitlines()[0]


def _settings(name: str, as_json: bool) -> None:
    from factpatch.methods import find

    method = find(name)
    fields = method.config_type.model_fields
    rows = [{"setting": key, "default": field.default, "meaning": field.description} for key, field in fields.items()]
    presets = [{"shape": list(p.shape), "values": dict(p.values), "source": p.source} for p in method.presets]
    if as_json:
        print_json({"method": name, "settings": rows, "presets": presets})
        return
    line((name, "bold"), f"  {method.traits.paper}\n")
    table = new_table("setting", "default", "meaning")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)
    for preset in method.presets:
        values = ", ".join(f"{key}={value}" for key, value in preset.values.items())
        line(f"\n{preset.shape[0]} blocks of width {preset.shape[1]}: {values}\n  ", (preset.source, "dim"))


@models.callback()
def list_models(context: typer.Context, as_json: opt.Json = False) -> None:
    """Models with a short name, one line each. Folders, .gguf files and hub ids work everywhere too."""
    if context.invoked_subcommand is not None:
        return
    from factpatch.lm.catalog import CATALOG, DEFAULT_MODEL
    from factpatch.lm.fetch import is_fetched

    rows = [
        {
            "name": entry.name,
            "model": entry.title,
            "parameters": entry.parameters,
            "download": f"{entry.download_mb} MB",
            "licence": entry.licence,
            "fetched": is_fetched(entry.name),
            "default": entry.name == DEFAULT_MODEL,
        }
        for entry in CATALOG.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        marks = ("fetched" if row["fetched"] else "not fetched yet") + (", default" if row["default"] else "")
        about = f"  {row['model']}, {row['parameters']}, {row['download']}, {row['licence']} "
        line((str(row["name"]), "bold"), about, (f"({marks})", "dim"))


@models.command(name="show", epilog="[bold]Example[/bold]\n\n  factpatch models show smollm2-135m")
def show_model(
    model: Annotated[str, typer.Argument(help="Short name, folder, .gguf file, or hub id.")],
    as_json: opt.Json = False,
) -> None:
    """Where a model lies on this machine, and the anatomy found in it: its blocks, projections, norm and head."""
    from factpatch.export.using import folder_of
    from factpatch.lm import load

    with progress() as report:
        lm = load(model, progress=report)
    folder = folder_of(lm)
    described = {"folder": str(folder) if folder else None, **lm.describe()}
    if as_json:
        print_json(described)
        return
    for key, value in described.items():
        line(f"{key.replace('_', ' '):>20}  {value if value not in (None, '') else '–'}")
