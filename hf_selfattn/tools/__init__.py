"""What a user runs around a model: data, tokenizers, metrics, reports, answers. Nothing here travels with a model."""


def __getattr__(name):
    """`answer`, imported when it is asked for: the other modules do not wait for what it needs."""
    if name == "answer":
        from .answering import answer

        return answer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
