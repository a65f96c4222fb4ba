"""What retrieval does to the likelihood of real pictures: plain, DAiD and FAiD, teacher-forced.

Question: does what is retrieved make the true next token of held-out pictures likelier, and how much
of it does a larger database give? The negative log likelihood is of the generator's own distribution
(no guidance, temperature 1), in nats a token over all positions; differences are to plain, by
picture, with 95 % bootstrap intervals over pictures. λ and τ are chosen on every other picture and
judged on the rest; so is λ of the simplest rival, mixing in how often tokens occur in the database
whatever stands around them. Searches are exact, so no index blurs the result.

FAiD is trained here with `arrag train`'s own code on a training set that `arrag-db trainset` made
(`--from database`: each picture without itself and its copies), or named with --adapter. Two controls
tell retrieval from mere fine-tuning: the same adapter with retrieval withheld, and one that was trained
without any retrieval (--control).

Out: tables, and one JSON line. No bound: whichever wins is reported.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch
from figures import cores, finish, machine
from likelihood import (
    ExactNeighbors,
    Pictures,
    Values,
    bootstrap,
    faid_retrieved,
    nats,
    pictures_of,
    retrieved_probabilities,
    token_probabilities,
    true_probabilities,
)

from arrag_runtime import attach_faid
from arrag_runtime.backends import load_backend
from arrag_runtime.faid.adapter import read_adapter
from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.training_set import TrainingSet
from arrag_runtime.training.settings import TrainSettings
from arrag_runtime.training.train import train

LAMBDAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TAUS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0)
MERGES = ("nearest", "sum")
PAPER = (0.05, 0.6, "nearest")


def daid_likelihoods(
    exact: ExactNeighbors,
    pictures: Pictures,
    plain: list[torch.Tensor],
    k: int,
    choices: Iterable[tuple[float, str]],
) -> tuple[dict[tuple[float, str], list[Values]], float]:
    """For each τ and merge the retrieved probabilities of true tokens, by picture; and the hit rate."""
    found: dict[tuple[float, str], list[Values]] = {choice: [] for choice in choices}
    hits = []
    for grid, model in zip(pictures.grids, plain, strict=True):
        near = exact.of(grid, k)
        true = grid.reshape(-1)[exact.positions]
        hits.append(float((near.tokens == true[:, None]).any(1).mean()))
        for tau, merge in found:
            row = retrieved_probabilities(near, model[exact.positions], true, tau, merge)
            found[tau, merge].append(row)
    return found, float(np.mean(hits))


def mixed(plain: Values, retrieved: Values, positions: Any, lam: float) -> float:
    """The likelihood of a picture whose positions with a key are mixed with weight λ."""
    together = plain.copy()
    together[positions] = (1 - lam) * plain[positions] + lam * retrieved
    return float(nats(together).mean())


def sweep(
    exact: ExactNeighbors, plain: list[Values], retrieved: dict[tuple[float, str], list[Values]]
) -> dict[tuple[float, float, str], Values]:
    """Differences to plain by picture, for each λ, τ and merge."""
    own = np.array([nats(p).mean() for p in plain])
    return {
        (lam, tau, merge): np.array(
            [mixed(p, r, exact.positions, lam) for p, r in zip(plain, rows, strict=True)]
        )
        - own
        for (tau, merge), rows in retrieved.items()
        for lam in LAMBDAS
    }


def prior_sweep(
    exact: ExactNeighbors, pictures: Pictures, plain: list[Values]
) -> dict[float, Values]:
    """Differences to plain by picture for each λ, when the tokens' frequencies are mixed in."""
    own = np.array([nats(p).mean() for p in plain])
    rows = [exact.prior[grid.reshape(-1)[exact.positions]] for grid in pictures.grids]
    return {
        lam: np.array([mixed(p, r, exact.positions, lam) for p, r in zip(plain, rows, strict=True)])
        - own
        for lam in LAMBDAS
    }


def faid_likelihoods(
    backend: Any, adapter: Path, pictures: Pictures, exact: ExactNeighbors | None
) -> Values:
    """Nats a token by picture with an adapter attached; exact None withholds retrieval."""
    faid = attach_faid(backend.model, adapter)
    height, width = backend.grid
    losses = []
    try:
        for caption, grid in zip(pictures.captions, pictures.grids, strict=True):
            retrieved = torch.full((1, height * width, faid.k), MISSING)
            if exact is not None:
                near = exact.of(grid, faid.k)
                retrieved = faid_retrieved(near, exact.positions, height * width, faid.k)
            start = backend.prompt_ids([caption], longest=512)[0].shape[1]
            with faid.whole(retrieved, height, width, start=start):
                probabilities = token_probabilities(backend, caption, grid)
            losses.append(nats(true_probabilities(probabilities, grid)).mean())
    finally:
        faid.detach()
    return np.array(losses)


def without_retrieval(data: Path, folder: Path) -> Path:
    """A copy of a training set, as one Arrow file, in which nothing was retrieved."""
    from pipeline.trainset.make import export_trainset

    source, path = data, folder / "nothing-retrieved.arrow"
    if data.is_dir():
        source = folder / "exported.arrow"
        export_trainset(data, source)
    table = pa.ipc.open_file(pa.memory_map(str(source))).read_all()
    size = TrainingSet.open(source).manifest
    nothing = np.full((len(table), size.tokenizer.positions * size.k), MISSING, np.uint16)
    at = table.schema.get_field_index("neighbors")
    table = table.set_column(at, table.schema.field(at), fixed_lists(nothing))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def trained_adapter(args: argparse.Namespace, data: Path, name: str) -> Path:
    """Train an adapter, or go on with one, in the work folder."""
    settings = TrainSettings(
        model=args.model,
        data=data,
        out=args.work / name,
        global_batch=args.train_batch,
        batch_size=min(4, args.train_batch),
        steps=args.train_steps,
        learning_rate=args.learning_rate,
        lora_rank=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        precision=args.precision,
        device=args.device,
    )

    def show(done: int, total: int, loss: float) -> None:
        if done == total or done % max(1, total // 10) == 0:
            print(f"  {name}: step {done} of {total}, loss {loss:.4f}", flush=True)

    return train(settings, show).adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("db", type=Path, help="a database with held-out pictures, of the generator's tokenizer")
    add("--model", default="sample", help="sample, a folder or a hub id")
    add(
        "--trainset",
        type=Path,
        help="what `arrag-db trainset` made; without it, no FAiD is trained",
    )
    add("--adapter", type=Path, help="a trained adapter, instead of training one")
    add("--work", type=Path, default=Path("likelihood"), help="folder for adapters, kept")
    add("--pictures", type=int, default=64, help="held-out pictures to judge on")
    add("--sizes", default="100,200,400,800,1900", help="pictures of the database, for the curve")
    add("--k", type=int, default=2048, help="neighbours of DAiD")
    add("--train-steps", type=int, default=150)
    add("--train-batch", type=int, default=16)
    add("--learning-rate", type=float, default=2e-4)
    add("--lora-rank", type=int, default=32)
    add("--control", action="store_true", help="also train an adapter without any retrieval")
    add("--device", default="cpu")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    here = machine(torch.get_num_threads() if args.device == "cpu" else cores())
    try:
        report(args, here)
    except ArragError as error:
        sys.exit(f"error: {error}")


def report(args: argparse.Namespace, here: dict[str, Any]) -> None:
    """Measure and print everything."""
    args.work.mkdir(parents=True, exist_ok=True)
    adapters = {"faid": args.adapter} if args.adapter else {}
    if args.trainset and not args.adapter:
        adapters["faid"] = trained_adapter(args, args.trainset, "faid")
    if args.trainset and args.control:
        empty = without_retrieval(args.trainset, args.work)
        adapters["control"] = trained_adapter(args, empty, "control")
    backend: Any = load_backend("janus", args.model, device=args.device, precision=args.precision)
    held_out, known = pictures_of(args.db, "heldout"), pictures_of(args.db, "database")
    if not held_out.captions:
        raise ArragError(f"{args.db} holds no picture out; build it with --hold-out 0.1")
    pictures = held_out.first(args.pictures)
    models = [
        token_probabilities(backend, caption, grid)
        for caption, grid in zip(pictures.captions, pictures.grids, strict=True)
    ]
    plain = [true_probabilities(m, g) for m, g in zip(models, pictures.grids, strict=True)]
    own = np.array([nats(p).mean() for p in plain])
    print(f"{len(own)} held-out pictures, generator {args.model}, K {args.k}; nats a token")
    mean = bootstrap(own)
    print(
        f"plain {mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]; uniform {np.log(models[0].shape[1]):.4f}"
    )

    sizes = sorted({min(int(size), len(known.captions)) for size in args.sizes.split(",")})
    full = ExactNeighbors(args.db, known.grids)
    every = [(tau, merge) for tau in TAUS for merge in MERGES]
    retrieved, hit_rate = daid_likelihoods(full, pictures, models, args.k, every)
    swept = sweep(full, plain, retrieved)
    for merge in MERGES:
        print(f"\nDAiD minus plain, {len(known.captions)} pictures, merge {merge}")
        print(f"{'λ':>7} " + "".join(f"{f'τ {tau}':>10}" for tau in TAUS))
        for lam in LAMBDAS:
            cells = (swept[lam, tau, merge].mean() for tau in TAUS)
            print(f"{lam:7} " + "".join(f"{cell:+10.4f}" for cell in cells))
    best = min(swept, key=lambda choice: swept[choice][::2].mean())
    print(f"\nchosen on every other picture: λ {best[0]}, τ {best[1]}, merge {best[2]}")
    results: dict[str, Any] = {
        "plain": asdict(bootstrap(own)),
        "daid_chosen": asdict(bootstrap(swept[best][1::2])) | {"choice": best},
        "daid_paper": asdict(bootstrap(swept[PAPER])),
        "true_token_retrieved": hit_rate,
    }
    print(f"  judged on the others: {bootstrap(swept[best][1::2])} to plain")
    prior = prior_sweep(full, pictures, plain)
    rival = min(prior, key=lambda lam: prior[lam][::2].mean())
    results["prior_chosen"] = asdict(bootstrap(prior[rival][1::2])) | {"choice": rival}
    print(f"frequencies alone, λ {rival}, on the same: {bootstrap(prior[rival][1::2])}")
    print(f"paper's λ 0.05, τ 0.6: {bootstrap(swept[PAPER])}; true token retrieved {hit_rate:.3f}")

    for name, adapter in adapters.items():
        about = read_adapter(adapter).about.get("trained on", "?")
        differences = {
            f"{name}, retrieval": faid_likelihoods(backend, adapter, pictures, full) - own,
            f"{name}, retrieval withheld": faid_likelihoods(backend, adapter, pictures, None) - own,
        }
        for label, difference in differences.items():
            print(f"{label} ({about}): {bootstrap(difference)} to plain")
            results[label] = asdict(bootstrap(difference))
        with_it, withheld = differences.values()
        results[f"{name}, from retrieval"] = asdict(bootstrap(with_it - withheld))
        print(f"  of which from retrieval: {bootstrap(with_it - withheld)}")

    curve: list[dict[str, Any]] = []
    print("\npictures   retrieved    chosen λ, τ (on the others)           paper's λ, τ    FAiD")
    for size in sizes:
        smaller = ExactNeighbors(args.db, known.grids[:size])
        part, hits = daid_likelihoods(smaller, pictures, models, args.k, {best[1:], PAPER[1:]})
        some = sweep(smaller, plain, part)
        row = {
            "pictures": size,
            "true_token_retrieved": hits,
            "daid_chosen": asdict(bootstrap(some[best][1::2])),
            "daid_paper": asdict(bootstrap(some[PAPER])),
        }
        shown = (
            f"{size:8,}{hits:12.3f}    {bootstrap(some[best][1::2])}    {bootstrap(some[PAPER])}"
        )
        if "faid" in adapters:
            losses = faid_likelihoods(backend, adapters["faid"], pictures, smaller)
            row["faid"] = asdict(bootstrap(losses - own))
            shown += f"    {bootstrap(losses - own)}"
        print(shown, flush=True)
        curve.append(row)
    table = {f"{lam}|{tau}|{merge}": d.mean() for (lam, tau, merge), d in swept.items()}
    found = {"results": results, "curve": curve, "sweep": table}
    finish("likelihood", found | {"pictures": len(own), "model": args.model} | here, [])


if __name__ == "__main__":
    main()
