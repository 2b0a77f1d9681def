"""Why an intervention is trained: the LightningModules, one file each, and their callbacks."""
