"""`arrag-db`: parse → frozen settings → one call → print.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.location import explain

if TYPE_CHECKING:
    from rich.progress import Progress

    from arrag_runtime.format.manifest import IndexManifest
    from arrag_runtime.generation.methods import GenerateReport
    from pipeline.build import BuildReport
    from pipeline.query import QueryAnswer
    from pipeline.verify import Check
    from schemas.settings.index import IndexSettings
    from schemas.settings.resources import RayResources

app = typer.Typer(
    name="arrag-db",
    help="Build, index and query patch retrieval databases for autoregressive image generators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

runtime = typer.Typer(
    name="arrag",
    help="Generate pictures with a patch retrieval database at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Database = Annotated[
    str,
    typer.Option("--db", envvar="ARRAG_DB", help="Folder or s3://BUCKET/PREFIX of the database."),
]
Databases = Annotated[
    list[str],
    typer.Option("--db", envvar="ARRAG_DB", help="A database; several are searched as one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
SourceName = Annotated[
    str,
    typer.Option(help="sample, folder, webdataset, cc12m, datacomp, journeydb, parquet or tokens."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        help="Folder, file, pattern, hub data set; may be repeated."
        "  [default: the publisher's, where there is one]",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first N inputs.")]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        help="Take only rows for which this is true, e.g. 'clip_l14_similarity_score > 0.28'.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="For tables: datacomp, llava-recap-cc12m, midjourney-v6, cc12m, or"
        " 'image=A,caption=B,url=C,key=D'.  [default: by their names]"
    ),
]
Scale = Annotated[
    str | None, typer.Option(help="For datacomp: small, medium, large or xlarge.  [default: small]")
]
Revision = Annotated[
    str | None, typer.Option(help="Of a data set on the hub.  [default: main's commit now]")
]
NeighborhoodName = Annotated[
    str | None, typer.Option(help="causal-1, causal-2 or surround-1.  [default: causal-1]")
]
Border = Annotated[
    str | None,
    typer.Option(help="skip positions at the border, or zero what is missing.  [default: skip]"),
]
Rate = Annotated[float, typer.Option(min=0.001, help="Addresses fetched a second.")]
ImagesPerSecond = Annotated[
    float | None,
    typer.Option(min=0.001, help="Pictures encoded a second.  [default: as the database measured]"),
]
QueryMs = Annotated[
    float, typer.Option(min=0.01, help="codebook: milliseconds a query may scan on one core.")
]
Success = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of addresses that become pictures.  [default: 0.9]"),
]
DEFAULT_DB = "arrag-db"


@app.command()
def build(
    source: SourceName,
    input: Input = None,
    db: Database = DEFAULT_DB,
    where: WhereOption = None,
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Take shards and rows in an order drawn from this.")
    ] = None,
    columns: Columns = None,
    caption: Annotated[
        str | None, typer.Option(help="For journeydb: task2 or prompt.  [default: task2]")
    ] = None,
    scale: Scale = None,
    revision: Revision = None,
    keep_faces: Annotated[
        bool, typer.Option("--keep-faces", help="Do not blur faces that the source lists.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            envvar="ARRAG_CACHE", help="Where fetched lists are kept.  [default: ~/.cache/arrag]"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="sample or vq16.  [default: the database's, else sample]")
    ] = None,
    tokenizer_weights: Annotated[
        str | None, typer.Option(help="For vq16: a .pt or .safetensors file, folder or hub id.")
    ] = None,
    neighborhood: NeighborhoodName = None,
    border: Border = None,
    key_space: Annotated[
        str | None, typer.Option(help="codebook or latent.  [default: codebook]")
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.99, help="Share of pictures kept out of the patches."),
    ] = None,
    limit: Limit = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Inputs a shard.")] = None,
    min_side: Annotated[int, typer.Option(min=1, help="Reject pictures with a shorter side.")] = 32,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Reject larger pictures, before decoding them.")
    ] = 80_000_000,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            envvar="RAY_ADDRESS",
            help="Address of a Ray cluster.  [default: one of its own, embedded]",
            show_envvar=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Encoders on CPUs; 0 takes one a --threads cores.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads an encoder.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Encode on this many GPUs.")] = 0,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Nodes may join: --gpus and --workers are limits.")
    ] = False,
    read_resource: Annotated[
        str | None, typer.Option(help="Read and download on nodes that declare this to Ray.")
    ] = None,
    encode_resource: Annotated[
        str | None, typer.Option(help="Encode on nodes that declare this to Ray.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.  [default: float32, on a GPU bfloat16]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures a model call.  [default: 1, on a GPU 32]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the encoder.")] = False,
    index: Annotated[bool, typer.Option(help="Index the database when it is built.")] = True,
    download_threads: Annotated[
        int, typer.Option(min=1, help="URLs that a task fetches at a time.")
    ] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a URL, all in all.")] = 10.0,
    max_bytes: Annotated[int, typer.Option(min=1, help="Reject larger files.")] = 64 << 20,
    max_shard_bytes: Annotated[
        int, typer.Option(min=1, help="What a shard's files may take of $TMPDIR.")
    ] = 16 << 30,
    shard_deadline: Annotated[
        float, typer.Option(min=1, help="Give up a shard's download after so many seconds.")
    ] = 3600.0,
    allow_private_hosts: Annotated[
        bool, typer.Option("--allow-private-hosts", help="Fetch from intranets too.")
    ] = False,
    user_agent_contact: Annotated[
        str | None, typer.Option(help="URL or mail address that servers are told.")
    ] = None,
    keep_images: Annotated[
        str | None, typer.Option(help="Keep fetched files in this folder, a tar a shard.")
    ] = None,
    retry_rejects: Annotated[
        str | None,
        typer.Option(help="Only try rejects with these reasons again, e.g. dns,timeout."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn pictures into a database, or add to one what it lacks of a source.

    A build that was interrupted goes on where it stopped when the same command is given again.
    Sources of links are downloaded: http and https from public addresses only, every link ends as
    a row or a reject with its reason, and --retry-rejects takes some of those up again.
    """
    from pipeline.build import build as run_build
    from pipeline.building.database import BuildSettings
    from schemas.settings.resources import RayResources
    from schemas.settings.source import SourceSettings
    from stages.download.download_links import DownloadSettings

    settings = BuildSettings(
        database=db,
        source=SourceSettings(
            source,
            tuple(input or ()),
            limit,
            shard_size,
            where,
            shuffle_seed,
            columns,
            caption,
            scale,
            revision,
            keep_faces,
            cache,
        ),
        tokenizer=tokenizer,
        tokenizer_weights=tokenizer_weights,
        neighborhood=neighborhood,
        border=border,
        key_space=key_space,
        hold_out=hold_out,
        precision=precision,
        batch_size=batch_size,
        compile=compile,
        min_side=min_side,
        max_pixels=max_pixels,
        resources=RayResources(
            ray, workers, threads, gpus, autoscale, read_resource, encode_resource
        ),
        download=DownloadSettings(
            threads=download_threads,
            timeout=timeout,
            max_bytes=max_bytes,
            max_shard_bytes=max_shard_bytes,
            shard_deadline=shard_deadline,
            allow_private_hosts=allow_private_hosts,
            contact=user_agent_contact,
            keep_images=keep_images,
        ),
        retry_rejects=_parse_reasons(retry_rejects),
    )
    with _bar(quiet or as_json, "shards") as bar:
        task = bar.add_task("starting")

        def show(total: int, report: "BuildReport") -> None:
            state = f"{report.images:,} images, {report.rejects.total():,} rejects"
            bar.update(task, description=state, total=total, completed=report.shards_done)

        report = run_build(settings, show)
    if index:
        _index_after_build(db, quiet or as_json)
    from pipeline.info import info as read_info

    if as_json:
        fields = read_info(db) | {
            "seconds": report.seconds,
            "images_per_second": report.images_per_second,
            "shards_done": report.shards_done,
            "shards_skipped": report.shards_skipped,
            "shards_failed": len(report.failed),
            "retried": report.retried,
        }
        typer.echo(json.dumps(fields, indent=1))
    else:
        _print_build(report, retry_rejects)
    if report.failed:
        shard, error = next(iter(report.failed.items()))
        raise BadInputError(
            f"{len(report.failed)} shards failed, {report.shards_done} are done; first {shard}:"
            f" {error.rstrip('.')}. The same command tries them again"
        )


@app.command()
def index(
    db: Database = DEFAULT_DB,
    kind: Annotated[
        str | None,
        typer.Option(help="codebook, ivfpq or flat.  [default: codebook; latent keys: by size]"),
    ] = None,
    index_key: Annotated[
        str | None,
        typer.Option(help="ivfpq: a faiss factory string.  [default: OPQ8_32,IVFn,PQ8x8]"),
    ] = None,
    lists: Annotated[
        int | None, typer.Option(min=1, help="codebook: coarse lists.  [default: by --query-ms]")
    ] = None,
    query_ms: QueryMs = 0.5,
    target_recall: Annotated[
        str, typer.Option(help="nprobe is the smallest that reaches it; R or R@K.")
    ] = "0.95",
    nprobe: Annotated[
        int | None, typer.Option(min=1, help="Lists a search visits.  [default: by the target]")
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail below this recall at the target's K.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="codebook: equal, learned, or one number an offset: 1,2,…")
    ] = "equal",
    max_copies: Annotated[
        int, typer.Option(min=1, help="codebook: more identical entries are stored once.")
    ] = 16,
    dedup: Annotated[
        str, typer.Option(help="codebook: none, or images to leave out copies of pictures.")
    ] = "none",
    memory: Annotated[str, typer.Option(help="What the index may take in memory.")] = "4GB",
    worker_memory: Annotated[
        str, typer.Option(help="codebook: what a process may take while it fills.")
    ] = "600MB",
    ray: Annotated[
        str | None, typer.Option("--ray", help="Fill and measure on this Ray cluster.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the index.  [default: its kind]")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build an index over the patches, or bring one up to date, and certify it.

    What is measured against exact search is printed and kept. A killed build of a codebook index goes
    on where it stopped; a grown table adds only what is new.
    """
    from schemas.settings.index import IndexSettings
    from schemas.settings.resources import RayResources

    settings = IndexSettings(
        kind=kind,
        index_key=index_key,
        memory=memory,
        worker_memory=worker_memory,
        lists=lists,
        query_ms=query_ms,
        nprobe=nprobe,
        target_recall=target_recall,
        weights=weights,
        max_copies=max_copies,
        dedup=dedup,
    )
    resources = None if ray is None else RayResources(ray)
    made = _run_index(db, settings, name, quiet or as_json, min_recall, resources)
    if as_json:
        from pipeline.info import info as read_info

        typer.echo(json.dumps(read_info(db)["indexes"][made.name], indent=1))
    else:
        _print_index(made)


@app.command()
def query(
    db: Databases = [DEFAULT_DB],  # noqa: B006 (typer copies it)
    image: Annotated[Path | None, typer.Option(help="Ask with a picture's positions.")] = None,
    row: Annotated[int | None, typer.Option(help="Only this row of the grid (with --col).")] = None,
    col: Annotated[int | None, typer.Option(help="Only this column (with --row).")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Ask with a key: its tokens, separated by commas.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours a position.")] = 10,
    index: Annotated[
        str | None, typer.Option(help="Name of the index.  [default: the newest]")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet to this PNG.")] = None,
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="Leave out what comes from the image itself.")
    ] = False,
    where: Annotated[
        str | None,
        typer.Option(help="Search in these pictures only, such as \"source = 'cc12m'\"."),
    ] = None,
    tokenizer_weights: Annotated[
        str | None, typer.Option(help="Where the database's tokenizer weights are, if they moved.")
    ] = None,
    table: Annotated[bool, typer.Option(help="Print the table.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What came next in real pictures, where the neighbourhood looked like this one."""
    from pipeline.query import QuerySettings
    from pipeline.query import query as run_query

    settings = QuerySettings(
        *(db[0], image, row, col, _parse_tokens(tokens), k, index, exclude_self),
        *(tokenizer_weights, tuple(db[1:]), where),
    )
    answer = run_query(settings)
    for note in answer.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(answer.to_json()))
    elif table:
        _print_results(answer)
    if sheet is not None:
        title = f"Query {image.name if image else tokens}"
        _draw(answer, db[0], title, sheet, tokenizer_weights, quiet or as_json)


@app.command()
def info(db: Database = DEFAULT_DB, as_json: AsJson = False) -> None:
    """What a database holds and how good its indexes are."""
    from pipeline.info import info as read_info
    from pipeline.info import to_text

    fields = read_info(db)
    typer.echo(json.dumps(fields, indent=1) if as_json else to_text(fields))


@app.command()
def evaluate(
    db: Database = DEFAULT_DB,
    index: Annotated[
        list[str] | None,
        typer.Option(help="Name of an index; may be repeated.  [default: all]"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to ask with.")] = 200,
    queries: Annotated[int, typer.Option(min=1, help="Positions to ask about.")] = 2000,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours a position.")] = 2048,
    seed: Annotated[int, typer.Option(help="Which pictures and positions are drawn.")] = 0,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Ray cluster for exact search over large tables.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this PNG.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How near retrieved tokens are to the true ones, and how likely these become, by index."""
    from pipeline.evaluate import EvaluateSettings
    from pipeline.evaluate import evaluate as run_evaluate

    settings = EvaluateSettings(db, tuple(index or ()), pictures, queries, k, seed, ray)
    with _bar(quiet or as_json, "rows") as bar:
        task = bar.add_task("asking")
        found = run_evaluate(
            settings,
            lambda step, done, total: bar.update(
                task, description=step, completed=done, total=total
            ),
            lambda cost: typer.echo(f"note: {cost}", err=True),
        )
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else found.to_text())
    if plot is not None:
        from stages.measure.plot_evaluation import draw_evaluation

        draw_evaluation([(one.name, one.figures) for one in found.indexes], found.title, plot)
        if not quiet and not as_json:
            typer.echo(f"plot: {plot}")


@app.command()
def verify(
    db: Database = DEFAULT_DB,
    full: Annotated[
        bool, typer.Option("--full", help="Recompute every picture's patches.")
    ] = False,
    removed: Annotated[
        str | None,
        typer.Option(help="Prove that nothing of this receipt (id or file) can be retrieved."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove a database sound: counts, ids, contents, indexes. Exits with 1 when it is not."""
    if removed is not None:
        from pipeline.verify import verify_removed

        _print_checks(verify_removed(db, removed), f"receipt {removed} does not hold", as_json)
        return
    from pipeline.verify import verify as run_verify

    with _bar(quiet or as_json, "shards") as bar:
        task = bar.add_task("recomputing patches")
        checks = run_verify(
            db,
            full=full,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print_checks(checks, f"database {db} is not sound", as_json)


@app.command()
def remove(
    db: Database = DEFAULT_DB,
    where: Annotated[
        str | None,
        typer.Option(help="Pictures of which this holds, as in \"url LIKE '%x.org/%'\"."),
    ] = None,
    image_id: Annotated[
        list[int] | None, typer.Option(help="A picture's id; may be repeated.")
    ] = None,
    sha256: Annotated[
        list[str] | None, typer.Option(help="The hash of original bytes; may be repeated.")
    ] = None,
    like: Annotated[
        list[Path] | None, typer.Option(help="A file with the picture's bytes; may be repeated.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Another database's list: csv, jsonl, parquet.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write this database's list to a file, and do nothing else.")
    ] = None,
    why: Annotated[str, typer.Option(help="The reason, for the list and the receipt.")] = "",
    only_these: Annotated[
        bool, typer.Option("--only-these", help="Leave copies with the same bytes in.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take pictures out: no search returns them from now on, and no build brings them back.

    Works beside a running build. `arrag-db compact` takes their bytes out of tables and indexes.
    """
    from pipeline.remove import RemovalRequest, carry_out, export_list, plan_removal

    if export is not None:
        rows = export_list(db, export)
        typer.echo(json.dumps({"exported": rows}) if as_json else f"{rows:,} rows: {export}")
        return
    request = RemovalRequest(
        where=where,
        image_ids=tuple(image_id or ()),
        hashes=tuple(sha256 or ()),
        like=tuple(like or ()),
        listed=import_,
        only_these=only_these,
    )
    if not (dry_run or why.strip()):
        raise BadInputError("a removal needs a reason, for the list and the receipt; give --why")
    removal = plan_removal(db, request)
    if not as_json:
        typer.echo(removal.to_text())
    if as_json and not (dry_run or yes):
        raise BadInputError("--json asks nothing; add --yes to remove, or --dry-run to look")
    if dry_run or removal.is_empty:
        if as_json:
            typer.echo(json.dumps(removal.to_json(), indent=1))
        return
    if not yes:
        typer.confirm("Take them out?", abort=True)
    receipt = carry_out(db, removal, why, shlex.join(["arrag-db", *sys.argv[1:]]))
    typer.echo(json.dumps(vars(receipt), indent=1) if as_json else receipt.to_text(db))


@app.command()
def compact(db: Database = DEFAULT_DB, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Take the bytes of removed pictures out of tables and indexes; merge small fragments."""
    from pipeline.compact import compact as run_compact

    with _bar(quiet or as_json, "steps") as bar:
        task = bar.add_task("compacting", total=None)
        done = run_compact(db, lambda step: bar.update(task, description=step, advance=1))
    typer.echo(json.dumps(vars(done), indent=1) if as_json else done.to_text())


@app.command()
def plan(
    source: SourceName,
    input: Input = None,
    db: Database = DEFAULT_DB,
    where: WhereOption = None,
    columns: Columns = None,
    scale: Scale = None,
    revision: Revision = None,
    limit: Limit = None,
    rate: Rate = 300.0,
    images_per_second: ImagesPerSecond = None,
    success: Success = None,
    neighborhood: NeighborhoodName = None,
    border: Border = None,
    hold_out: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of pictures kept out of the patches.")
    ] = 0.0,
    query_ms: QueryMs = 0.5,
    as_json: AsJson = False,
) -> None:
    """What a build would make and cost: pictures, patches, bytes, memory, hours. Writes nothing."""
    from pipeline.plan import ForecastSettings, forecast, to_text
    from schemas.settings.source import SourceSettings

    inputs = tuple(input or ())
    chosen = SourceSettings(
        source, inputs, limit, where=where, columns=columns, scale=scale, revision=revision
    )
    made = forecast(
        ForecastSettings(
            chosen,
            db,
            rate,
            images_per_second,
            success,
            neighborhood or "causal-1",
            border or "skip",
            hold_out,
            query_ms,
        )
    )
    typer.echo(json.dumps(made.to_json(), indent=1) if as_json else to_text(made))


@app.command()
def doctor(
    db: Database = DEFAULT_DB,
    source: Annotated[
        str | None, typer.Option(help="Compare the machine with the plan of this source.")
    ] = None,
    input: Input = None,
    where: WhereOption = None,
    columns: Columns = None,
    scale: Scale = None,
    revision: Revision = None,
    limit: Limit = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs the build is to use.")] = 0,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of the Ray cluster.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the machine before long work; each line says what to do. Exits with 1 on a FAIL."""
    from pipeline.doctor import diagnose, examine, to_text
    from pipeline.plan import ForecastSettings, forecast
    from schemas.settings.source import SourceSettings

    made = None
    if source is not None:
        inputs = tuple(input or ())
        chosen = SourceSettings(
            source, inputs, limit, where=where, columns=columns, scale=scale, revision=revision
        )
        made = forecast(ForecastSettings(chosen, db))
    findings = diagnose(examine(db), made, gpus=gpus, address=ray)
    failed = [finding.name for finding in findings if finding.verdict == "FAIL"]
    if as_json:
        listed = [vars(finding) for finding in findings]
        typer.echo(json.dumps({"ok": not failed, "findings": listed}, indent=1))
    else:
        typer.echo(to_text(findings))
    if failed:
        raise ArragError(f"this machine is not ready: {', '.join(failed)}; see the lines above")


@app.command()
def trainset(
    db: Database = DEFAULT_DB,
    k: Annotated[int, typer.Option("-k", "--k", help="Retrieved tokens a position.")] = 10,
    limit: Annotated[int | None, typer.Option(min=1, help="Pictures at most.")] = 50_000,
    pictures: Annotated[
        str | None,
        typer.Option("--from", help="heldout or database.  [default: heldout where there are any]"),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Pictures of another source: folder, webdataset, …")
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="Where they are; may be repeated.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder or bucket of the set.  [default: DB/trainset]")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write it to one Arrow file too, to train without Lance.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Name of the index.  [default: the newest]")
    ] = None,
    tokenizer_weights: Annotated[
        str | None, typer.Option(help="Where the database's tokenizer weights are, if they moved.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", help="Address of a Ray cluster.  [default: one of its own, embedded]"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Tasks at once; 0 takes one a --threads cores.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads a task.")] = 1,
    gpus: Annotated[
        int, typer.Option(min=0, help="Encode pictures of --source on this many GPUs.")
    ] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Collect captions, tokens and what every position retrieves, to train an adapter with.

    No picture retrieves itself or a copy of itself. A set that was interrupted goes on when the same
    command is given again; a larger --limit adds pictures.
    """
    from pipeline.trainset.make import TrainsetSettings, export_trainset, make_trainset
    from schemas.settings.resources import RayResources
    from schemas.settings.source import SourceSettings

    if input and source is None:
        raise BadInputError("--input says where a --source's pictures are; give --source too")
    settings = TrainsetSettings(
        database=db,
        k=k,
        limit=limit,
        pictures=pictures,
        source=None if source is None else SourceSettings(source, tuple(input or ()), limit),
        out=out,
        index=index,
        tokenizer_weights=tokenizer_weights,
        resources=RayResources(ray, workers, threads, gpus),
    )
    with _bar(quiet or as_json, "tasks") as bar:
        task = bar.add_task("retrieving")
        made = make_trainset(
            settings, lambda done, total: bar.update(task, completed=done, total=total)
        )
        if export is not None:
            bar.update(task, description="exporting")
            export_trainset(made.folder, export)
    fields = made.to_json() | ({"export": str(export)} if export else {})
    typer.echo(json.dumps(fields, indent=1) if as_json else made.to_text())


@runtime.callback()
def runtime_options() -> None:
    """Generate pictures with a patch retrieval database at hand."""


@runtime.command()
def generate(
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to draw; may be repeated.")
    ],
    db: Databases = [DEFAULT_DB],  # noqa: B006 (typer copies it)
    model: Annotated[
        str,
        typer.Option(help="sample, a folder, or a hub id such as deepseek-community/Janus-Pro-1B."),
    ] = "sample",
    mode: Annotated[
        str, typer.Option(help="plain, daid, faid, or compare: all of them side by side.")
    ] = "daid",
    adapter: Annotated[
        Path | None, typer.Option(help="For faid: the adapter that `arrag train` wrote.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write, a PNG.")] = Path(
        "out.png"
    ),
    images: Annotated[int, typer.Option("-n", min=1, help="Pictures a prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Picture number i has seed + i.")] = 0,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours a position for DAiD.")] = 2048,
    lam: Annotated[
        float, typer.Option("--lambda", help="DAiD: the share of what was retrieved, 0..1.")
    ] = 0.05,
    tau: Annotated[float, typer.Option(help="DAiD: the temperature of distances.")] = 0.6,
    merge: Annotated[
        str, typer.Option(help="DAiD: entries of one token count by the nearest, or by their sum.")
    ] = "nearest",
    entropy_above: Annotated[
        float | None,
        typer.Option(help="DAiD: only where the model's entropy, in nats, is above this."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Weight of guidance; 1 is off.  [default: the model's own]"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Of sampling; 0 takes the likeliest token.  [default: the model's own]"
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Name of the index.  [default: the newest]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda[:n].  [default: a GPU where there is one]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.  [default: float32, on a GPU bfloat16]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures decoded together.")] = 8,
    trace: Annotated[
        Path | None, typer.Option(help="Write where each token came from, as JSON.")
    ] = None,
    trace_sheet: Annotated[
        Path | None, typer.Option(help="Draw where the tokens came from, a PNG.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate pictures, and look up on the way what came next in real ones."""
    from arrag_runtime.daid import DaidSettings
    from arrag_runtime.generation.methods import GenerateSettings
    from arrag_runtime.generation.methods import run as run_generate

    settings = GenerateSettings(
        model=model,
        prompts=tuple(prompt),
        mode=mode,
        databases=tuple(db),
        index=index,
        adapter=adapter,
        images=images,
        seed=seed,
        k=k,
        daid=DaidSettings(lam, tau, merge, entropy_above),  # type: ignore[arg-type]
        guidance=guidance,
        temperature=temperature,
        device=device,
        precision=precision,
        batch_size=batch_size,
        traced=trace is not None or trace_sheet is not None,
    )
    with _bar(quiet or as_json, "tokens") as bar:
        task = bar.add_task("loading the model")

        def show(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)

        session = run_generate(settings, show)
        session.save(out)
        if trace is not None or trace_sheet is not None:
            show("tracing", 0, 1)
            _write_trace(session, db, trace, trace_sheet)
    fields = session.to_json() | {"out": str(out)}
    typer.echo(json.dumps(fields) if as_json else session.to_text() + f"\nwrote {out}")


def _write_trace(
    session: "GenerateReport",
    databases: Sequence[str],
    trace: Path | None,
    trace_sheet: Path | None,
) -> None:
    """Look the sources up in the databases' images, then write what was asked for."""
    from arrag_runtime.format.images import ImageTable
    from arrag_runtime.format.manifest import Layout, write_json

    sources = session.sources()
    rows: dict[tuple[int, int], Any] = {}
    grids: dict[tuple[int, int], Any] = {}
    for number, database in enumerate(databases):
        table = ImageTable(Layout(database).images)
        ids = [image for origin, image in sources if origin == number]
        rows |= {(number, image): row for image, row in table.rows(ids).items()}
        grids |= {(number, image): g for image, g in table.grids(ids, session.grid[0]).items()}
    told = session.traced(rows, grids)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        write_json(str(trace), told.to_json())
    if trace_sheet is not None:
        told.draw(trace_sheet)


@runtime.command()
def train(
    data: Annotated[
        Path, typer.Option(help="A training set: `arrag-db trainset`'s folder or exported file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    model: Annotated[
        str,
        typer.Option(help="sample, a folder, or a hub id such as deepseek-community/Janus-Pro-1B."),
    ] = "sample",
    hops: Annotated[str, typer.Option(help="Hops of a blender, separated by commas.")] = "1,2",
    blenders: Annotated[int, typer.Option(min=1, help="Augmented layers.")] = 2,
    k: Annotated[int, typer.Option("-k", "--k", help="Candidates a position.")] = 10,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA; 0 trains none.")] = 128,
    lora_alpha: Annotated[int, typer.Option(help="LoRA's scale is this over its rank.")] = 256,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before LoRA.")] = 0.05,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradients.")] = 1.0,
    global_batch: Annotated[
        int, typer.Option(min=1, help="Examples a step, over all processes.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once on one process.")] = 4,
    epochs: Annotated[float, typer.Option(help="How often each example is seen.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps, whatever --epochs says.")] = None,
    caption_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a caption that are read.")
    ] = 512,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Decides every order and start.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 25,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a FAiD adapter; the defaults are the paper's. Several GPUs: `accelerate launch`.

    A run that was interrupted goes on at its last checkpoint when the same command is given again.
    """
    from arrag_runtime.training.train import TrainSettings
    from arrag_runtime.training.train import train as run_train

    settings = TrainSettings(
        model=model,
        data=data,
        out=out,
        hops=_parse_hops(hops),
        blenders=blenders,
        k=k,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        learning_rate=learning_rate,
        warmup=warmup,
        clip=clip,
        global_batch=global_batch,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        caption_tokens=caption_tokens,
        precision=precision,
        device=device,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    with _bar(quiet or as_json, "steps") as bar:
        task = bar.add_task("loading the model")

        def show(done: int, total: int, loss: float) -> None:
            bar.update(task, description=f"loss {loss:.4f}", completed=done, total=total)

        report = run_train(settings, show)
    if report.main:
        typer.echo(json.dumps(report.to_json()) if as_json else report.to_text())


def _parse_hops(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(
            f"--hops '{text}' is no list of numbers; write them like '1,2'"
        ) from error


def _parse_reasons(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    reasons = tuple(part.strip() for part in text.split(",") if part.strip())
    if not reasons:
        raise BadInputError(f"--retry-rejects '{text}' names no reason; write e.g. 'dns,timeout'")
    return reasons


def _parse_tokens(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(
            f"--tokens '{text}' is no list of numbers; write them like '12,7,4095,3'"
        ) from error


def _index_after_build(db: str, quiet: bool) -> None:
    """Bring the newest index up to date as it was made, or make a first one."""
    from pipeline.indexing.growth import index_to_build

    stale = index_to_build(db)
    if stale is None:
        return
    made = _run_index(db, stale.settings, stale.name, quiet)
    if not quiet:
        _print_index(made)


def _run_index(
    db: str,
    settings: "IndexSettings",
    name: str | None,
    quiet: bool,
    min_recall: float | None = None,
    resources: "RayResources | None" = None,
) -> "IndexManifest":
    from pipeline.index import index

    with _bar(quiet, "") as bar:
        task = bar.add_task("starting")
        return index(
            db,
            settings,
            name=name,
            min_recall=min_recall,
            resources=resources,
            progress=lambda step, done, total: bar.update(
                task, description=step, completed=done, total=total
            ),
            announce=lambda cost: typer.echo(f"note: {cost}", err=True),
        )


def _draw(
    answer: "QueryAnswer", db: str, title: str, sheet: Path, weights: str | None, quiet: bool
) -> None:
    from arrag_runtime.format.manifest import Layout
    from arrag_runtime.generation.picture_grid import save_png
    from pipeline.query import load_database_tokenizer
    from pipeline.sheet import draw_sheet

    layout = Layout(db)
    tokenizer = load_database_tokenizer(layout, answer.manifest, weights)
    with _bar(quiet, "pictures") as bar:
        task = bar.add_task("reconstructing")
        drawn = draw_sheet(
            answer,
            tokenizer,
            title,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    save_png(drawn, sheet)
    if not quiet:
        typer.echo(f"contact sheet: {sheet}")


def _print_checks(checks: "Sequence[Check]", failure: str, as_json: bool) -> None:
    """Every check on a line, or as one object; a failed one makes the command fail."""
    failed = [check for check in checks if not check.ok]
    if as_json:
        listed = [vars(check) for check in checks]
        typer.echo(json.dumps({"ok": not failed, "checks": listed}, indent=1))
    else:
        for check in checks:
            typer.echo(f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.detail}")
    if failed:
        raise ArragError(f"{failure}: {'; '.join(check.name for check in failed)}")


def _print_build(report: "BuildReport", retry: str | None) -> None:
    for note in report.notes:
        typer.echo(f"note: {note}")
    if not report.shards_done and not report.failed:
        done = f"all {report.shards_skipped} shards are in the database"
        none = f"no open rejects with {retry} to be had from this --input"
        typer.echo(f"nothing to do: {none if retry else done}")
        return
    rejects = report.rejects.total()
    taken = f"{report.retried:,} rejects tried again" if retry else f"{report.inputs:,} inputs"
    typer.echo(
        f"{taken} = {report.images:,} images + {rejects:,} rejects;"
        f" {report.heldout:,} held out, {report.patches:,} patches;"
        f" {report.images_per_second:.1f} images/s, {report.seconds:.0f} s in all"
    )
    for reason, count in report.rejects.most_common():
        typer.echo(f"  rejected {count:,}: {reason}")
    if report.agreement is not None:
        typer.echo(f"  {report.agreement:.2%} of token ids agree with float32 (first batches)")


def _print_index(made: "IndexManifest") -> None:
    from pipeline.info import index_to_text

    typer.echo(index_to_text(made))


def _print_results(answer: "QueryAnswer") -> None:
    """A table for people; on a terminal it takes the terminal's width, in a pipe as it needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("query", "distance", "token", "image", "row", "col"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("caption", overflow="ellipsis", no_wrap=True, max_width=48)
    table.add_column("url", no_wrap=not sys.stdout.isatty(), overflow="fold")
    for result in answer.results:
        asked = "tokens" if result.row is None else f"{result.row},{result.col}"
        for n in result.neighbors:
            cells = (asked, f"{n.distance:.4f}", n.token, n.image_id, n.row, n.col)
            table.add_row(*map(str, cells), n.caption or n.key, n.url or "")
    console = Console() if sys.stdout.isatty() else Console(width=2000)
    console.print(table)


@contextmanager
def _bar(quiet: bool, unit: str) -> "Iterator[Progress]":
    """A progress bar on stderr, gone when the work is done; silent when quiet or in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        Remaining(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as bar:
        yield bar


def main() -> None:
    """The console script `arrag-db`."""
    _run(app)


def main_runtime() -> None:
    """The console script `arrag`."""
    _run(runtime)


def _run(commands: typer.Typer) -> None:
    """Run a command: domain errors become one line on stderr and exit code 1."""
    # Silence what libraries say at import; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        commands()
    except ArragError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        typer.echo(f"error: {explain(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
