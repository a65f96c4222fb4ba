"""One step a room: settings, setup, one call. No Ray; Lance is written in `tables` only.

A picture goes from `sources` through `download` and `encode` into `tables`; `index` and `measure`
make it findable, `removal` hides it again.
"""
