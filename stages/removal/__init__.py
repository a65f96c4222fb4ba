"""Which pictures are meant by a removal, and what keeps them out of later builds.

Read `find_images` first.
"""
