"""The filesystem itself: files, directories, their logs and what a crash leaves.

Knows keys and storage only through `ports`.
"""
