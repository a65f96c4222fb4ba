"""What a removal means: the images that it hides, and the inputs that it suppresses afterwards.

Three words for three things, used throughout: a *tombstone* hides an image from every search
(`arrag_runtime.search.tombstones`), a *suppression* keeps an input out of builds (`suppression`),
a *deletion* takes the bytes off the disk (`stages.tables.deletion`). Read `find_images` first.
"""
