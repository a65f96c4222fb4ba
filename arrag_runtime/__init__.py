"""Reading a patch retrieval database: open an index, search it. Needs neither Ray nor autofaiss."""

from arrag_runtime.patch_index import Neighbors, PatchIndex
from arrag_runtime.retriever import Retriever

__all__ = ["Neighbors", "PatchIndex", "Retriever"]
