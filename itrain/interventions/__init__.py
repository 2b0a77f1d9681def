"""What is done at a site: one file a method family."""
