"""Reading a patch retrieval database: open an index, search it. Needs neither Ray nor autofaiss."""

from arrag_runtime.neighbors import Neighbors, neighbors
from arrag_runtime.patch_index import PatchIndex
from arrag_runtime.retriever import Retriever

__all__ = ["Neighbors", "PatchIndex", "Retriever", "neighbors"]
