"""Model architectures: a checkpoint's metadata becomes a Spec, and a Spec becomes a Program."""
