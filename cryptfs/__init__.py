"""cryptfs: an encrypted filesystem in which every block has its own key and every key can be replaced."""

__version__ = "0.1.0"
