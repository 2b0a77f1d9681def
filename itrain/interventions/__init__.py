"""Interventions: the edits at a site, one file per family of methods."""
