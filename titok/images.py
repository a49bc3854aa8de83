"""Public functions that find and read pictures as every command of titok does. Their code is in `titok.data.images`."""

from titok.data.images import find_images, read_image

__all__ = ["find_images", "read_image"]
