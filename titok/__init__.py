"""TiTok: images as short 1D token sequences, and MaskGIT to generate them."""

__version__ = "0.1.0"
