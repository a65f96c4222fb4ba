"""The settings of the pipeline's commands. Read `source` and `build` first."""
