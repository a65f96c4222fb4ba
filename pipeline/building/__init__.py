"""What `build` consists of: the database's settings, which shards are to do, and who does them.

Read `plan_shards` first, then `run_shards`.
"""
