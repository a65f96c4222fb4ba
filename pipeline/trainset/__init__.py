"""Training sets for FAiD: `make` plans and collects, `worker` retrieves."""
