"""What `index` consists of: decide, make the parts, and the exact search that judges them.

Read `growth` first (what becomes of the index in place), then `steps` (which carries it out in the
folder of `work_folder`), then `exact`.
"""
