"""The tests of zeolith: a mirror of each package, and what they do together."""
