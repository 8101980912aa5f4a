"""How a server runs, and what it lets nobody do.

Owns: ServerConfig and ClusterConfig; every field is a flag of `llava serve`. Refuses: torch. Sources of the defaults: what trusted servers
state or were attacked through (docs/serving.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from llavakit.errors import ConfigError

__all__ = ["ClusterConfig", "ServerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """One server."""

    host: str = "127.0.0.1"
    """Address to listen on; any but the machine's own wants an --api-key-file."""
    port: int = 8000
    """Port to listen on."""
    insecure: bool = False
    """Serve other machines without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server is called, besides the machine's own; * is any."""
    allowed_origins: tuple[str, ...] = ()
    """Pages of other servers that may use this one from a browser (CORS)."""

    max_body_bytes: int = 32 << 20
    """Bytes of a request."""
    max_header_bytes: int = 32 << 10
    """Bytes of a request's head."""
    max_headers: int = 100
    """Fields of a request's head."""
    max_json_depth: int = 64
    """Nesting of a request's JSON."""
    max_json_marks: int = 1 << 18
    """Texts, brackets, commas and colons of a request's JSON."""
    max_messages: int = 256
    """Messages of a conversation."""
    max_text_chars: int = 1 << 20
    """Characters of all texts of a request."""
    max_images: int = 8
    """Pictures of a request."""
    max_image_bytes: int = 10 << 20
    """Bytes of a picture's file."""
    max_images_bytes: int = 24 << 20
    """Bytes of all picture files of a request."""
    max_image_pixels: int = 1 << 24
    """Width times height of a picture."""
    max_images_pixels: int = 1 << 25
    """The same, summed over a request's pictures."""
    max_image_side: int = 8192
    """Width or height of a picture."""
    max_image_aspect: float = 64.0
    """Longer side of a picture over the shorter one."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, pictures included; None is what the model's context holds."""
    max_new_tokens: int | None = None
    """Tokens that a request may ask for; None is what the context holds."""
    default_new_tokens: int = 512
    """Tokens of an answer where the request says nothing."""
    max_choices: int = 8
    """Answers of a request (n)."""
    max_stops: int = 4
    """Stop strings of a request."""
    max_stop_chars: int = 256
    """Characters of a stop string."""
    max_logit_bias: int = 300
    """Tokens whose logits a request may change."""
    max_logprobs: int = 20
    """Likeliest tokens reported at each place."""
    max_candidates: int = 64
    """Answers of a request to /v1/score."""

    max_waiting: int = 128
    """Requests in the queue; further ones get 503 with Retry-After."""
    max_held_bytes: int = 1 << 30
    """Bytes of all requests inside (bodies, fetched pictures, tiles for the model); further ones get 503. Memory is up to thrice that."""
    max_held_pixels: int = 1 << 27
    """Pixels of all pictures that are decoded and not tiles yet; further ones wait."""
    max_per_key: int = 16
    """Requests of one key at a time; further ones get 429. Without keys the whole queue is everybody's."""
    requests_per_minute: int = 0
    """Requests of one key in a minute; 0 is any number."""
    wrong_keys_per_s: float = 10.0
    """Wrong keys of one address in a second, ten seconds' worth at once; further ones get 429. A right key always opens."""
    header_s: float = 10.0
    """Seconds for a request's head to arrive."""
    body_s: float = 30.0
    """Seconds for a request's body to arrive."""
    keep_alive_s: float = 5.0
    """Seconds that an idle connection stays open."""
    queue_s: float = 30.0
    """Seconds in the queue before a request gets 503."""
    request_s: float = 600.0
    """Seconds for a whole request."""
    write_s: float = 30.0
    """Seconds that a client may not read what it is sent."""
    stall_s: float = 60.0
    """Seconds without a step of the engine, while there is work, after which the server is unhealthy."""
    drain_s: float = 30.0
    """Seconds for running requests to end once the server is told to stop."""

    num_decoders: int = 2
    """Processes that decode pictures."""
    decode_s: float = 5.0
    """Seconds of a core to decode a picture; by the clock six times that, since others may have the cores."""
    decoder_bytes: int = 1 << 30
    """Memory of a process that decodes pictures."""
    remote_images: bool = False
    """Fetch pictures from http and https addresses that requests name."""
    remote_s: float = 5.0
    """Seconds to fetch a picture, redirects included."""
    max_redirects: int = 3
    """Redirects to follow, each checked like the first address."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        for name in self.__slots__:
            value = getattr(self, name)
            if name in ("port", "requests_per_minute", "max_redirects", "max_waiting") or isinstance(value, bool):
                is_wrong = isinstance(value, int) and value < 0
            else:
                is_wrong = isinstance(value, int | float) and not value > 0
            if is_wrong:
                raise ConfigError(f"{name} must be above 0, got {value}")
        for every, one in (("max_held_bytes", "max_body_bytes"), ("max_held_pixels", "max_images_pixels")):
            if getattr(self, every) < getattr(self, one):
                raise ConfigError(f"{every} is of all requests and must be at least {one}, which is {getattr(self, one)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Replicas of a model on Ray."""

    cluster: bool = False
    """Answer by replicas on Ray Serve in place of one engine in the server's process."""
    replicas: int = 1
    """Replicas to begin with, and the fewest there are."""
    max_replicas: int | None = None
    """Most replicas; as many as --replicas when left out. More are started as more questions are on their way."""
    replica_cpus: float = 1.0
    """Cores of a replica."""
    replica_gpus: float = 0.0
    """GPUs of a replica."""
    ray_address: str | None = None
    """A Ray cluster to use; one is started on this machine when left out, and listens on all its addresses."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.max_replicas is not None and self.max_replicas < self.replicas):
            raise ConfigError(f"replicas must be at least 1 and at most max_replicas, got {self.replicas} and {self.max_replicas}")
        if not self.replica_cpus > 0 or self.replica_gpus < 0:
            raise ConfigError(f"replica_cpus must be above 0, replica_gpus at least 0, got {self.replica_cpus} and {self.replica_gpus}")

    @property
    def most_replicas(self) -> int:
        """How many replicas there may be."""
        return self.replicas if self.max_replicas is None else self.max_replicas
