"""A key in, its neighbours out: indexes that are opened, searched, and searched as one.

Read `neighbors` first (what a search returns), then `patch_index`.
"""
