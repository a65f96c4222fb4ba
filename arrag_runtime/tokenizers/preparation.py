"""How a picture is resized and cropped before a tokenizer sees it: part of its specification.

This is what AR-RAG's released code does (torchvision's Resize and CenterCrop on a PIL image).
"""

from PIL import Image

PREPARATION = "shorter side {size} antialiased bilinear, centre crop"


def prepare(rgb: Image.Image, size: int) -> Image.Image:
    """An RGB picture resized and cropped to size x size, as the tokenizer was trained on."""
    width, height = rgb.size
    short, long = sorted((width, height))
    scaled = int(size * long / short)
    target = (size, scaled) if width <= height else (scaled, size)
    if target != (width, height):
        rgb = rgb.resize(target, Image.Resampling.BILINEAR)
    left = round((target[0] - size) / 2.0)
    top = round((target[1] - size) / 2.0)
    return rgb.crop((left, top, left + size, top + size))
