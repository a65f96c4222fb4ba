"""One step a file: settings, setup, one call. No Ray; imports `schemas` only."""
