"""Formats, data sets, downloads, and generated neurons."""
