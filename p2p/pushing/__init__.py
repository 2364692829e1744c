"""Fresh batches on their way down the trees."""
