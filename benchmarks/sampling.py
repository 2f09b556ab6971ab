"""How fast whole sampling runs are, and what each lever is worth: table, shared half, fused update, graph, engine, dtypes.

    python benchmarks/sampling.py                                        XL width, 8 blocks, patch 8: half a minute
    python benchmarks/sampling.py --patch 2 --depth 4 --steps 50
    python benchmarks/sampling.py --width S --patch 2 --depth 12 --batch 4 --rivals reference ditfast ditfast-bf16

Every rival takes the same DDPM steps from the same noise with guidance (diffusers' pipeline: DDIM steps). They take turns step
by step, so that a machine whose clock drifts slows all of them. A lever alone is one change to the reference's plain loop over
ditfast's model. ditfast-torch is all of ditfast under ``ditfast.backend("torch")``: on a CPU without the CPU engine, on a GPU
without Triton. ditfast-int8 is fp32 with the blocks' products in int8, which the CPU engine has. Latents are compared with the
reference loop's before anything is printed.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import ditfast
from ditfast import DiTConfig, flops, reference, timer
from ditfast.benchmarks.plain_loop import Loop, plain_loop
from ditfast.benchmarks.plots import saved_figure
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.report import COLUMNS
from ditfast.benchmarks.results import new_folder, new_results
from ditfast.benchmarks.rivals import random_case
from ditfast.benchmarks.timing import DeviceLost, describe_failure, interleaved
from ditfast.benchmarks.weights import load, random_weights
from ditfast.devices import add_device_argument
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.flops.memory import sampling_bytes
from ditfast.free_memory import is_out_of_memory, why_too_large
from ditfast.modulation_table import BUDGET_BYTES, ModulationTable
from ditfast.ops.cpu_chain import check_int8
from ditfast.sampling import image_noise
from ditfast.sampling.models import Denoiser
from ditfast.sampling.run import Batch, Run
from ditfast.terminal import HelpFormatter, make_console, new_table, print_table, say, track_progress

WIDTHS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
ALLOWED_ERROR = 1e-4  # over the whole run
REFERENCE, INT8 = "reference", "ditfast-int8"
LOOSELY_ALLOWED = {"ditfast-bf16": 0.3, INT8: 0.3}  # which follow a path of their own
UNCOMPARED = ("diffusers",)  # other steps


@dataclasses.dataclass
class Row:
    rival: str
    ms_per_step: float  # median
    ms_first_step: float  # with what is done once: the table, a capture
    images_per_s: float  # of the whole run
    over_reference: float  # the reference's whole run over this one
    error: float | None


class Setting:
    """One model, one batch, and every way to run it."""

    def __init__(self, config: DiTConfig, batch: int, num_steps: int, cfg_scale: float, device: torch.device):
        self.config, self.batch, self.cfg_scale, self.device = config, batch, cfg_scale, device
        self.steps = steps(GaussianDiffusion(str(num_steps)), "ddpm")
        self.weights = random_weights(config, torch.float32, device)
        self.oracle = load(reference.DiT, config, self.weights, device).eval()
        self.model, self.model_bf16 = self._fast(torch.float32), self._fast(torch.bfloat16)
        self.labels = torch.arange(batch, device=device) % config.num_classes
        self.both = torch.cat([self.labels, torch.full_like(self.labels, config.null_class)])

    def rivals(self) -> dict[str, Callable[[], Loop]]:
        compiled = torch.compile(self.oracle, dynamic=False)
        return {
            REFERENCE: lambda: self._plain(self.oracle),
            "compile": lambda: self._plain(compiled),
            "diffusers": self._pipeline,
            "model": lambda: self._plain(self.model),
            "model+table": lambda: self._plain(self._tabulated()),
            "model+shared": lambda: self._plain(self._shared),
            "model+update": lambda: self._plain(self.model, fused_update=True),
            "ditfast": lambda: self._ditfast(self.model),
            "ditfast-torch": lambda: _on_torch(self._ditfast(self.model)),
            "ditfast-bf16": lambda: self._ditfast(self.model_bf16),
            INT8: lambda: self._ditfast(self._model_int8),
        }

    def _fast(self, dtype: torch.dtype) -> ditfast.DiT:
        return load(ditfast.DiT, self.config, self.weights, self.device).eval().to(dtype)

    @functools.cached_property
    def _model_int8(self) -> ditfast.DiT:
        model = self._fast(torch.float32)
        model.int8 = True
        return model

    def _plain(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], fused_update: bool = False) -> Loop:
        scale, channels = self.cfg_scale, self.config.guidance_channels
        return plain_loop(model, self.steps, self.both, scale, channels, self._noise, fused_update=fused_update)

    def _tabulated(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        places = {step.t: i for i, step in enumerate(self.steps)}
        table = functools.cache(lambda: ModulationTable(self.model, list(places), self.both))  # the first step pays for it
        return lambda x, t, y: self.model.forward_modulated(x, table().vectors(places[float(t[0])]))

    def _shared(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model.forward_modulated(x[: self.batch], self.model.modulation_vectors(t, y))

    def _ditfast(self, model: ditfast.DiT) -> Loop:
        run = Run(Denoiser(model), False, (-1.0, 1e9), self.config.guidance_channels, 0, BUDGET_BYTES)
        scale = torch.full((self.batch,), self.cfg_scale, device=self.device)
        return run.solved(self.steps, Batch(self.labels, range(self.batch), scale))

    @functools.cached_property
    def _in_diffusers(self) -> Callable[..., Tensor]:
        return random_case("", self.config, self.batch, self.device, "fp32").rival("diffusers", {})

    def _pipeline(self) -> Loop:
        """diffusers' model and scheduler as its DiTPipeline drives them, without the image decoder."""
        from diffusers import DDIMScheduler

        model = self._in_diffusers
        scheduler: Any = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(len(self.steps))
        x = self._noise(0)
        for t in scheduler.timesteps:
            times = t[None].expand(2 * self.batch).to(self.device)
            output = model(torch.cat([x, x]), times, self.both)[:, : x.shape[1]]
            conditional, unconditional = output.chunk(2)
            guided = unconditional + self.cfg_scale * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
            yield x

    def _noise(self, step: int) -> Tensor:
        return image_noise(self.config.input_shape, range(self.batch), 0, step).to(self.device)


@torch.inference_mode()
def measure(setting: Setting, names: Sequence[str], rounds: int, tick: Callable[[], None]) -> tuple[list[Row], list[str]]:
    """Run all rivals in turns, step by step; return rows of whole runs, and notes on rivals that failed.

    Raises:
        Exception: the reference failed, or every later call of the GPU would.
    """
    rivals, notes = setting.rivals(), []
    latents: dict[str, Tensor] = {}

    def run(names: Iterable[str], steps: int, tick: Callable[[], None]) -> dict[str, list[float]]:
        loops = {name: rivals[name]() for name in names}

        def advance(name: str) -> None:
            latents[name] = next(loops[name])

        def seconds(name: str, i: int) -> float:
            return timer.host_seconds(functools.partial(advance, name), setting.device)[1]

        return interleaved(loops, steps, seconds, fail, tick)

    def fail(name: str, error: Exception) -> None:
        if name == REFERENCE:
            raise error
        notes.append(describe_failure("sampling", name, error))

    runs = [run(names, 1, lambda: None)]  # compiles, and touches memory for the first time
    for _ in range(rounds):
        runs.append(run(runs[-1], len(setting.steps), tick))
    del runs[0]
    exact = latents[REFERENCE]
    rows = []
    for name in runs[-1]:
        error = ((latents[name] - exact).norm() / exact.norm()).item()
        own = [times[name] for times in runs]
        ratios = [_whole(times[REFERENCE]) / _whole(times[name]) for times in runs]
        rows.append(
            Row(
                rival=name,
                ms_per_step=1e3 * statistics.median(t for times in own for t in times[1:]),
                ms_first_step=1e3 * statistics.median(times[0] for times in own),
                images_per_s=setting.batch / statistics.median(map(_whole, own)),
                over_reference=statistics.median(ratios),
                error=None if name in UNCOMPARED else error,
            )
        )
    return rows, notes


def _on_torch(loop: Loop) -> Loop:
    """``loop`` with its steps, not what runs between them, on torch."""
    while True:
        with ditfast.backend("torch"):
            x = next(loop, None)
        if x is None:
            return
        yield x


def _whole(run: list[float]) -> float:
    """Seconds of a run whose steps after the first all take their median: what else ran on the machine is not counted."""
    return run[0] + (len(run) - 1) * statistics.median(run[1:])


def _table(rows: Sequence[Row]) -> Table:
    table = new_table("", right=("ms a step", "1st step", "images/s", "x reference", "error"))
    for row in rows:
        error = "other steps" if row.error is None else f"{row.error:.1e}"
        speed = (f"{row.ms_per_step:.1f}", f"{row.ms_first_step:.1f}", f"{row.images_per_s:.3g}", f"{row.over_reference:.2f}")
        table.add_row(row.rival, *speed, error)
    return table


def _plot(path: Path, rows: Sequence[Row], title: str) -> None:
    colours = ["tab:blue" if row.rival.startswith("ditfast") else "tab:gray" for row in rows]
    with saved_figure(path, figsize=(8, 0.4 * len(rows) + 1.2)) as axes:
        bars = axes.barh([row.rival for row in rows], [row.over_reference for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.1)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set(title=title, xlabel="times as fast as the reference's plain loop, a whole run")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/sampling.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="XL")
    parser.add_argument("--patch", type=int, choices=(2, 4, 8), default=8)
    parser.add_argument("--depth", type=int, default=8, help="blocks; default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="images; default %(default)s")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3, help="whole runs of each rival; default %(default)s")
    parser.add_argument("--rivals", nargs="+", help="default: all")
    add_device_argument(parser)
    parser.add_argument(
        "--out", type=new_folder("sampling.json"), metavar="DIR", help="writes sampling.json and sampling.png there"
    )
    args = parser.parse_args(argv)
    hidden_size, num_heads = WIDTHS[args.width]
    fix_precision()
    config = DiTConfig(depth=args.depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=args.patch)
    needed = 4 * flops.parameters(config) + sampling_bytes(config, 2 * args.batch, torch.float32, "cuda")
    sizes = why_too_large(needed, args.device)
    try:
        if not sizes:
            return _run(parser, args, config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    why = f" ({sizes})" if sizes else ""
    parser.exit(1, f"{parser.prog}: the reference's run does not fit into memory{why}: take a smaller --batch or --width\n")


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace, config: DiTConfig) -> int:
    setting = Setting(config, args.batch, args.steps, args.cfg, args.device)
    known = list(setting.rivals())
    names = args.rivals or known
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"argument --rivals: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    notes: list[str] = []
    if INT8 in names:
        try:
            check_int8(INT8, setting.model.parameters())
        except ValueError as error:
            names = [name for name in names if name != INT8]
            notes.append(f"skipped: {error}")
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    console = make_console(piped=COLUMNS)
    results = new_results("sampling", setting.device)
    title = (
        f"{args.width} width, {args.depth} blocks, patch {args.patch}, {args.steps} steps, CFG {args.cfg:g}, batch {args.batch}"
    )
    with track_progress("sampling", args.rounds * args.steps, "steps") as progress:
        try:
            rows, failures = measure(setting, names, args.rounds, progress.advance)
        except DeviceLost as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 1
    notes += failures
    print_table(_table(rows), console, title)
    say("error: of the final latents, against the reference loop's.", console)
    for note in notes:
        say(note, console)
    if args.out is not None:
        results.rows, results.notes = rows, [title, *notes]
        results.write(args.out / "sampling.json")
        _plot(args.out / "sampling.png", rows, title)
    wrong = [r for r in rows if r.error is not None and not r.error <= LOOSELY_ALLOWED.get(r.rival, ALLOWED_ERROR)]
    for row in wrong:
        say(f"{row.rival}: latents are off by {row.error:.1e}", console, "red")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(interrupt.run("benchmarks/sampling.py", main))
