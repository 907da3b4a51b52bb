"""Train matching-pursuit and TopK coders from a store of activations (see README.md)."""
