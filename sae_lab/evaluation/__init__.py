"""SAEs -> metrics and tables. Writes no files, draws no figures."""
