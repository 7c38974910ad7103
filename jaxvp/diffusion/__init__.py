"""Objectives and samplers."""
