"""What `arrag generate` is to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from arrag_runtime.daid import DaidSettings
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.settings import DATABASE, Databases, Group, Option, check


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What to generate, and how."""

    prompts: Annotated[tuple[str, ...], Option(flags="--prompt -p")]
    """What to draw; may be repeated."""
    databases: Databases = (DATABASE,)
    """A database; several are searched as one."""
    model: Annotated[str, Option()] = "sample"
    """sample, a folder, or a hub id such as deepseek-community/Janus-Pro-1B."""
    mode: Annotated[Literal["plain", "daid", "faid", "compare"], Option()] = "daid"
    """plain, daid, faid, or compare: all of them side by side on the same seeds."""
    adapter: Annotated[Path | None, Option()] = None
    """For faid: the adapter that `arrag train` wrote."""
    images: Annotated[int, Option(flags="-n", minimum=1)] = 4
    """Pictures per prompt."""
    seed: Annotated[int, Option()] = 0
    """Picture number i has seed + i."""
    k: Annotated[int, Option(flags="-k", minimum=1, panel="Retrieval")] = 2048
    """Neighbours per position for DAiD."""
    daid: Annotated[DaidSettings, Group(panel="Retrieval")] = field(default_factory=DaidSettings)
    index: Annotated[str | None, Option(shown="the newest", panel="Retrieval")] = None
    """Name of the index."""
    guidance: Annotated[float | None, Option(shown="the model's own", panel="Sampling")] = None
    """Weight of guidance; 1 is off."""
    temperature: Annotated[
        float | None, Option(minimum=0.0, shown="the model's own", panel="Sampling")
    ] = None
    """Of sampling; 0 takes the likeliest token."""
    device: Annotated[str | None, Option(shown="a GPU where there is one", panel="Machine")] = None
    """cpu or cuda[:n]."""
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(shown="float32, on a GPU bfloat16", panel="Machine"),
    ] = None
    """float32 or bfloat16."""
    batch_size: Annotated[int, Option(minimum=1, panel="Machine")] = 8
    """Pictures decoded together."""
    traced: bool = False
    """Keep what a trace needs."""

    def __post_init__(self) -> None:
        check(self)
        if self.mode == "faid" and self.adapter is None:
            raise BadInputError(
                "--mode faid needs an adapter; train one with `arrag train` and name it with --adapter"
            )
        if self.mode in ("plain", "daid") and self.adapter is not None:
            raise BadInputError(f"--mode {self.mode} uses no adapter; use --mode faid or compare")
        if self.mode == "plain" and self.traced:
            raise BadInputError("--mode plain retrieves nothing to trace; use --mode daid")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to run, in order."""
        if self.mode != "compare":
            return (self.mode,)
        return ("plain", "daid") if self.adapter is None else ("plain", "daid", "faid")
