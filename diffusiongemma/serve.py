"""Serves a model over HTTP, in OpenAI's protocol.

python -m diffusiongemma.serve --checkpoint=builtin --port=8000
"""

import os

from absl import flags

from diffusiongemma import cli, sampling_flags
from diffusiongemma.errors import check_range
from diffusiongemma.sampling import Sampler
from diffusiongemma.sampling.engine import Engine
from diffusiongemma.sampling.sampler import MODES, main_mode
from diffusiongemma.sampling_flags import CHECKPOINT

_NAME = flags.DEFINE_string('name', None, 'Model name in requests; by default the checkpoint.')
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0 for all.')
_PORT = flags.DEFINE_integer(
    'port', 8000, 'Port to listen on; 0 for any free one.', lower_bound=0, upper_bound=65535
)
_MODE = flags.DEFINE_enum(
    'mode',
    None,
    sorted(MODES),
    "Decode mode of requests without one; by default 'diffusion', 'lossless' for a light "
    "student, 'autoregressive' for a model without a canvas.",
)
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, 'Temperature of requests without one; 0 is greedy.', lower_bound=0.0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 128, 'Maximum number of tokens of an answer.', lower_bound=1
)
_CAPACITY = flags.DEFINE_integer(
    'capacity',
    None,
    'Maximum number of tokens of a prompt and its answer together; by default the positions of '
    'the model, at most 4096.',
    lower_bound=2,
)
_SLOTS = flags.DEFINE_integer(
    'slots', 8, 'Maximum number of requests that a program decodes concurrently.', lower_bound=1
)
_PREFIXES = flags.DEFINE_integer(
    'prefixes',
    4,
    'Number of K/V caches, of one row each, that are kept for shared prompt prefixes such as a '
    'system text, in blocks of 128 tokens.',
    lower_bound=0,
)
_MAX_QUEUE = flags.DEFINE_integer(
    'max_queue',
    64,
    'Maximum number of requests that wait for a slot; more are rejected.',
    lower_bound=0,
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
    'max_body_bytes', 2**20, 'Maximum size of the body of a request in bytes.', lower_bound=1
)
_API_KEY = flags.DEFINE_string(
    'api_key', None, 'Key that clients must send; by default $DIFFUSIONGEMMA_API_KEY.'
)
_GRACE_SECONDS = flags.DEFINE_float(
    'grace_seconds',
    60.0,
    'Maximum time for open requests after SIGTERM, in seconds.',
    lower_bound=0.0,
)
_WARM_UP = flags.DEFINE_bool('warm_up', True, 'Compile before the first request.')


def main(argv: list[str]) -> None:
    """Loads the model and serves it until SIGTERM or SIGINT."""
    del argv
    with cli.extra_named(__name__):
        from diffusiongemma.serving.server import listen, serve
        from diffusiongemma.serving.service import Service, Settings
    check_range('--temperature', _TEMPERATURE.value, 0)
    sock = listen(_HOST.value, _PORT.value)
    model, params, tokenizer = sampling_flags.load()
    config = sampling_flags.sampling_config(
        tokenizer,
        temperature=1.0,  # a nonzero default; every request sets its own temperature
        max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    sampler = Sampler(model, config, _MODE.value or main_mode(model))
    capacity, slots = _CAPACITY.value, _SLOTS.value
    engine = Engine(
        sampler, params, tokenizer, slots=slots, capacity=capacity, prefixes=_PREFIXES.value
    )
    settings = Settings(
        name=_NAME.value or CHECKPOINT.value,
        max_queue=_MAX_QUEUE.value,
        api_key=_API_KEY.value or os.environ.get('DIFFUSIONGEMMA_API_KEY') or None,
        max_body_bytes=_MAX_BODY_BYTES.value,
    )
    service = Service(engine, params, tokenizer, settings, _TEMPERATURE.value)
    if _WARM_UP.value:
        service.warm_up()
    host, port = sock.getsockname()[:2]
    where = f'[{host}]' if ':' in host else host
    print(f'{settings.name}, mode {sampler.mode}, at http://{where}:{port}', flush=True)
    serve(service, sock, _GRACE_SECONDS.value)


if __name__ == '__main__':
    cli.run_main(main)
