"""Fakes and contract suites shipped with the code they stand in for; never imported by the program itself."""
