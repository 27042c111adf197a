"""Tests of zeolith.protocol."""
