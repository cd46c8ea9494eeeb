"""Makes the model folders that the sorter runs."""
