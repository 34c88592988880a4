"""How much faster ours is than the plain path, in one run: ratios with their spread, and how far the machine allows more.

    python benchmarks/speed.py --data zsre:../shared/knowedit/ZsRE/ZsRE-test-all.json --out docs/results/performance.md

The plain paths are in `plain.py`. Each task is done by both in turn, with the same settings, and what they give is compared;
where the plain path would take hours it does a part of the work, edit by edit, and its time is scaled. The last tasks
lay ours with its presets beside the plain path with the published settings. Nothing else should run meanwhile. Without
`--data` the built-in sample is used; `--only rome,ft-m` runs some of the tasks, and `--out` is left out to look only.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any
from unittest.mock import patch as patched

import plain
import psutil
import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from factpatch.bench.singles import ABREAST
from factpatch.cli.terminal import number, progress
from factpatch.data import Dataset, read
from factpatch.edits import Edit, Probe
from factpatch.errors import CannotEdit, TokenizerError
from factpatch.files import whole_file
from factpatch.lm import LM, load
from factpatch.lm.sentences import first_sentence, has_ended
from factpatch.lm.writing import Sampler, generate
from factpatch.methods import create
from factpatch.methods.keys import context_prefixes
from factpatch.methods.memit import MemitConfig
from factpatch.methods.moments import MomentConfig, second_moments
from factpatch.methods.rome import RRomeConfig
from factpatch.patches import Dense, Provenance, WeightPatch
from factpatch.progress import silent
from factpatch.scoring import Scorer
from factpatch.scoring.protocols import ProtocolName
from factpatch.scoring.scorer import FLUENCY_TOKENS

Work = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Task:
    """Something both can do.

    units    for each round, the edits or texts that ours works on; the plain path takes the first `part` of them
    target   the ratio to reach
    differs  how far the two results are apart, on the part; None where they are not meant to be the same
    """

    name: str
    title: str
    ours: Work
    plain: Work
    units: Sequence[Sequence[Any]]
    part: int
    target: float | None = None
    differs: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True)
class Timed:
    """What came of a task: seconds of each round, those of the plain path scaled to all units; and of ours:

    operations  floating-point operations, counted
    products    seconds that its products of matrices take by themselves
    hot         its profile
    """

    task: Task
    ours: list[float]
    plain: list[float]
    difference: float | None
    operations: float
    products: float
    hot: list[tuple[str, float]]

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by the medians."""
        return median(self.plain) / median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest ratio of one round."""
        ratios = [theirs / own for theirs, own in zip(self.plain, self.ours, strict=True)]
        return min(ratios), max(ratios)


def main(
    data: Annotated[str, typer.Option(help="edits to work on")] = "sample",
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
    only: Annotated[str, typer.Option(help="some of the tasks, separated by commas; default: all")] = "",
    edits: Annotated[int, typer.Option(help="in a batch, and to score")] = 100,
    rounds: Annotated[int, typer.Option(help="of the shorter tasks")] = 3,
    model: str = "smollm2-135m",
) -> None:
    """Run the tasks, and print the table after each; or write it into a page."""
    dataset = read(data)
    with progress() as report:
        lm = load(model, device="cpu", progress=report)
        usable = _usable(lm, dataset)[: max(edits, rounds)]
        rate = _rate()
        done: list[Timed] = []
        for task in _tasks(lm, usable, edits, rounds):
            if not only or task.name in only.split(","):
                report(task.title, 0, None)
                done.append(_run(task))
                typer.echo(_row(done[-1], rate))
                if out is not None:
                    _write(out, done, rate, lm, dataset)


def _usable(lm: LM, dataset: Dataset) -> list[Edit]:
    """Edits that name a subject which stands in the prompt, and a target."""
    found = []
    for edit in dataset.edits:
        if not edit.subject or edit.kind not in {"insert", "modify"}:
            continue
        try:
            lm.tokens.encode(edit.prompt, edit.target, subject=edit.subject)
        except (CannotEdit, TokenizerError):
            continue
        found.append(edit)
    return found


def _run(task: Task) -> Timed:
    """First on the part, untimed, to compare and to count; then in turns."""
    part = task.units[0][: task.part]
    with FlopCounterMode(display=False) as counter:
        own = task.ours(part)
    difference = task.differs(own, task.plain(part)) if task.differs else None
    ours, theirs = [], []
    for units in task.units:
        theirs.append(_seconds(task.plain, units[: task.part]) * len(units) / task.part)
        ours.append(_seconds(task.ours, units))
    with _Products() as products:
        task.ours(part)
    scale = len(task.units[0]) / task.part
    operations, alone = counter.get_total_flops() * scale, products.seconds() * scale
    return Timed(task, ours, theirs, difference, operations, alone, _hot(task.ours, part))


def _seconds(work: Work, units: Sequence[Any]) -> float:
    started = time.perf_counter()
    work(units)
    return time.perf_counter() - started


def _hot(work: Work, units: Sequence[Any], most: int = 6) -> list[tuple[str, float]]:
    """The operations that take the most time of ours, and their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work(units)
    found = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in found)
    return [(event.key.removeprefix("aten::"), event.self_cpu_time_total / whole) for event in found[:most]]


class _Products(TorchDispatchMode):
    """Takes note of every product of matrices, to do each again by itself."""

    operations = frozenset({torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm})

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.operations:
            layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in args if isinstance(x, Tensor))
            self.seen[func, layouts] += 1
        return func(*args, **(kwargs or {}))

    def seconds(self, held: int = 2**27, rounds: int = 5) -> float:
        """Of all of them. Operands take turns, `held` bytes in all, as a model's weights do: none waits in the cache."""
        whole = 0.0
        for (product, layouts), count in self.seen.items():
            first = [torch.empty_strided(shape, strides, dtype=dtype).zero_() for shape, strides, dtype in layouts]
            copies = held // sum(x.numel() * x.itemsize for x in first)
            operands = cycle([first, *([torch.zeros_like(x) for x in first] for _ in range(copies))])
            whole += count * median(_seconds(lambda x: product(*x), next(operands)) for _ in range(rounds))  # noqa: B023
        return whole


def _rate(rows: int = 256) -> float:
    """Floating-point operations a second of a product of matrices as an MLP's, the best of many."""
    x, weight = torch.randn(rows, 576), torch.randn(1536, 576)
    best = min(_seconds(lambda _: torch.nn.functional.linear(x, weight), ()) for _ in range(200))
    return 2 * x.numel() * len(weight) / best


def _tasks(lm: LM, edits: Sequence[Edit], many: int, rounds: int) -> list[Task]:
    """The same settings first; then presets beside the published settings."""
    single, batch, part = [[edit] for edit in edits[:rounds]], [edits[:many]], min(4, many)
    of_many = f"{len(batch[0])} edits"
    layers = (4, 5, 6, 7, 8)
    for method in ("r-rome", "memit"):
        create(method).prepare(lm)
    metrics = _metrics(lm, (6, *layers))
    rome = {"layer": 6, "contexts": 20, "steps": 25, "clamp": 4.0}
    memit = {"layers": layers, "contexts": 5, "steps": 25, "prior": 20.0}
    tuned = {"layer": 21, "lr": 5e-4, "steps": 25, "stop_loss": 1e-2}

    def plain_rome(chosen: Sequence[Edit]) -> list[Tensor]:
        config = RRomeConfig.model_validate(rome)
        prefixes = context_prefixes(lm, config.contexts, 0)
        return [plain.rome(lm, 6, edit, prefixes, config, metrics[6]) for edit in chosen]

    def plain_memit(chosen: Sequence[Edit]) -> list[Tensor]:
        config = MemitConfig.model_validate(memit)
        prefixes = context_prefixes(lm, config.contexts, 0, lengths=(10,))
        found = [plain.value(lm, lm.anatomy.block(layers[-1]), edit, prefixes, config) for edit in chosen]
        goals = [old + delta for old, delta, _ in found]
        return plain.memit(lm, layers, chosen, goals, prefixes, [metrics[layer] for layer in layers], config.prior)

    def plain_tuning(chosen: Sequence[Edit]) -> list[Tensor]:
        return [plain.fine_tune(lm, edit=edit, **tuned) for edit in chosen]

    asking = _Asking(lm, edits[:many])
    return [
        Task("rome", "One ROME edit", _fitting(lm, "r-rome", rome), plain_rome, single, 1, 3, _apart),
        Task("ft-m", "One FT-M edit", _fitting(lm, "ft-m", tuned), plain_tuning, single, 1, 3, _apart),
        Task("memit", f"A MEMIT batch of {of_many}", _fitting(lm, "memit", memit), plain_memit, batch, part, 6, _apart),
        Task(
            "forced",
            f"Teacher-forced scores of {of_many}",
            asking.scored("survey"),
            asking.forced,
            batch,
            part,
            4,
            _other,
        ),
        Task("answers", f"Free answers for {of_many}", asking.scored("open"), asking.answered, batch, part, 10, _other),
        Task("fluency", f"Text for the fluency of {of_many}", asking.writes, asking.written, batch, part, 10, _other),
        _moments(lm, layers, edits),
        Task("rome-preset", "One ROME edit, our preset", _fitting(lm, "r-rome", {}), plain_rome, single, 1, 10),
        Task(
            "memit-preset",
            f"A MEMIT batch of {of_many}, our preset",
            _fitting(lm, "memit", {}),
            plain_memit,
            batch,
            part,
            20,
        ),
    ]


def _fitting(lm: LM, name: str, settings: Mapping[str, Any]) -> Work:
    method = create(name, settings)

    def work(chosen: Sequence[Edit]) -> list[Tensor]:
        patch = method.fit(lm, list(chosen))
        assert isinstance(patch, WeightPatch)
        return [delta.full() for delta in patch.deltas.values()]

    return work


def _metrics(lm: LM, layers: Sequence[int]) -> dict[int, Tensor]:
    """`C` with what is added to its diagonal."""
    config = MomentConfig()
    found = second_moments(lm, layers, config, silent)
    return {
        layer: C.double() + config.damping * C.double().diagonal().mean() * torch.eye(len(C), dtype=torch.double)
        for layer, C in found.items()
    }


class _Asking:
    """All probes of edits before and after, each edit under a patch of its own: a small random change of one matrix."""

    def __init__(self, lm: LM, edits: Sequence[Edit], layer: int = 12) -> None:
        self.lm = lm
        projection = lm.anatomy.mlp_out(layer)
        self.patches = {
            edit.id: WeightPatch.of(
                Provenance.of(lm, "none", {}, (edit,)),
                {
                    projection: Dense(
                        0.02 * torch.randn(projection.matrix.shape, generator=torch.Generator().manual_seed(i))
                    )
                },
            )
            for i, edit in enumerate(edits)
        }

    def scored(self, protocol: ProtocolName) -> Work:
        """By our scorer, which is made anew so that it knows no answer yet: what was said before and after."""

        def work(chosen: Sequence[Edit]) -> list[str]:
            scorer = Scorer(self.lm, protocols=[protocol], fluency=False, keep=False)
            scorer.baseline(chosen)
            said: list[str] = []
            for start in range(0, len(chosen), ABREAST):
                some = chosen[start : start + ABREAST]
                for card in scorer.score_each([[edit] for edit in some], [(self.patches[edit.id],) for edit in some]):
                    said += [text for score in card.scores for text in (score.said_before, score.said_after)]
            return said

        return work

    def forced(self, chosen: Sequence[Edit]) -> list[str]:
        """One probe at a time, teacher-forced on the first answer."""

        def ask(probe: Probe) -> str:
            (best,) = plain.predict(self.lm, self.lm.encode([probe.prompt], [probe.answers[0]]))
            return self.lm.tokens.decode(best).strip()

        return self._before_and_after(chosen, lambda edit: [p for _, _, p in edit.probes()], ask)

    def answered(self, chosen: Sequence[Edit]) -> list[str]:
        """One probe at a time, freely."""

        def ask(probe: Probe) -> str:
            (text,) = self.lm.encode([probe.prompt])
            stop = lambda ids: has_ended(self.lm.tokens.decode(ids))  # noqa: E731
            (ids,) = plain.write(self.lm, [text.ids], max_new=64, stop=stop, end=self.lm.end_tokens)
            return first_sentence(self.lm.tokens.decode(ids))

        return self._before_and_after(chosen, lambda edit: [p for _, _, p in edit.probes()], ask)

    def _before_and_after(
        self, chosen: Sequence[Edit], asked: Callable[[Edit], list[Probe]], ask: Callable[[Probe], str]
    ) -> list[str]:
        said = []
        for edit in chosen:
            for probe in asked(edit):
                before = ask(probe) if probe.answers else ""
                with self.lm.patched(self.patches[edit.id]):
                    after = ask(probe) if probe.answers else ""
                said += [before, after]
        return said

    def writes(self, chosen: Sequence[Edit]) -> list[list[int]]:
        """Ours, as the scorer does it: some edits abreast."""
        texts: list[list[int]] = []
        for start in range(0, len(chosen), ABREAST):
            some = chosen[start : start + ABREAST]
            with self.lm.side_by_side([(self.patches[edit.id],) for edit in some]):
                lanes = list(range(len(some)))
                prompts = [text.ids for text in self.lm.encode([edit.prompt for edit in some], lanes=lanes)]
                texts += generate(self.lm, prompts, max_new=FLUENCY_TOKENS, choose=Sampler(0, 5), lanes=lanes)
        return texts

    def written(self, chosen: Sequence[Edit]) -> list[list[int]]:
        """One text at a time."""
        texts: list[list[int]] = []
        for edit in chosen:
            with self.lm.patched(self.patches[edit.id]):
                prompts = [text.ids for text in self.lm.encode([edit.prompt])]
                texts += plain.write(self.lm, prompts, max_new=FLUENCY_TOKENS, choose=Sampler(0, 5))
        return texts


def _moments(lm: LM, layers: Sequence[int], edits: Sequence[Edit], tokens: int = 128) -> Task:
    """Of texts made of the edits' prompts, as many as the second moments take by default."""
    config = MomentConfig()
    words = " ".join(f"{edit.prompt} {edit.target}." for edit in edits)
    ids = lm.tokens.encode(words).ids
    texts = [lm.tokens.decode(ids[start % len(ids) :][: tokens - 8]) for start in range(0, 64 * 128, 64)]

    def ours(chosen: Sequence[str]) -> list[Tensor]:
        # In a cache of its own, so that it is computed each time.
        with tempfile.TemporaryDirectory() as folder, patched.dict(os.environ, {"FACTPATCH_CACHE": folder}):
            corpus = Path(folder) / "corpus.txt"
            corpus.write_text("\n\n".join(chosen), encoding="utf-8")
            return list(second_moments(lm, layers, config.model_copy(update={"corpus": str(corpus)}), silent).values())

    def theirs(chosen: Sequence[str]) -> list[Tensor]:
        rows = [lm.tokens.encode(text).ids for text in chosen]
        return [plain.second_moment(lm, layer, rows) for layer in layers]

    title = f"Second moments of {len(layers)} blocks over {len(texts)} texts"
    return Task("moments", title, ours, theirs, [[text.replace("\n", " ") for text in texts]], 8, None, _apart)


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative distance of two matrices."""
    pairs = ((o.detach().double(), t.detach().double()) for o, t in zip(ours, theirs, strict=True))
    return max(float((o - t).norm() / t.norm()) for o, t in pairs)


def _other(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The share of texts that differ."""
    return fmean(o != t for o, t in zip(ours, theirs, strict=True))


HEAD = (
    "| task | plain s | ours s | ratio | spread | target | difference | floor s | ours / floor | products s | ours / products |",
    "| --- |" + " ---: |" * 10,
)


def _row(done: Timed, rate: float) -> str:
    low, high = done.spread
    floor = done.operations / rate
    cells = (
        number(median(done.plain), 2),
        number(median(done.ours), 2),
        number(done.ratio, 1),
        f"{low:.1f} to {high:.1f}" if len(done.ours) > 1 else "–",
        number(done.task.target, 0),
        "–" if done.difference is None else f"{done.difference:.1e}",
        number(floor, 2),
        number(median(done.ours) / floor, 1),
        number(done.products, 2),
        number(median(done.ours) / done.products, 1),
    )
    return f"| {done.task.title} | {' | '.join(cells)} |"


def _write(out: Path, done: Sequence[Timed], rate: float, lm: LM, dataset: Dataset) -> None:
    behind = [timed for timed in done if timed.task.target is not None and timed.ratio < timed.task.target]
    lines = [
        "# Speed: ours beside the plain path",
        "",
        f"Model {lm.name} ({lm.fingerprint[:16]}…), {str(lm.dtype).removeprefix('torch.')}, on {psutil.cpu_count()} cores with "
        f"{torch.get_num_threads()} threads; edits of `{dataset.path.name}`. torch {version('torch')}, transformers "
        f"{version('transformers')}. {date.today()}.",
        "",
        f"    python benchmarks/speed.py {shlex.join(sys.argv[1:])}",
        "",
        "Seconds are medians over rounds, each on another edit; where there is one round, over all edits at once. The plain path",
        "(`benchmarks/plain.py`) does the same with the same settings, the published ones but for MEMIT's weight of what is",
        "known: one value at a time through the whole network, logits at every position, one prompt at a time when scoring,",
        "statistics of one block at a time. In tasks on many edits or texts it does a few of them, and its time is scaled.",
        "`difference`: of weight changes and statistics the largest relative distance between the two, of texts the share that",
        "differ. The last tasks lay our presets beside the plain path with the published settings.",
        "",
        *HEAD,
        *(_row(timed, rate) for timed in done),
        "",
        "Floor: the floating-point operations of ours, counted, at the rate of a product of matrices of the size of this model's",
        f"MLP, {rate / 1e9:.0f} thousand million a second. Products: the products of matrices that ours does, each shape timed",
        "by itself; with few rows they come nowhere near that rate, since reading the weights takes longer than using them. What",
        "ours takes beyond them are norms, attention, optimisers and Python. Of a task whose plain path does a part, the",
        "products are those of the same part, scaled; the whole has more rows at once, and may take less.",
        "",
        "## Where our time goes",
        "",
    ]
    for timed in done:
        hot = ", ".join(f"{name} {share:.0%}" for name, share in timed.hot)
        missed = " **Target not reached.**" if timed in behind else ""
        lines.append(f"- {timed.task.title}: {hot}.{missed}")
    with whole_file(out) as draft:
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
