"""Who runs a block on which rows."""
