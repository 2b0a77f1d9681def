"""Sweeps: many fits over methods, layers, positions, ranks and seeds, in one table with their controls."""
