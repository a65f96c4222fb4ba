"""Opens a patch retrieval database and uses it while pictures are generated.

Needs nothing else of this project. What is named here is loaded by its first use, so that importing
this loads neither torch nor transformers.

- `PatchIndex` opens an index and searches it; `Retriever` asks it for a position of grids that are
  being filled, and answers with `Neighbors`.
- `daid` mixes what was retrieved into a model's probabilities: `daid.merge`.
- `generate` decodes pictures with a loaded generator, plain, with DAiD or with FAiD.
- `attach_faid` puts a trained adapter on a model, for `generate` or for any decode loop.

To read the code, begin with `format` (what a database is), then `search`, `daid` and `generation`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from arrag_runtime import daid
    from arrag_runtime.faid.attach import attach_faid
    from arrag_runtime.generation.generate import Generated, generate
    from arrag_runtime.search.neighbors import Neighbors
    from arrag_runtime.search.patch_index import PatchIndex
    from arrag_runtime.search.retriever import Retriever

__all__ = ["Generated", "Neighbors", "PatchIndex", "Retriever", "attach_faid", "daid", "generate"]
__all__ += ["__version__"]
_HOMES = {
    "Generated": "arrag_runtime.generation.generate",
    "Neighbors": "arrag_runtime.search.neighbors",
    "PatchIndex": "arrag_runtime.search.patch_index",
    "Retriever": "arrag_runtime.search.retriever",
    "attach_faid": "arrag_runtime.faid.attach",
    "generate": "arrag_runtime.generation.generate",
}


def __getattr__(name: str) -> Any:
    """Load a public name where it is used first (PEP 562)."""
    if name == "daid":
        return importlib.import_module("arrag_runtime.daid")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'arrag_runtime' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _version() -> str:
    """That of the installed distribution; a checkout that nobody installed does not know its own."""
    from importlib import metadata

    try:
        return metadata.version("arrag")
    except metadata.PackageNotFoundError:
        return "0+unknown"
