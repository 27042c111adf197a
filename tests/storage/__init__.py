"""Tests of zeolith.storage."""
