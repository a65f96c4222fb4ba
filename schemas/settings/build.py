"""What `arrag-db build` is to do."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from arrag_runtime.settings import DATABASE, Database, Group, Option, check
from schemas.settings.download import DownloadSettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What to build, and how; None is the database's own setting or, in a new one, the default."""

    database: Database = DATABASE
    """Folder or s3://BUCKET/PREFIX of the database."""
    source: Annotated[SourceSettings, Group(panel="Source")]
    tokenizer: Annotated[
        str | None, Option(panel="Tokens and keys", shown="the database's, else sample")
    ] = None
    """sample or vq16."""
    tokenizer_weights: Annotated[str | None, Option(panel="Tokens and keys")] = None
    """For vq16: a .pt or .safetensors file, folder or hub id."""
    neighborhood: Annotated[str | None, Option(panel="Tokens and keys", shown="causal-1")] = None
    """causal-1, causal-2 or surround-1."""
    border: Annotated[
        Literal["skip", "zero"] | None, Option(panel="Tokens and keys", shown="skip")
    ] = None
    """skip positions at the border, or zero what is missing."""
    key_space: Annotated[
        Literal["codebook", "latent"] | None, Option(panel="Tokens and keys", shown="codebook")
    ] = None
    """What keys are made of: codebook vectors, or what the encoder gave before they were chosen."""
    hold_out: Annotated[
        float | None, Option(panel="Pictures", minimum=0.0, maximum=0.99, shown="0")
    ] = None
    """Share of pictures kept out of the patches."""
    min_side: Annotated[int, Option(panel="Pictures", minimum=1)] = 32
    """Reject pictures with a shorter side."""
    max_pixels: Annotated[int, Option(panel="Pictures", minimum=1)] = 80_000_000
    """Reject larger pictures, before decoding them."""
    retry_rejects: Annotated[
        tuple[str, ...], Option(panel="Pictures", each="reason", example="dns,timeout")
    ] = ()
    """Only try rejects with these reasons again, e.g. dns,timeout."""
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(panel="Machine", shown="float32, on a GPU bfloat16"),
    ] = None
    """float32 or bfloat16."""
    batch_size: Annotated[
        int | None, Option(panel="Machine", minimum=1, shown="1, on a GPU 32")
    ] = None
    """Pictures per model call."""
    compile: Annotated[bool, Option(panel="Machine")] = False
    """torch.compile the encoder."""
    resources: Annotated[RayResources, Group(panel="Machine")] = field(default_factory=RayResources)
    download: Annotated[DownloadSettings, Group(panel="Downloads")] = field(
        default_factory=DownloadSettings
    )

    def __post_init__(self) -> None:
        check(self)
