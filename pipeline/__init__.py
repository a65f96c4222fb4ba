"""One file a command: order, resources, resume. Ray is imported here and nowhere else.

Read `build` first. `building`, `indexing` and `trainset` hold what needs several files, `resources`
what a run holds: a Ray session, the database's lease, memory.
"""
