"""What a database is on disk: neighbourhoods, ids, manifests, inverted lists, tables to read.

Needs numpy and pyarrow; Lance is loaded by the first table that is read. Everything else of this
project builds on it. Read `neighborhood` first, then `specs` and `manifest`.
"""
