"""Code shared by all commands: entry point, `--help`, error messages in one sentence, names of job folders."""
