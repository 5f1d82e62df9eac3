"""How the server behaves towards clients."""

from dataclasses import dataclass

from kvfold.errors import ConfigError


@dataclass(frozen=True)
class ServerOptions:
    """served_model: the name clients use. max_queue, max_queue_tokens: requests without a token yet, and the prompt
    tokens of those (None: any), beyond which new ones get 429. max_body: bytes. Times are in seconds: body_timeout
    for a body to arrive, request_timeout from arrival to the last token, grace to finish what runs on SIGTERM.

    Raises ConfigError for values out of range.
    """

    served_model: str = "smollm2-135m"
    api_key: str | None = None
    max_queue: int = 256
    max_queue_tokens: int | None = None
    max_body: int = 4 * 2**20
    body_timeout: float = 30.0
    request_timeout: float = 600.0
    grace: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        positive = ("max_queue", "max_queue_tokens", "max_body", "body_timeout", "request_timeout")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} is out of range; give a positive number")
        if not self.grace >= 0:
            raise ConfigError(f"grace={self.grace!r} is out of range; give 0 or more seconds")
        if self.api_key is not None and not (self.api_key.strip() and self.api_key.isprintable()):
            raise ConfigError("the API key is empty or has characters that no header can carry; choose another")
