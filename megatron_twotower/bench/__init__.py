"""The measurements that the README quotes, each with its baselines measured in the same run."""
