"""Pipelines of several runs and summaries of their results."""
