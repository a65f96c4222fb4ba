"""Reading a patch retrieval database while pictures are generated.

Needs neither Ray nor autofaiss; torch and transformers are imported where they are used.

- `PatchIndex` opens an index and searches it; `Retriever` asks it for a position of grids that are
  being filled, and answers with `Neighbors`.
- `daid` mixes what was retrieved into a model's probabilities: `daid.merge`.
- `generate` decodes pictures with a loaded generator, plain, with DAiD or with FAiD.
- `attach_faid` puts a trained adapter on a model, for `generate` or for any decode loop.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrag_runtime import daid
from arrag_runtime.generate import Generated, generate
from arrag_runtime.neighbors import Neighbors, neighbors
from arrag_runtime.patch_index import PatchIndex
from arrag_runtime.retriever import Retriever

if TYPE_CHECKING:
    from arrag_runtime.faid import Faid
    from arrag_runtime.patch_blender import Form

__all__ = [
    "Generated",
    "Neighbors",
    "PatchIndex",
    "Retriever",
    "attach_faid",
    "daid",
    "generate",
    "neighbors",
]


def attach_faid(model: Any, adapter: Path | str, *, form: "Form" = "folded", k: int = 10) -> "Faid":
    """Attach a trained FAiD adapter to a JanusForConditionalGeneration (AR-RAG, section 3.3).

    adapter: a file of `arrag train`, or the released checkpoint. k: candidates a position. form:
    "folded", or "convolutions" as the paper writes them. The handle is an `Augmenter` (begin,
    before_forward, end; see `arrag_runtime.augment`) and its `detach` restores the model.
    Raises IncompatibleError when the adapter is for another model, BadInputError when it is none.
    """
    from arrag_runtime.faid import attach_faid as attach

    return attach(model, adapter, form=form, k=k)
