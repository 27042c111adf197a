"""Races and old defects of client and server together, each provoked on purpose."""
