"""Bytes on disk and on the socket <-> frozen dataclasses; docs/FORMAT.md in code.

No I/O, no keys, the only user of msgpack.
"""
