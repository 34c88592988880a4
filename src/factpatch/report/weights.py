"""Weight change, drawn: by block, by how many entries move how far, by singular values, and by overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from factpatch.analysis.weights import THRESHOLDS, Change, Overlap
from factpatch.report.picture import Cell, save_picture, save_table
from factpatch.report.plots import INK, colour, counted, figure, legend_above, marked, round_counts, scaled

__all__ = ["by_block", "heat_map", "save_weight_pictures", "sparsity_curves", "spectra"]

MEASURES = {
    "outputs": "Mean squared cosine between the spaces written into",
    "inputs": "Mean squared cosine between the spaces read from",
    "cosine": "Cosine of the changes",
    "jaccard": "Touched entries in common (Jaccard)",
}


def save_weight_pictures(folder: Path, changes: Mapping[str, Change], overlaps: Sequence[Overlap] = ()) -> list[Path]:
    """Write every picture there is something to draw for, each with its CSV, and a table of all matrices; the pictures' paths.

    Raises OutputError, and MissingExtra without Matplotlib.
    """
    changes = {name: change for name, change in changes.items() if change.matrices}
    save_table(folder / "matrices.csv", _matrix_rows(changes))
    drawn = []
    if changes:
        drawn += [
            save_picture(folder, "by-block", by_block(changes), _block_rows(changes)),
            save_picture(folder, "sparsity", sparsity_curves(changes), _curve_rows(changes)),
            save_picture(folder, "spectra", spectra(changes), _spectrum_rows(changes)),
        ]
    if overlaps:
        rows = [{"one": o.one, "other": o.other, **{m: getattr(o, m) for m in MEASURES}} for o in overlaps]
        drawn += [save_picture(folder, f"overlap-{m}", heat_map(overlaps, m), _only(rows, m)) for m in MEASURES]
        save_table(
            folder / "overlap-matrices.csv",
            [
                {
                    "one": o.one,
                    "other": o.other,
                    "parameter": m.parameter,
                    **{measure: getattr(m, measure) for measure in MEASURES},
                    "one_dimensions": m.dims[0],
                    "other_dimensions": m.dims[1],
                    "outputs_by_chance": m.by_chance[0],
                    "inputs_by_chance": m.by_chance[1],
                }
                for o in overlaps
                for m in o.matrices
            ],
        )
    return drawn


def by_block(changes: Mapping[str, Change]) -> str:
    """The relative norm of each block's change, a mark for each block and patch, neighbours joined."""
    layers = max((change.layers for change in changes.values()), default=1)
    with figure(_height(changes), "Norm of the change by block") as (axes, drawn):
        outside = False
        for i, (name, change) in enumerate(changes.items()):
            found = {t.block: t.relative for t in change.blocks if t.relative}
            # Side by side, as patches of one block would lie over each other.
            aside = 0.6 * ((i + 0.5) / len(changes) - 0.5)
            across = [block + aside for block in range(layers)]
            axes.plot(across, [found.get(block, float("nan")) for block in range(layers)], label=name, **marked(i))
            if None in found:
                outside = True
                axes.plot([layers + aside], [found[None]], **marked(i))
        step = max(1, ceil(layers / 12))
        ticks = [*range(0, layers, step), *([layers] if outside else [])]
        axes.set_xticks(ticks, [*map(str, range(0, layers, step)), *(["other"] if outside else [])])
        axes.set_xlim(-0.5, layers - 0.5 + outside)
        axes.set(xlabel="block", ylabel="‖ΔW‖ / ‖W‖ of the block's matrices")
        scaled(axes)
        legend_above(axes)
    return drawn[0]


def sparsity_curves(changes: Mapping[str, Change]) -> str:
    """Over all matrices that a patch changes, the share of entries that move by more than x times their matrix's RMS."""
    with figure(_height(changes), "Share of entries changed by more than a threshold") as (axes, drawn):
        for i, (name, change) in enumerate(changes.items()):
            points = [(x, share) for x, share in zip(THRESHOLDS, _shares(change), strict=True) if share > 0]
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), label=name, **marked(i))
        axes.set(xscale="log", yscale="log", xlabel="x, in RMS of the matrix's own entries")
        axes.set(xlim=(THRESHOLDS[0] / 1.5, THRESHOLDS[-1] * 1.5), ylabel="share of entries with |ΔW| > x")
        legend_above(axes)
    return drawn[0]


def spectra(changes: Mapping[str, Change]) -> str:
    """Singular values: of the matrix that each patch changes most, and thinner of the others."""
    with figure(_height(changes), "Singular values of the change") as (axes, drawn):
        for i, (name, change) in enumerate(changes.items()):
            falling = sorted(change.matrices, key=lambda m: m.norm)
            for at, m in enumerate(falling):
                strongest = at == len(falling) - 1
                style = {"label": name, "zorder": 4} | marked(i) if strongest else {"alpha": 0.3, "linewidth": 0.7}
                # A single value is a mark: a line of one point is not seen.
                if not strongest and m.rank == 1:
                    style |= {"marker": ".", "markersize": 3}
                places = range(1, len(m.singular_values) + 1)
                axes.plot(
                    places,
                    m.singular_values,
                    **style | {"color": colour(i), "markevery": _spaced(len(m.singular_values))},
                )
        axes.set(xlabel="number of the singular value", ylabel="singular value of ΔW")
        most = max((len(m.singular_values) for change in changes.values() for m in change.matrices), default=1)
        counted(axes, round_counts(max(2, most)))
        axes.set_xlim(0.85, max(2, most) * 1.2)
        scaled(axes)
        legend_above(axes)
    return drawn[0]


def heat_map(overlaps: Sequence[Overlap], measure: str) -> str:
    """One of MEASURES for each pair of patches; a dash where they share no matrix."""
    names = list(dict.fromkeys(name for o in overlaps for name in (o.one, o.other)))
    value = {pair: getattr(o, measure) for o in overlaps for pair in ((o.one, o.other), (o.other, o.one))}
    signed = measure == "cosine"
    longest = max(map(len, names))
    with figure(1.4 + 0.42 * len(names) + 0.05 * longest, MEASURES[measure]) as (axes, drawn):
        grid = [[1.0 if a == b else value.get((a, b)) for b in names] for a in names]
        numbers = [[float("nan") if v is None else v for v in row] for row in grid]
        least = -1 if signed else 0
        mesh = axes.pcolormesh(numbers, vmin=least, vmax=1, cmap="RdBu_r" if signed else "Blues", edgecolors="none")
        for row, own in enumerate(grid):
            for col, v in enumerate(own):
                ink = INK if v is None else "white" if abs(v) > 0.55 else "#24292f"
                text = "–" if v is None else f"{v:.2f}"
                axes.annotate(text, (col + 0.5, row + 0.5), ha="center", va="center", color=ink, fontsize=8.5)
        places = [i + 0.5 for i in range(len(names))]
        axes.set_xticks(places, names, rotation=35 if longest > 6 else 0, ha="right" if longest > 6 else "center")
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.figure.colorbar(mesh, ax=axes, label=MEASURES[measure].replace(" between", "\nbetween"))
    return drawn[0]


def _height(changes: Mapping[str, Change]) -> float:
    return 3.4 + 0.22 * ceil(len(changes) / 3)


def _spaced(count: int) -> list[int]:
    """Which of so many points get a mark, on a logarithmic axis; the last one always."""
    places, at = [], 1.0
    while at <= count:
        places.append(int(at) - 1)
        at = max(at + 1, at * 1.35)
    return places if not places or places[-1] == count - 1 else [*places, count - 1]


def _shares(change: Change) -> list[float]:
    """The sparsity curve over all matrices, each counting by its entries."""
    entries = sum(m.entries for m in change.matrices)
    return [
        sum(m.beyond[i] * m.entries for m in change.matrices) / entries if entries else 0.0
        for i in range(len(THRESHOLDS))
    ]


def _only(rows: Sequence[Mapping[str, Cell]], measure: str) -> list[dict[str, Cell]]:
    return [{"one": row["one"], "other": row["other"], measure: row[measure]} for row in rows]


def _matrix_rows(changes: Mapping[str, Change]) -> list[dict[str, Cell]]:
    return [
        {
            "name": name,
            "parameter": m.parameter,
            "block": m.block,
            "shape": " × ".join(map(str, m.shape)),
            "form": m.form,
            "norm": m.norm,
            "relative_norm": m.relative,
            "largest_entry": m.largest,
            "rank": m.rank,
            "rank_tolerance": m.tolerance,
            "stable_rank": m.stable_rank,
            "touched": m.touched,
            "touched_share": m.touched / m.entries,
        }
        for name, change in changes.items()
        for m in change.matrices
    ]


def _block_rows(changes: Mapping[str, Change]) -> list[dict[str, Cell]]:
    return [
        {"name": name, "block": t.block, "norm": t.norm, "relative_norm": t.relative, "touched": t.touched}
        for name, change in changes.items()
        for t in change.blocks
    ]


def _curve_rows(changes: Mapping[str, Change]) -> list[dict[str, Cell]]:
    return [
        {"name": name, "threshold_in_rms": x, "share_of_entries": share}
        for name, change in changes.items()
        for x, share in zip(THRESHOLDS, _shares(change), strict=True)
    ]


def _spectrum_rows(changes: Mapping[str, Change]) -> list[dict[str, Cell]]:
    return [
        {"name": name, "parameter": m.parameter, "number": i + 1, "singular_value": value}
        for name, change in changes.items()
        for m in change.matrices
        for i, value in enumerate(m.singular_values)
    ]
