"""ZODB's own tests of a storage, run against a server process."""
