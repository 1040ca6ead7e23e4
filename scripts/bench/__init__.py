"""cryptfs, gocryptfs and the plain directory side by side: `python -m scripts.bench`."""
