"""What the commands share: Hydra over conf/, `--help`, mistakes as one sentence, names of job folders."""
