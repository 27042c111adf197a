"""Tests of zeolith.server, one file for each module."""
