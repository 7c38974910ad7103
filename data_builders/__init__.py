"""Builders that turn raw datasets into RLDS, one folder each, and the code they share."""
