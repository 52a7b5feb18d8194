"""Studies: named sets of training runs in one directory, then one JSON, one table, one plot."""
