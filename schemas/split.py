"""Which pictures are held out of a database: decided by their bytes alone."""


def is_held_out(sha256_hex: str, share: float) -> bool:
    """Whether the picture with this hash belongs to the held-out `share` (0..1).

    The hash of the original file decides, so copies of a picture fall on one side whatever
    their names, and the decision is the same in every source, build and machine.
    """
    return int(sha256_hex[:16], 16) / 2**64 < share
