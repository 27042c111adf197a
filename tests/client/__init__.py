"""Tests of zeolith.client."""
