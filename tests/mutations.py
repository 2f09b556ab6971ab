"""Deliberate faults, and the tests that catch them: python tests/mutations.py > docs/mutations.md

Each fault goes into a copy of the repository, and the tests named beside it run there: they have to fail, and to pass
without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parent.parent
ROW_TESTS = "tests/ops/test_layer_norm_modulate.py"
JOINT_TESTS = "tests/ops/test_gated_residual_layer_norm_modulate.py"
LINEAR_TESTS = "tests/ops/test_linear.py"


class Mutation(NamedTuple):
    fault: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = (
    Mutation(
        "a dropped column mask",
        "kernels/rows.py",
        "return (row < num_rows)[:, None] & (column < D)",
        "return (row < num_rows)[:, None] & (column >= 0)",
        f"{ROW_TESTS}::test_kernel",
    ),
    Mutation(
        "a dropped row mask",
        "kernels/rows.py",
        "return (row < num_rows)[:, None]\n",
        "return (row >= 0)[:, None]\n",
        f"{ROW_TESTS}::test_kernel",
    ),
    Mutation(
        "an un-centred variance",
        "kernels/rows.py",
        "squares += centred[i] * centred[i]",
        "squares += (centred[i] + mean) * (centred[i] + mean)",
        f"{ROW_TESTS}::test_kernel",
    ),
    Mutation(
        "lanes past the row in the variance",
        "kernels/rows.py",
        "if D % CHUNK != 0:\n            x = tl.where",
        "if D < 0:\n            x = tl.where",
        f"{ROW_TESTS}::test_kernel",
    ),
    Mutation(
        "shift and scale swapped",
        "kernels/layer_norm_modulate.py",
        '**modulation("shift", shift),\n        **modulation("scale", scale),',
        '**modulation("scale", shift),\n        **modulation("shift", scale),',
        f"{ROW_TESTS}::test_kernel",
    ),
    Mutation(
        "a wrong stride",
        "kernels/rows.py",
        "return (batch * batch_stride + token * token_stride)",
        "return ((batch * num_tokens + token) * token_stride)",
        f"{ROW_TESTS}::test_strided_input",
    ),
    Mutation(
        "32-bit offsets",
        "kernels/rows.py",
        "batch = (row // num_tokens).to(tl.int64)\n    token = (row % num_tokens).to(tl.int64)",
        "batch = row // num_tokens\n    token = row % num_tokens",
        "tests/ops/test_dispatch.py::test_kernels_take_64_bit_offsets",
    ),
    Mutation(
        "a missing barrier",
        "tests/support.py",
        "ptxsim.set_options(strict_views=True, **looking)",
        'ptxsim.set_options(strict_views=True, ptx_filter=lambda _, ptx: ptx.replace("bar.sync", "//", 1), **looking)',
        f"{LINEAR_TESTS}::test_kernel",
    ),
    Mutation(
        "a second rounding: u from the unrounded sum",
        "kernels/gated_residual_layer_norm_modulate.py",
        "xs = xs + (total.to(x_new_ptr.dtype.element_ty).to(tl.float32),)",
        "xs = xs + (total,)",
        f"{JOINT_TESTS}::test_kernel",
    ),
    Mutation(
        "a lost row of dgate, dshift and dscale",
        "kernels/reduce.py",
        "row < partials - start",
        "row < partials - 1 - start",
        f"{JOINT_TESTS}::test_kernel_gradients",
    ),
    Mutation(
        "rows of the next sample in a ragged program",
        "kernels/joint_backward.py",
        "EVEN=tokens % rows == 0,",
        "EVEN=True,",
        f"{JOINT_TESTS}::test_kernel_gradients",
    ),
    Mutation(
        "LayerNorm's backward without the projection",
        "kernels/joint_backward.py",
        "- normalised[i] * (projection * (1.0 / D))",
        "",
        f"{ROW_TESTS}::test_kernel_gradients",
    ),
    Mutation(
        "a statistics tensor in bf16",
        "kernels/rows.py",
        "(*x.shape[:2], 3) if training else (0,), dtype=torch.float32",
        "(*x.shape[:2], 3) if training else (0,), dtype=torch.bfloat16",
        f"{ROW_TESTS}::test_kernel_gradients",
    ),
    Mutation(
        "the last tile column's programs in the wrong place",
        "kernels/gemm.py",
        "group_m = min(tiles_m - first_m, GROUP_M)",
        "group_m = GROUP_M",
        f"{LINEAR_TESTS}::test_kernel",
    ),
    Mutation(
        "K rounded up to whole blocks without a mask",
        "kernels/tiles.py",
        '"EVEN_K": K % self.k == 0,',
        '"EVEN_K": True,',
        f"{LINEAR_TESTS}::test_any_shape",
    ),
    Mutation(
        "one chain of roundings in fp32",
        "kernels/gemm.py",
        'acc = acc - tl.dot(a, -b, input_precision="ieee")',
        'acc = tl.dot(a, b, acc, input_precision="ieee")',
        f"{LINEAR_TESTS}::test_kernel",
    ),
    Mutation(
        "tf32",
        "kernels/gemm.py",
        'input_precision="ieee"',
        'input_precision="tf32"',
        f"{LINEAR_TESTS}::test_kernel",
    ),
    Mutation(
        "a part of the weight gradient that reads its neighbour's rows",
        "kernels/linear_backward.py",
        "last = min(first + rows_per_part, K)",
        "last = min(first + rows_per_part + BLOCK_K, K)",
        f"{LINEAR_TESTS}::test_many_rows",
    ),
    Mutation(
        "a wrong sign in GELU's derivative",
        "kernels/gemm.py",
        "return sigmoid * (1.0 + x *",
        "return sigmoid * (1.0 - x *",
        "tests/ops/test_linear_gelu.py::test_kernel_gradients",
    ),
    Mutation(
        "scores of keys that are not there",
        "kernels/attention.py",
        'score = tl.where((column < S - start)[None, :], score, float("-inf"))',
        "score = score",
        "tests/ops/test_attention.py::test_kernel_tokens",
    ),
    Mutation(
        "an accumulator that keeps its scale when the largest score grows",
        "kernels/attention.py",
        "out = add_weighted(scale_rows(out, decay),",
        "out = add_weighted(out,",
        "tests/ops/test_attention.py::test_kernel_tokens",
    ),
    Mutation(
        "an unscaled dq",
        "kernels/attention_backward.py",
        "T, dq, HEAD, MAIN, scale)",
        "T, dq, HEAD, MAIN)",
        "tests/ops/test_attention.py::test_kernel_tokens",
    ),
    Mutation(
        "a patch's rows and columns swapped",
        "kernels/patches.py",
        "pixel = y % PATCH * PATCH + x % PATCH",
        "pixel = x % PATCH * PATCH + y % PATCH",
        "tests/ops/test_unpatchify.py::test_kernel",
    ),
    Mutation(
        "a guidance gradient of the difference, not the sum",
        "kernels/classifier_free_guidance.py",
        "total = first + second",
        "total = first - second",
        "tests/ops/test_classifier_free_guidance.py::test_kernel",
    ),
    Mutation(
        "sine and cosine swapped in odd quarters",
        "kernels/timestep_embedding.py",
        "cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)",
        "cos, sin = cos, sin",
        "tests/ops/test_timestep_embedding.py::test_kernel",
    ),
    Mutation(
        "the first sample's gate for all",
        "kernels/linear_gated_residual.py",
        "sample = (tl.min(rows, 0) // num_tokens).to(tl.int64)",
        "sample = (tl.min(rows, 0) * 0).to(tl.int64)",
        "tests/ops/test_linear_gated_residual.py::test_many_rows_take_the_large_tile",
    ),
    Mutation(
        "the first linear's bias for all",
        "kernels/grouped_linear.py",
        "bias_ptr = tl.load(row_ptr + 1)",
        "bias_ptr = tl.load(table_ptr + 1)",
        "tests/ops/test_grouped_linear.py::test_kernel",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="faults that contain this text")
    chosen = [mutation for mutation in MUTATIONS if parser.parse_args().only in mutation.fault]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        copy_repository(home)
        tests = sorted({mutation.test for mutation in chosen})
        broken = failures(home, tests)
        if broken:
            raise SystemExit(f"these fail without any fault:\n{broken}")
        caught = [(m, try_mutation(home, m)) for m in track(chosen, "mutating", console=Console(file=sys.stderr))]
    print("# Deliberate faults\n\nMade one at a time by `python tests/mutations.py`; the tests beside them fail.\n")
    print("| fault | in | caught by |\n|---|---|---|")
    for mutation, catcher in caught:
        print(f"| {mutation.fault} | `{mutation.file}` | {f'`{catcher}`' if catcher else '**nothing**'} |")
    return 0 if all(catcher for _, catcher in caught) else 1


def copy_repository(home: Path) -> None:
    """With the kernels where an installed package has them, so that ``import ditfast`` there finds the copies."""
    links = shutil.ignore_patterns("kernels", "benchmarks")  # which an editable install makes
    shutil.copytree(ROOT / "ditfast", home / "ditfast", ignore=links)
    shutil.copytree(ROOT / "kernels", home / "ditfast" / "kernels")
    shutil.copytree(ROOT / "tests", home / "tests")
    shutil.copy(ROOT / "pyproject.toml", home)


def try_mutation(home: Path, mutation: Mutation) -> str:
    """The first test that fails because of it, or an empty string."""
    path = home / (f"ditfast/{mutation.file}" if mutation.file.startswith("kernels/") else mutation.file)
    source = path.read_text()
    if mutation.before not in source:
        raise SystemExit(
            f"{mutation.file} no longer contains {mutation.before!r}: bring the fault {mutation.fault!r} up to date"
        )
    path.write_text(source.replace(mutation.before, mutation.after))
    try:
        return failures(home, [mutation.test])
    finally:
        path.write_text(source)


def failures(home: Path, tests: list[str]) -> str:
    """The id of the first test that fails, or an empty string if all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line.removeprefix("FAILED ").split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode not in (0, 1) or bool(failed) != bool(done.returncode):
        raise SystemExit(f"pytest {' '.join(tests)} did not run:\n{done.stdout}{done.stderr}")
    return failed[0] if failed else ""


if __name__ == "__main__":
    raise SystemExit(main())
