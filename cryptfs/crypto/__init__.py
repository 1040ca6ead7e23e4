"""The primitives cryptfs uses, each in one small function of bytes; nothing here does I/O or knows a file."""
