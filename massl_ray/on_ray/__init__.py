"""The only place that knows Ray: start or join a cluster, run workers, stream views, carry news to the console."""
