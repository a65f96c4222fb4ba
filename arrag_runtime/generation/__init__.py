"""Prompts in, pictures out, with retrieval on the way, and the trace of where they came from.

Read `decode_loop` first.
"""
