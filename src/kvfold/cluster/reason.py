"""What libraries say went wrong, in one line."""


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
