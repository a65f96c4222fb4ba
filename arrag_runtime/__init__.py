"""Reading a patch retrieval database while pictures are generated.

Needs neither Ray nor autofaiss; torch and transformers are imported where they are used.

- `PatchIndex` opens an index and searches it; `Retriever` asks it for a position of grids that are
  being filled, and answers with `Neighbors`.
- `daid` mixes what was retrieved into a model's probabilities: `daid.merge`.
- `generate` decodes pictures with a loaded generator, plain, with DAiD or with FAiD.
"""

from arrag_runtime import daid
from arrag_runtime.generate import Generated, generate
from arrag_runtime.patch_index import Neighbors, PatchIndex
from arrag_runtime.retriever import Retriever

__all__ = ["Generated", "Neighbors", "PatchIndex", "Retriever", "daid", "generate"]
