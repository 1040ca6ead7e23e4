"""Keys in the daemon: the client of the agent, and the cache in front of it. Never a KEK, a passphrase or a KDF."""
