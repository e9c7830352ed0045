"""Many runs: searches, shared streams, groups on several GPUs, how jobs stand, the report."""
