"""Decoding: one loop, many drafters. See `loop.generate`."""
