"""What a user runs around a model: data, tokenizers, metrics, reports. Nothing here travels with a model."""
