"""Policies as files and as closed-loop controllers."""
