"""What `index` consists of: what can grow, the steps of a codebook index, exact search to judge it by."""
