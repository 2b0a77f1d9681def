"""Figures and reports of what runs found."""
