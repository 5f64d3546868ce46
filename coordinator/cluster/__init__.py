"""What speaks to the Kubernetes API: the launcher of aggregator Jobs, and what it watches."""
