"""What SAEs are built from: sources and units, layers, MLP encoders, unit norms, resampling. Holds no SAE."""
