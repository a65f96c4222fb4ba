"""Order, resources, resume: the steps put together. Ray is imported here and nowhere else."""
