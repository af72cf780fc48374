"""coral: lossless speculative decoding with drafters trained the CORAL way."""

__version__ = "0.1.0"
