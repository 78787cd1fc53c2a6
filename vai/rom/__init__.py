"""ROM images: model weights as files of shared memory that outlive every process. Standard library only."""
