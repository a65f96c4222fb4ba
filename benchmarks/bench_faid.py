"""FAiD's blender folded into matrices, against its convolutions.

Claim: at D = 2048 and K = 10, hops 1 and 2, one blender at one position needs at least ten times fewer
multiply-adds folded than as convolutions, and less time. Multiply-adds are counted twice: by the
formula in `arrag_runtime.faid.patch_blender.multiply_adds`, and by torch's own flop counter while both
run. Times are medians of alternating runs on the same inputs; folding, done once a model, stands beside.

Out: a row a form; the largest difference between the two results; one JSON line; exit code 1 when a
bound is missed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from figures import cores, finish, machine
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from arrag_runtime.faid.patch_blender import PatchBlender, multiply_adds, past_cells

BOUND = 10.0
"""How many times fewer multiply-adds the folded form must need."""
TOLERANCE = 1e-4
"""How far the two results may be apart, as a share of the largest value."""


def counted(blend: Any, blender: PatchBlender, near: Tensor, entering: Tensor) -> int:
    """The multiply-adds that torch counts for blending and scoring."""
    with FlopCounterMode(display=False) as counter:
        blender.score(blend(near, entering))
    return int(counter.get_total_flops()) // 2


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def once(blend: Any, blender: PatchBlender, near: Tensor, entering: Tensor) -> float:
    """Seconds that one blending and scoring take."""
    device = near.device.type
    synchronise(device)
    started = time.perf_counter()
    blender.score(blend(near, entering))
    synchronise(device)
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--dim", type=int, default=2048, help="width D of the features")
    add("--k", type=int, default=10, help="candidates a position")
    add("--hops", default="1,2", help="hops, separated by commas")
    add("--batch", type=int, default=1, help="positions (pictures) at once")
    add("--repeats", type=int, default=7, help="runs of each form")
    add("--device", default="cpu", help="cpu or cuda")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    here = machine(torch.get_num_threads() if args.device == "cpu" else cores())
    hops = tuple(map(int, args.hops.split(",")))
    torch.manual_seed(0)
    kind: Any = {"device": args.device, "dtype": getattr(torch, args.precision)}
    blender = PatchBlender(args.dim, hops).to(**kind)
    near = torch.randn(args.batch, len(past_cells(max(hops))), args.dim, **kind)
    entering = torch.randn(args.batch, args.k, args.dim, **kind)
    synchronise(args.device)
    started = time.perf_counter()
    made = blender.fold()
    folded = type(made)(*(part.to(kind["dtype"]) for part in (made.near, made.own, made.bias)))
    synchronise(args.device)
    folding = time.perf_counter() - started

    forms: dict[str, Any] = {"convolutions": blender, "folded": folded}
    apart = float((folded(near, entering) - blender(near, entering)).abs().max())
    apart /= float(blender(near, entering).abs().max())
    rows: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.repeats):
        for name, blend in forms.items():
            seconds[name].append(once(blend, blender, near, entering))
    for name, blend in forms.items():
        form: Any = name
        rows[name] = {
            "multiply_adds": multiply_adds(args.dim, hops, args.k, form),
            "counted": counted(blend, blender, near, entering) / args.batch,
            "ms": 1000 * statistics.median(seconds[name]) / args.batch,
        }
    print(f"D {args.dim}, K {args.k}, hops {args.hops}, batch {args.batch}, {args.precision}")
    print(f"{'a position':14}{'multiply-adds':>20}{'of D²':>10}{'torch counts':>20}{'ms':>10}")
    for name, row in rows.items():
        print(
            f"{name:14}{row['multiply_adds']:20,.0f}{row['multiply_adds'] / args.dim**2:10,.1f}"
            f"{row['counted']:20,.0f}{row['ms']:10.2f}"
        )
    slow, fast = rows["convolutions"], rows["folded"]
    ratios = {key: slow[key] / fast[key] for key in ("multiply_adds", "counted", "ms")}
    print(
        f"ratio {ratios['multiply_adds']:.1f} by formula, {ratios['counted']:.1f} as torch counts,"
        f" {ratios['ms']:.1f} in time; folding once took {folding:.1f} s; largest difference"
        f" {apart:.1e} of the largest value"
    )
    misses = []
    for key in ("multiply_adds", "counted"):
        if ratios[key] < BOUND:
            misses.append(f"{ratios[key]:.1f} times fewer {key.replace('_', '-')}, bound {BOUND}")
        for name, row in rows.items():
            if abs(row["counted"] / row["multiply_adds"] - 1) > 0.001:
                misses.append(f"{name}: torch counts {row['counted']:,.0f} multiply-adds")
    if ratios["ms"] <= 1:
        misses.append(f"folded took {1 / ratios['ms']:.2f} times as long as the convolutions")
    if args.precision == "float32" and apart > TOLERANCE:
        misses.append(f"the results differ by {apart:.1e} of the largest value, bound {TOLERANCE}")
    found = {"rows": rows, "ratios": ratios, "folding_seconds": folding, "difference": apart}
    finish("faid", found | vars(args) | here, sorted(set(misses)))


if __name__ == "__main__":
    main()
