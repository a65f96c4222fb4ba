"""Pictures to token grids to patches. Read `encode_images` first; hostile files end in `decode`."""
