"""What each way of sampling costs in quality: Frechet distance and accuracy of the digits it draws, over several seeds.

    python benchmarks/digits_quality.py                                  5 seeds of 500 images: nine minutes of one core
    python benchmarks/digits_quality.py --steps ddim50 --images 1000 --variants bf16 --out quality

"reference" is the reference's model in a plain loop, "plain loop" ditfast's model in it, "fp32" all of ditfast; each of the
others is that with one thing changed ("int8", which needs the CPU engine: the blocks' products). All of them take the same
noise, so that the difference to fp32, seed by seed, is the variant's own. It is within noise where its mean is no larger than
what another seed changes: fp32's standard deviation over the seeds. One thread. Exit status 1 where a Frechet distance is not
within noise.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ditfast import DiT, load_digits, reference
from ditfast.benchmarks.plain_loop import plain_loop
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.results import at_least, new_folder, new_results
from ditfast.commands.arguments import positive
from ditfast.diffusion import GaussianDiffusion, Step, steps
from ditfast.evaluation.digits_classifier import digits_quality
from ditfast.free_memory import shortage_exits
from ditfast.ops.cpu_chain import check_int8
from ditfast.sampling import image_noise, sample
from ditfast.terminal import HelpFormatter, make_console, new_table, print_table, say, track_progress
from ditfast.threads import one_thread

BASE = "fp32"
INT8 = "int8"  # fp32 but for the blocks' products, on the CPU engine
CFG_SCALE = 2.0
CLASSES = 10
BLOCK = 50  # images computed together
WINDOW_BYTES = 2**20  # four steps' vectors of eleven labels

Draw: TypeAlias = Callable[[Tensor, range, int], Tensor]  # labels [B], the images' numbers, a seed -> [B, 1, 8, 8]


@dataclasses.dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float  # standard, over the seeds

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), statistics.stdev(values))


@dataclasses.dataclass(frozen=True)
class Row:
    variant: str
    distances: list[float]  # one a seed
    accuracies: list[float]
    distance: Spread
    accuracy: Spread
    distance_change: Spread  # this less fp32, seed by seed
    accuracy_change: Spread
    within_noise: bool


def variants(schedule: Sequence[Step]) -> dict[str, Draw]:
    model = load_digits()
    oracle = reference.DiT(model.config).eval()
    oracle.load_state_dict(model.state_dict())

    def ours(model: DiT = model, **options: Any) -> Draw:
        given = {"cfg_scale": CFG_SCALE, "clip": True, **options}
        return lambda labels, images, seed: sample(model, schedule, labels, images=images, seed=seed, **given)

    def plain(model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Draw:
        @torch.inference_mode()
        def draw(labels: Tensor, images: range, seed: int) -> Tensor:
            both = torch.cat([labels, torch.full_like(labels, CLASSES)])
            noise = functools.partial(image_noise, (1, 8, 8), images, seed)
            *_, x = plain_loop(model, schedule, both, CFG_SCALE, 1, noise, clip=True)
            return x

        return draw

    model_int8 = load_digits()
    model_int8.int8 = True
    return {
        BASE: ours(),
        "reference": plain(oracle),
        "plain loop": plain(model),
        "no table": ours(table_bytes=0),
        "table in windows": ours(table_bytes=WINDOW_BYTES),
        "batch_invariant": ours(batch_invariant=True),
        "offload_conditioning": ours(offload_conditioning=True),
        "bf16": ours(load_digits().bfloat16()),
        INT8: ours(model_int8),
    }


def measure(drawn: dict[str, Draw], seeds: int, images: int, tick: Callable[[str, int], None]) -> list[Row]:
    """A row for each variant, the first of which is what the others are compared with.

    Args:
        drawn: variants by name.
        seeds: 0, 1, ..., two or more.
        images: of each seed, digits 0, 1, ..., 9, 0, 1, ...
        tick: called after each block with the variant's name, and how many images it was.
    """
    labels = torch.arange(images) % CLASSES
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in drawn}
    for seed in range(seeds):
        for name, draw in drawn.items():
            parts: list[Tensor] = []
            for start in range(0, images, BLOCK):
                block = range(start, min(start + BLOCK, images))
                parts.append(draw(labels[block.start : block.stop], block, seed))
                tick(name, len(block))
            scores[name].append(digits_quality(torch.cat(parts), labels))
    base = next(iter(scores.values()))
    return [_row(name, found, base) for name, found in scores.items()]


def _row(name: str, found: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]]) -> Row:
    distances, accuracies = (list(values) for values in zip(*found, strict=True))
    base_distances, base_accuracies = zip(*base, strict=True)
    change = _change(distances, base_distances)
    return Row(
        name,
        distances,
        accuracies,
        Spread.of(distances),
        Spread.of(accuracies),
        change,
        _change(accuracies, base_accuracies),
        abs(change.mean) <= statistics.stdev(base_distances),
    )


def _change(values: Sequence[float], base: Sequence[float]) -> Spread:
    return Spread.of([value - other for value, other in zip(values, base, strict=True)])


def _table(rows: Sequence[Row]) -> Table:
    table = new_table("variant", right=("Frechet distance", "change", "read as asked, %", "change, %"))
    table.add_column("change of distance")
    for row in rows:
        distance = f"{row.distance.mean:.3f} ± {row.distance.deviation:.3f}"
        accuracy = f"{100 * row.accuracy.mean:.2f} ± {100 * row.accuracy.deviation:.2f}"
        if row is rows[0]:
            table.add_row(row.variant, distance, "", accuracy, "", "")
            continue
        change = f"{row.distance_change.mean:+.1e} ± {row.distance_change.deviation:.1e}"
        accuracy_change = f"{100 * row.accuracy_change.mean:+.2f} ± {100 * row.accuracy_change.deviation:.2f}"
        verdict = "within noise" if row.within_noise else Text("more than noise", "red")
        table.add_row(row.variant, distance, change, accuracy, accuracy_change, verdict)
    return table


@shortage_exits("benchmarks/digits_quality.py")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/digits_quality.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--seeds", type=at_least(2), default=5, help="two or more; default %(default)s")
    parser.add_argument("--images", type=positive, default=500, help="of each seed; default %(default)s")
    parser.add_argument("--steps", type=_steps, default="ddim10", help="respacing, such as ddim50; default %(default)s")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="beside fp32; default: all")
    parser.add_argument("--out", type=new_folder("digits_quality.json"), metavar="DIR", help="writes digits_quality.json there")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("sklearn") is None:
        raise SystemExit(f"{parser.prog}: needs scikit-learn: pip install -e '.[bench]' (or 'ditfast[bench]')")
    known = variants(args.steps)
    if unknown := [name for name in args.variants or [] if name not in known]:
        parser.error(f"argument --variants: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    drawn = {name: draw for name, draw in known.items() if name == BASE or args.variants is None or name in args.variants}
    notes = []
    if INT8 in drawn:
        try:
            check_int8(INT8, load_digits().parameters())
        except ValueError as error:
            del drawn[INT8]
            notes.append(f"skipped: {error}")
    title = f"Digits, {args.images} images a seed, {args.seeds} seeds, {len(args.steps)} DDIM steps, guidance {CFG_SCALE:g}"
    fix_precision()
    with one_thread(), track_progress("digits", len(drawn) * args.seeds * args.images, "images") as progress:
        results = new_results("digits_quality", torch.device("cpu"))

        def tick(name: str, done: int) -> None:
            progress.update(name)
            progress.advance(done)

        rows = measure(drawn, args.seeds, args.images, tick)
    console = make_console()
    print_table(_table(rows), console, title)
    say("Mean ± standard deviation over the seeds; change: less fp32.", console)
    for note in notes:
        say(note, console)
    if args.out is not None:
        results.rows, results.notes = list(rows), [title, *notes]
        results.write(args.out / "digits_quality.json")
        say(f"wrote {args.out / 'digits_quality.json'}", console)
    return 0 if all(row.within_noise for row in rows) else 1


def _steps(text: str) -> list[Step]:
    try:
        return steps(GaussianDiffusion(text, learn_sigma=load_digits().config.learn_sigma), "ddim")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(interrupt.run("benchmarks/digits_quality.py", main))
