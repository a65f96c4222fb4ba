"""The settings of the pipeline's commands."""
