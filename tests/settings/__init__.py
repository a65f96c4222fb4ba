"""Classes of settings, the options that follow from them, and files of options."""
