"""Pipelines that the shipped experiments run, written as a user would write their own."""
