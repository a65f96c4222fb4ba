"""FAiD's training: the recipe, the model with its trainable parts, the run's folder.

Read `train` first.
"""
