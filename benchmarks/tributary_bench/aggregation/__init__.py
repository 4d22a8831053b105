"""Aggregation from deltas in S3 to the new model in S3: ours, Flower's FedAvg, and the store's own speed."""
