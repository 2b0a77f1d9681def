"""What runs and sweeps found: tables, and all that reports and loggers draw of them, worked out once."""
