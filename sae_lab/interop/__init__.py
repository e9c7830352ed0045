"""Read and write SAEs in the file formats of other libraries, without importing those libraries.

Each format has a module with

- `FILES`, the file names that identify a folder of this format;
- `read`, which returns one of our SAEs that computes the same codes and reconstructions;
- `write`, for formats that can represent some of our SAEs exactly.

A UserError is raised for a setting that has no exact counterpart here, and for a tensor of unknown meaning.
"""
