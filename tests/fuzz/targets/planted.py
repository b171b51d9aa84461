"""A fault that the fuzzer must find, so that the rest can be believed."""


def seeds() -> list[bytes]:
    return [b"harmless"]


def fuzz(content: bytes) -> None:
    if content[:1] == b"!":
        raise ZeroDivisionError("the planted fault")
