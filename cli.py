"""`arrag-db` and `arrag`: parse → frozen settings → one call → print.

Options come from the classes of settings (`takes`). Everything heavy is imported inside the command
that needs it, so that `--help` answers at once.
"""

import itertools
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

import arrag_runtime
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.location import explain
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.progress import Progress
from arrag_runtime.settings import DATABASE
from arrag_runtime.training.settings import TrainSettings
from pipeline.options import takes
from schemas.settings.build import BuildSettings
from schemas.settings.evaluate import EvaluateSettings
from schemas.settings.index import IndexSettings
from schemas.settings.plan import DoctorSettings, ForecastSettings
from schemas.settings.query import QuerySettings
from schemas.settings.resources import RayResources
from schemas.settings.trainset import TrainsetSettings

if TYPE_CHECKING:
    from pipeline.build import BuildReport
    from pipeline.query import QueryAnswer


def _typer(name: str) -> typer.Typer:
    """A program: help by -h too, a list of its commands where none is named."""
    return typer.Typer(
        name=name,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app, runtime = _typer("arrag-db"), _typer("arrag")

Database = Annotated[
    str, Option("--db", envvar="ARRAG_DB", help="Folder or s3://BUCKET/PREFIX of the database.")
]
_output = partial(Option, rich_help_panel="Output")
_json = partial(json.dumps, indent=1)
AsJson = Annotated[bool, _output("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, _output("--quiet", "-q", help="No progress bar.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(arrag_runtime.__version__)
        raise typer.Exit


Version = Annotated[
    bool, Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
]


@app.callback(
    help="Build, index and query patch retrieval databases for autoregressive image generators."
)
@runtime.callback(help="Generate pictures with a patch retrieval database at hand.")
def options(version: Version = False) -> None:
    """What both programs take."""


@app.command()
@takes(BuildSettings)
def build(
    settings: BuildSettings,
    index: Annotated[bool, Option(help="Index the database when it is built.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn pictures into a database, or add to one what it lacks of a source.

    A build that was interrupted goes on where it stopped when the same command is given again.
    Sources of links are downloaded: http and https from public addresses only, every link ends as
    a row or a reject with its reason, and --retry-rejects takes some of those up again.
    """
    from pipeline.build import build as run_build
    from pipeline.info import info as read_info

    db = str(settings.database)
    with _bar(quiet or as_json, "shards") as show:
        report = run_build(settings, lambda total, so_far: _show_build(show, total, so_far))
    if index:
        _index_after_build(db, quiet or as_json)
    if as_json:
        fields = read_info(db) | {
            "seconds": report.seconds,
            "images_per_second": report.images_per_second,
            "shards_done": report.shards_done,
            "shards_skipped": report.shards_skipped,
            "shards_failed": len(report.failed),
            "retried": report.retried,
        }
        typer.echo(_json(fields))
    else:
        typer.echo(report.to_text(settings.retry_rejects))
    if report.failed:
        shard, error = next(iter(report.failed.items()))
        raise BadInputError(
            f"{len(report.failed)} shards failed, {report.shards_done} are done; first {shard}:"
            f" {error.rstrip('.')}. The same command tries them again"
        )


@app.command()
@takes(IndexSettings)
def index(
    settings: IndexSettings,
    db: Database = DATABASE,
    min_recall: Annotated[
        float | None, Option(min=0, max=1, help="Fail below this recall at the target's K.")
    ] = None,
    ray: Annotated[
        str | None, Option(rich_help_panel="Machine", help="Fill and measure on this Ray cluster.")
    ] = None,
    name: Annotated[str | None, Option(help="Name of the index.", show_default="its kind")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Build an index over the patches, or bring one up to date, and certify it.

    What is measured against exact search is printed and kept. A killed build of a codebook index goes
    on where it stopped; a grown table adds only what is new.
    """
    from pipeline.index import index as run_index
    from pipeline.info import index_to_text
    from pipeline.info import info as read_info

    resources = None if ray is None else RayResources(address=ray)
    with _bar(quiet or as_json, "") as show:
        made = run_index(
            db,
            settings,
            name=name,
            min_recall=min_recall,
            resources=resources,
            progress=show,
            announce=_announce,
        )
    typer.echo(_json(read_info(db)["indexes"][made.name]) if as_json else index_to_text(made))


@app.command()
@takes(QuerySettings)
def query(
    settings: QuerySettings,
    sheet: Annotated[Path | None, _output(help="Draw a contact sheet to this PNG.")] = None,
    table: Annotated[bool, _output("--table/--no-table", help="Print the table.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What came next in real pictures, where the neighbourhood looked like this one."""
    from pipeline.query import query as run_query

    answer = run_query(settings)
    for note in answer.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(answer.to_json()))
    elif table:
        _print_results(answer)
    if sheet is not None:
        from pipeline.sheet import save_sheet

        with _bar(quiet or as_json, "pictures", "reconstructing") as show:
            save_sheet(answer, settings, sheet, show)
        if not quiet and not as_json:
            typer.echo(f"contact sheet: {sheet}")


@app.command()
def info(db: Database = DATABASE, as_json: AsJson = False) -> None:
    """What a database holds and how good its indexes are."""
    from pipeline.info import info as read_info
    from pipeline.info import to_text

    fields = read_info(db)
    typer.echo(_json(fields) if as_json else to_text(fields))


@app.command()
@takes(EvaluateSettings)
def evaluate(
    settings: EvaluateSettings,
    plot: Annotated[Path | None, _output(help="Draw the figures to this PNG.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How near retrieved tokens are to the true ones, and how likely these become, by index."""
    from pipeline.evaluate import evaluate as run_evaluate

    with _bar(quiet or as_json, "rows", "asking") as show:
        found = run_evaluate(settings, show, _announce)
    typer.echo(_json(found.to_json()) if as_json else found.to_text())
    if plot is not None:
        from stages.measure.plot_evaluation import draw_evaluation

        draw_evaluation([(one.name, one.figures) for one in found.indexes], found.title, plot)
        if not quiet and not as_json:
            typer.echo(f"plot: {plot}")


@app.command()
def verify(
    db: Database = DATABASE,
    full: Annotated[bool, Option("--full", help="Recompute every picture's patches.")] = False,
    removed: Annotated[
        str | None, Option(help="Prove that nothing of this receipt (id or file) can be retrieved.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove a database sound: counts, ids, contents, indexes. Exits with 1 when it is not."""
    from pipeline.verify import verify as run_verify
    from pipeline.verify import verify_removed

    if removed is not None:
        checks, failure = verify_removed(db, removed), f"receipt {removed} does not hold"
    else:
        with _bar(quiet or as_json, "shards") as show:
            checks = run_verify(db, full=full, progress=partial(show, "recomputing patches"))
        failure = f"database {db} is not sound"
    failed = [check.name for check in checks if not check.ok]
    lines = (f"{'ok    ' if c.ok else 'FAILED'} {c.name}: {c.detail}" for c in checks)
    listed = {"ok": not failed, "checks": [vars(check) for check in checks]}
    typer.echo(_json(listed) if as_json else "\n".join(lines))
    if failed:
        raise ArragError(f"{failure}: {'; '.join(failed)}")


@app.command()
def remove(
    db: Database = DATABASE,
    where: Annotated[
        str | None, Option(help="Pictures of which this holds, as in \"url LIKE '%x.org/%'\".")
    ] = None,
    image_id: Annotated[list[int] | None, Option(help="A picture's id; may be repeated.")] = None,
    sha256: Annotated[
        list[str] | None, Option(help="The hash of original bytes; may be repeated.")
    ] = None,
    like: Annotated[
        list[Path] | None, Option(help="A file with the picture's bytes; may be repeated.")
    ] = None,
    import_: Annotated[
        Path | None, Option("--import", help="Another database's list: csv, jsonl, parquet.")
    ] = None,
    export: Annotated[
        Path | None, Option(help="Write this database's list to a file, and do nothing else.")
    ] = None,
    why: Annotated[str, Option(help="The reason, for the list and the receipt.")] = "",
    only_these: Annotated[
        bool, Option("--only-these", help="Leave copies with the same bytes in.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would go.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove pictures: no search returns them from now on, and no build brings them back.

    Works beside a running build. `arrag-db compact` deletes their bytes from tables and indexes.
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
    elif not (dry_run or yes):
        raise BadInputError("--json asks nothing; add --yes to remove, or --dry-run to look")
    elif dry_run or removal.is_empty:
        typer.echo(_json(removal.to_json()))
    if dry_run or removal.is_empty:
        return
    if not yes:
        typer.confirm("Remove them?", abort=True)
    receipt = carry_out(db, removal, why, shlex.join(["arrag-db", *sys.argv[1:]]))
    typer.echo(_json(vars(receipt)) if as_json else receipt.to_text(db))


@app.command()
def compact(db: Database = DATABASE, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Delete the bytes of removed pictures from tables and indexes; merge small fragments."""
    from pipeline.compact import compact as run_compact

    number = itertools.count(1)
    with _bar(quiet or as_json, "steps", "compacting") as show:
        done = run_compact(db, lambda step: show(step, next(number), 0))
    typer.echo(_json(vars(done)) if as_json else done.to_text())


@app.command()
@takes(ForecastSettings)
def plan(settings: ForecastSettings, as_json: AsJson = False) -> None:
    """What a build would make and cost: pictures, patches, bytes, memory, hours. Writes nothing."""
    from pipeline.plan import forecast, to_text

    made = forecast(settings)
    typer.echo(_json(made.to_json()) if as_json else to_text(made))


@app.command()
@takes(DoctorSettings)
def doctor(settings: DoctorSettings, as_json: AsJson = False) -> None:
    """Check the machine before long work; each line says what to do. Exits with 1 on a FAIL."""
    from pipeline.doctor import doctor as run_doctor
    from pipeline.doctor import to_text

    findings = run_doctor(settings)
    failed = [finding.name for finding in findings if finding.verdict == "FAIL"]
    listed = {"ok": not failed, "findings": [vars(finding) for finding in findings]}
    typer.echo(_json(listed) if as_json else to_text(findings))
    if failed:
        raise ArragError(f"this machine is not ready: {', '.join(failed)}; see the lines above")


@app.command()
@takes(TrainsetSettings)
def trainset(
    settings: TrainsetSettings,
    export: Annotated[
        Path | None, _output(help="Write it to one Arrow file too, to train without Lance.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Collect captions, tokens and what every position retrieves, to train an adapter with.

    No picture retrieves itself or a copy of itself. A set that was interrupted goes on when the same
    command is given again; a larger --limit adds pictures.
    """
    from pipeline.trainset.make import export_trainset, make_trainset

    with _bar(quiet or as_json, "tasks", "retrieving") as show:
        made = make_trainset(settings, show)
        if export is not None:
            show("exporting", 0, 1)
            export_trainset(made.folder, export)
    fields = made.to_json() | ({"export": str(export)} if export else {})
    typer.echo(_json(fields) if as_json else made.to_text())


@runtime.command()
@takes(GenerateSettings)
def generate(
    settings: GenerateSettings,
    out: Annotated[Path, _output("--out", "-o", help="The picture to write, a PNG.")] = Path(
        "out.png"
    ),
    trace: Annotated[
        Path | None, _output(help="Write where each token came from, as JSON.")
    ] = None,
    trace_sheet: Annotated[
        Path | None, _output(help="Draw where the tokens came from, a PNG.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate pictures, and look up on the way what came next in real ones."""
    from arrag_runtime.format.manifest import write_json
    from arrag_runtime.generation.methods import run as run_generate

    tracing = trace is not None or trace_sheet is not None
    with _bar(quiet or as_json, "tokens", "loading the model") as show:
        session = run_generate(replace(settings, traced=tracing), show)
        session.save(out)
        if tracing:
            show("tracing", 0, 1)
            told = session.traced()
            if trace is not None:
                trace.parent.mkdir(parents=True, exist_ok=True)
                write_json(str(trace), told.to_json())
            if trace_sheet is not None:
                told.draw(trace_sheet)
    fields = session.to_json() | {"out": str(out)}
    typer.echo(json.dumps(fields) if as_json else session.to_text() + f"\nwrote {out}")


@runtime.command()
@takes(TrainSettings)
def train(settings: TrainSettings, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Train a FAiD adapter; the defaults are the paper's. Several GPUs: `accelerate launch`.

    A run that was interrupted goes on at its last checkpoint when the same command is given again.
    """
    from arrag_runtime.training.train import train as run_train

    with _bar(quiet or as_json, "steps", "loading the model") as show:
        report = run_train(settings, lambda n, total, loss: show(f"loss {loss:.4f}", n, total))
    if report.main:
        typer.echo(json.dumps(report.to_json()) if as_json else report.to_text())


def _show_build(show: Progress, total: int, report: "BuildReport") -> None:
    state = f"{report.images:,} images, {report.rejects.total():,} rejects"
    show(state, report.shards_done, total)


def _index_after_build(db: str, quiet: bool) -> None:
    """Bring the newest index up to date as it was made, or make a first one."""
    from pipeline.index import index
    from pipeline.indexing.growth import index_to_build
    from pipeline.info import index_to_text

    if (stale := index_to_build(db)) is None:
        return
    name, settings = stale
    with _bar(quiet, "") as show:
        made = index(db, settings, name=name, progress=show, announce=_announce)
    if not quiet:
        typer.echo(index_to_text(made))


def _announce(cost: str) -> None:
    typer.echo(f"note: {cost}", err=True)


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
    Console(width=None if sys.stdout.isatty() else 2000).print(table)


@contextmanager
def _bar(quiet: bool, unit: str, first: str = "starting") -> Iterator[Progress]:
    """A progress bar on stderr, gone when the work is done; silent when quiet or in a pipe."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task(first, total=None)
        yield lambda step, done, total: bar.update(
            task, description=step, completed=done, total=total or None
        )


def _run(commands: typer.Typer) -> None:
    """Run a command: domain errors become one line on stderr and exit code 1."""
    # Silence what libraries say at import; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        commands()
    except (ArragError, OSError) as error:
        said = explain(error) if isinstance(error, OSError) else error
        typer.echo(f"error: {said}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        sys.exit(130)


main, main_runtime = partial(_run, app), partial(_run, runtime)
"""The console scripts `arrag-db` and `arrag`."""

if __name__ == "__main__":
    main()
