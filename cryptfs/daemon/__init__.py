"""The process that serves one mount: its composition root, and the guard that keeps KEK code out of it."""
