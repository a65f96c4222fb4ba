"""FAiD: retrieved tokens change a generator's features as it decodes (AR-RAG, section 3.3).

Read `patch_blender` first (the arithmetic), then `attach`.
"""
