"""Use cases on whole volumes: they know the format and the filesystem, never a terminal."""
