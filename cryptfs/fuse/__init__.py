"""The kernel's requests <-> `fs`: types and errors are translated here, and nothing else happens.

The only user of pyfuse3.
"""
