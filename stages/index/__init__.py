"""Patches to an index: coarse lists, filled and merged parts, or autofaiss' IVF-PQ.

Read `codebook_index` first.
"""
