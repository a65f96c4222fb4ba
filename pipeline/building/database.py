"""The database a build writes to: the one that exists, checked against the settings, or a new one."""

from dataclasses import replace

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import require_grid_fits
from arrag_runtime.format.location import exists, in_store, names_in
from arrag_runtime.format.manifest import (
    DatabaseManifest,
    EncoderSettings,
    Layout,
    read_codebook,
    write_codebook,
)
from arrag_runtime.format.specs import Floats, KeySpec, key_spec, require_same_tokenizer
from arrag_runtime.tokenizers import load_tokenizer
from schemas.settings.build import BuildSettings
from stages.sources import source_kind
from stages.tables.committer import create_tables
from stages.tables.deletion import create_removed_list
from stages.tables.ledger import read_ledger

DEFAULT_BATCH = {"cpu": 1, "cuda": 32}
"""On a CPU single pictures were the fastest (docs/log.md); a GPU wants to be filled."""


def resolve_database(layout: Layout, settings: BuildSettings) -> tuple[DatabaseManifest, Floats]:
    """The manifest of the database at `layout`, or of the one to be created, and its codebook.

    Writes nothing. Raises IncompatibleError, with both sides named, when the settings differ from
    those of a database that exists.
    """
    grids = source_kind(settings.source.name).grids
    if grids and settings.tokenizer is None:
        raise BadInputError(
            f"--source {settings.source.name} needs --tokenizer: the one that made the grids"
        )
    if exists(layout.manifest):
        manifest = DatabaseManifest.read(layout)
        _require_latents(manifest.keys, grids)
        _require_same(manifest, settings)
        tokenizer = load_tokenizer(
            settings.tokenizer or manifest.tokenizer.name,
            settings.tokenizer_weights or manifest.tokenizer_weights,
        )
        codes = read_codebook(layout)
        require_same_tokenizer(manifest.tokenizer, codes, tokenizer.spec, tokenizer.codebook())
        # The weights may have moved; where they were found now is where workers look.
        return replace(manifest, tokenizer_weights=tokenizer.weights), codes
    _require_room(layout)
    keys = key_spec(
        settings.neighborhood or "causal-1",
        settings.border or "skip",
        settings.key_space or "codebook",
    )
    _require_latents(keys, grids)
    tokenizer = load_tokenizer(settings.tokenizer or "sample", settings.tokenizer_weights)
    require_grid_fits(tokenizer.spec)
    device = _device(settings)
    encoder = EncoderSettings(
        device,
        settings.precision or ("bfloat16" if device == "cuda" else "float32"),
        settings.batch_size or DEFAULT_BATCH[device],
    )
    manifest = DatabaseManifest(
        tokenizer=tokenizer.spec,
        tokenizer_weights=tokenizer.weights,
        encoder=encoder,
        keys=keys,
        hold_out=settings.hold_out or 0.0,
    )
    return manifest, tokenizer.codebook()


def create_database(layout: Layout, manifest: DatabaseManifest, codebook: Floats) -> None:
    """Make the empty tables; the manifest comes last, so where it stands the rest is complete."""
    create_tables(layout, manifest.tokenizer, manifest.keys)
    if in_store(layout.root):
        create_removed_list(layout)
    write_codebook(layout, codebook)
    manifest.write(layout)


def _require_room(layout: Layout) -> None:
    """A folder without a manifest may only hold what a killed creation leaves: empty tables."""
    tables = (layout.ledger, layout.images, layout.rejects, layout.removed)
    places = (*tables, layout.leases, layout.codebook)
    ours = {"patches", *(place.rpartition("/")[2] for place in places)}
    others = [name for name in names_in(layout.root) if name not in ours and name[0] != "."]
    if others:
        raise BadInputError(
            f"{layout.root} is no database and not empty (it holds {others[0]}); name an"
            " empty or new folder with --db"
        )
    if read_ledger(layout).recorded:
        raise BadInputError(
            f"{layout.root} has tables with rows but no manifest.json; restore it, or name another"
            " folder with --db"
        )


def _require_latents(keys: KeySpec, grids: bool) -> None:
    if grids and keys.space == "latent":
        raise IncompatibleError(
            "token grids bring no latents, so they have no keys in latent space; use --key-space"
            " codebook, or build from the pictures themselves"
        )


def _device(settings: BuildSettings) -> str:
    return "cuda" if settings.resources.gpus else "cpu"


def _require_same(manifest: DatabaseManifest, settings: BuildSettings) -> None:
    """Raise IncompatibleError for the first setting that is given and differs."""
    keys, encoder = manifest.keys, manifest.encoder
    # Grids meet no encoder, so any machine may add them.
    if _device(settings) != encoder.device and not source_kind(settings.source.name).grids:
        raise IncompatibleError(
            f"this database was encoded on {encoder.device}, and a {_device(settings)} gives a few"
            f" other ids; pass --gpus {int(encoder.device == 'cuda')}, or name another folder with"
            " --db"
        )
    for option, given, own in (
        ("--neighborhood", settings.neighborhood, keys.neighborhood.name),
        ("--border", settings.border, keys.neighborhood.border),
        ("--key-space", settings.key_space, keys.space),
        ("--hold-out", settings.hold_out, manifest.hold_out),
        ("--precision", settings.precision, encoder.precision),
        ("--batch-size", settings.batch_size, encoder.batch_size),
    ):
        if given is not None and given != own:
            raise IncompatibleError(
                f"this database was built with {option} {own}, not {given}; leave it out, or name"
                " another folder with --db"
            )
