"""Blocks: which version of a block lies where (`extents`), and plaintext <-> ciphertext (`codec`). No I/O."""
