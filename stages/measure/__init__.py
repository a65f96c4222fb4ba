"""How good an index is, and what retrieval is worth, against exact search.

Read `certificate` first.
"""
