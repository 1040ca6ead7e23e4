"""Where a volume lives: the kernel's filesystem, or a model of a disk for crash tests."""
